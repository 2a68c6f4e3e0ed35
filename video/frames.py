"""Frame folders: the numbered pictures of a folder, img_00001.jpg, img_00002.jpg, ..., as a video.

The number is what stands before the ending, with any zero padding, from any first one. Pictures are
known by their endings; hidden files, others (Thumbs.db, a .txt) and subfolders do not count.
"""

import itertools
import os
import re
from fractions import Fraction

import numpy as np

from video.decode import MovieReader, VideoError, VideoReader, resized

IMAGE_EXT = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
NUMBERED = re.compile(rf"(.*?)([0-9]+)({'|'.join(map(re.escape, IMAGE_EXT))})", re.I | re.S)
RATE = "VIDEOMAE_FRAME_RATE"  # in the environment: data workers have it however they are started


def set_rate(rate: float):
    """Tells how many frames per second all frame folders have; 25 where nobody does."""
    os.environ[RATE] = str(rate)


def get_rate() -> float:
    """What set_rate told, in this process or in one that started it."""
    return float(os.environ.get(RATE, 25))


def are_frames(names: list[str]) -> bool:
    """Whether these files are pictures whose names differ in their number only."""
    found = [NUMBERED.fullmatch(name) for name in names]
    return all(found) and len({match[1] for match in found}) == 1


def frame_files(folder: str) -> list[str]:
    """The paths of a folder's pictures by their numbers; VideoError where one is odd or lacks."""
    try:
        names = sorted(name for name in os.listdir(folder)
                       if name.lower().endswith(IMAGE_EXT) and name[0] != ".")
    except OSError as e:
        raise VideoError(f"{folder}: {e.strerror}") from None
    if not names:
        raise VideoError(f"{folder}: is a folder without pictures; expected a video file, or the "
                         "numbered pictures of one video")
    found = list(map(NUMBERED.fullmatch, names))
    for name, match in zip(names, found):
        if not match or match[1] != found[0][1]:
            raise VideoError(f"{folder}: holds {name}: expected the pictures of one video, whose "
                             "names differ in the number before the ending only")
    ordered = sorted(zip(map(int, (match[2] for match in found)), names))
    for (a, first), (b, second) in itertools.pairwise(ordered):
        if b != a + 1:
            lack = f"frame {a + 1} is missing" if b > a else f"frame {a} is there twice"
            raise VideoError(f"{folder}: {lack}: {first} is followed by {second}")
    return [os.path.join(folder, name) for _, name in ordered]


def files_of(path: str) -> list[str]:
    """The files that a video is made of: itself, or a folder's frames."""
    return frame_files(path) if os.path.isdir(path) else [path]


class Frame(VideoReader):
    """A picture that is an error where it is damaged; FFmpeg would guess the pixels of a JPEG."""

    options = {"err_detect": "explode"}


class FrameFolder(MovieReader):
    """A frame folder, read like a video file of set_rate's frames per second.

    VideoError names a picture that cannot be read or whose size is not that of the one read first.
    """

    def __init__(self, path: str, size_of=None, antialias=True):
        self.path, self.size_of, self.antialias = path, size_of, antialias
        self.files, self.first = frame_files(path), None  # first: (file, shape) of what was read
        self.order, self.rate = range(len(self.files)), Fraction(get_rate()).limit_denominator(1001)
        # rounded as of time stamps in a file, so that ties between frames fall alike
        self.times = np.arange(len(self.files)) * (1 / get_rate())

    def __exit__(self, *exc):
        pass

    def pictures(self, indices) -> list[np.ndarray]:
        """As of VideoReader: frame indices (any order, repeats) -> (H, W, 3) each."""
        indices = self.inside(indices)
        found = {i: self.read_picture(self.files[i]) for i in sorted(set(indices))}
        return [found[i] for i in indices]

    def read_picture(self, file: str) -> np.ndarray:
        """(H, W, 3) uint8, of the size that size_of wants."""
        with Frame(file) as picture:
            rgb, = picture.pictures([0])
        self.first = self.first or (file, rgb.shape)
        if rgb.shape != self.first[1]:
            (h, w), (H, W) = rgb.shape[:2], self.first[1][:2]
            raise VideoError(f"{file}: is {w}x{h} pixels, {os.path.basename(self.first[0])} "
                             f"{W}x{H}: expected one size in a folder")
        return resized(rgb, *self.size_of(*rgb.shape[:2]), self.antialias) if self.size_of else rgb

    def all_frames(self):
        """As of VideoReader: yields every frame."""
        return map(self.read_picture, self.files)

    def check(self):
        """Reads all pictures and keeps none; VideoError names the first that fails."""
        for _ in self.all_frames():
            pass
