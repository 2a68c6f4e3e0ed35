"""video/decode.py over every kind of stream that PyAV can write: what a clip gives is what is there.

Each frame by itself, windows of 8 and strides of 4, each from a fresh reader, against plain
decoding from the first packet to the last.
"""

import os

import av
import numpy as np

from tests.common import Skip, numbered, test_each, write
from video import decode

FRAMES = numbered(48, 64, 96)
os.environ.setdefault("SVT_LOG", "1")  # errors only


def encoded(name, codec, **options):
    """A file of FRAMES; Skip where PyAV has no such encoder."""
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        raise Skip(f"this PyAV has no encoder {codec}") from None
    return write(name, FRAMES, codec, **options)


def plain(path):
    """All frames (n, H, W, 3) of a file, decoded from the first packet to the last."""
    with av.open(path) as file:
        return np.stack([decode.to_rgb(frame) for frame in file.decode(video=0)])


def check_every_way(path, expected):
    """AssertionError where a reader that was just opened gives other frames than `expected`."""
    n = len(expected)
    with decode.VideoReader(path) as video:
        assert len(video) == n, (len(video), n)
        times = video.times - video.times[0]
    windows = [range(i, i + 1) for i in range(n)] + [range(i, i + 8) for i in range(0, n - 7, 5)]
    windows += [range(i, n, 4)[:8] for i in range(0, n - 28, 3)]
    for window in windows:
        with decode.VideoReader(path) as video:
            assert (video.frames(window) == expected[window]).all(), window
    for i in range(0, n, 5):
        with decode.MovieReader(path) as movie:
            assert (movie.at(times[i])[0] == expected[i]).all(), ("at", i)


KINDS = {
    "AV1, SVT": dict(name="svt.mp4", codec="libsvtav1", g=16, preset=10, svtav1_params="scd=0"),
    "AV1, libaom": dict(name="aom.mp4", codec="libaom-av1", g=20, cpu_used=8, lag_in_frames=19),
}


@test_each(KINDS)
def test_each_frame_is_that_of_plain_decoding(kind):
    """Each frame alone, windows of 8, strides of 4, by index and by time: to the bit."""
    path = encoded(**KINDS[kind])
    check_every_way(path, plain(path))
