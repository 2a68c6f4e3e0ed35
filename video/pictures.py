"""Pictures out: text drawn into frames, strips of frames, PNG and H.264 files (PyAV)."""

from fractions import Fraction

import av
import numpy as np

# 3x5 pixels a glyph, a row an octal digit: for labels in pictures, with no font library
FONT = dict(zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-:_/%()+=,", (
    "25755 65656 34443 65556 74647 74644 34553 55755 72227 11152 55655 44447 57755 "
    "65555 25552 65644 25563 65655 34216 72222 55557 55552 55775 55255 55222 71247 "
    "75557 26227 71747 71717 55711 74717 74757 71122 75757 75717 "
    "00002 00700 02020 00007 11244 51245 12221 42224 02720 07070 00024").split()))


def draw_text(image: np.ndarray, text: str, y: int, x: int, scale: int = 1, color=(0, 0, 0)):
    """Writes text into an (H, W, 3) uint8 image, in place, its upper left corner at (y, x).

    Glyphs are 4*scale wide with their gap, 5*scale high; cut off at the edges. There are capitals
    only, and what FONT does not have is blank.
    """
    for k, char in enumerate(text.upper()):
        rows = [[int(digit) >> bit & 1 for bit in (2, 1, 0)] for digit in FONT.get(char, "00000")]
        glyph = np.kron(np.array(rows, bool), np.ones((scale, scale), bool))
        left = x + 4 * scale * k
        place = image[y:y + 5 * scale, left:left + 3 * scale]
        place[glyph[:place.shape[0], :place.shape[1]]] = color


def strip(frames: np.ndarray, label: str, columns: int = 8) -> np.ndarray:
    """(T, H, W, 3) uint8 -> up to `columns` frames side by side under a label."""
    shown = np.linspace(0, len(frames) - 1, min(columns, len(frames))).astype(int)
    # until one can see the frames and read the label
    zoom = max(1, 112 // frames.shape[1], -(-224 // (len(shown) * (frames.shape[2] + 2))))
    large = frames[shown].repeat(zoom, 1).repeat(zoom, 2)
    gaps = (0, 0), (0, 2), (0, 2), (0, 0)  # white pixels below and to the right of each
    row = np.concatenate(list(np.pad(large, gaps, constant_values=255)), 1)
    title = np.full((14, row.shape[1], 3), 255, np.uint8)
    draw_text(title, label, 2, 2, 2 if 8 * len(label) + 2 <= row.shape[1] else 1)
    return np.concatenate([title, row])


def write_png(path: str, image: np.ndarray):
    """(H, W, 3) uint8 -> a PNG file."""
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = image.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
    packets = codec.encode(frame) + codec.encode(None)
    with open(path, "wb") as f:
        f.write(b"".join(bytes(packet) for packet in packets))


def write_video(path: str, frames: np.ndarray, fps: int = 25, crf: int = 18, **options):
    """(T, H, W, 3) uint8 with even H and W -> an H.264 file.

    Options go to x264 as they are (the distance of key frames is `g`, the number of B-frames `bf`).
    """
    with av.open(path, "w") as out:
        stream = out.add_stream("libx264", rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        options = {"crf": crf, "threads": 1} | options
        stream.options = {key: str(value) for key, value in options.items()}
        for rgb in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
