"""video/decode.py over all kinds of streams that PyAV can write: a clip gives what is there.

Each frame by itself, windows of 8 and strides of 4, each from a fresh reader, against plain
decoding from the first packet to the last.
"""

import contextlib
import os
import tracemalloc
import unittest.mock

import av
import numpy as np

from tests.common import Skip, numbered, raises, test, test_each, tmp, write
from video import decode, tools

FRAMES = numbered(48, 64, 96)
LONG = unittest.mock.patch.object(decode, "KEEP_PACKETS", 0)  # files are read as those of hours
os.environ.setdefault("SVT_LOG", "1")  # errors only


def encoded(name, codec, frames=FRAMES, **options):
    """A file of `frames`; Skip where PyAV has no such encoder."""
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        raise Skip(f"this PyAV has no encoder {codec}") from None
    return write(name, frames, codec, **options)


def plain(path):
    """All frames (n, H, W, 3) of a file, decoded from the first packet to the last."""
    with av.open(path) as file:
        return np.stack([decode.to_rgb(frame) for frame in file.decode(video=0)])


def check_every_way(path, expected):
    """AssertionError where a reader that was just opened gives other frames than `expected`."""
    n = len(expected)
    windows = [range(i, i + 1) for i in range(n)] + [range(i, i + 8) for i in range(0, n - 7, 5)]
    windows += [range(i, n, 4)[:8] for i in range(0, n - 28, 3)]
    with decode.VideoReader(path) as video:
        assert len(video) == n, (len(video), n)
        times = video.times - video.times[0]
    for window in windows:
        with decode.VideoReader(path) as video:
            assert (video.frames(window) == expected[window]).all(), (path, window)
        with LONG, decode.VideoReader(path) as video:
            assert len(video) == n and (video.times - video.times[0] == times).all(), path
            assert (video.frames(window) == expected[window]).all(), ("long", path, window)
    for i in range(0, n, 5):
        with decode.MovieReader(path) as movie:
            assert (movie.at(times[i])[0] == expected[i]).all(), ("at", i)


def x264(name, params, **options):
    """What libx264 is to write, in its own words; B-frames always come in full groups."""
    return dict(name=name, codec="libx264", x264_params=f"{params}:b-adapt=0:scenecut=0", **options)


def x265(name, params, **options):
    """As x264, by libx265."""
    params += ":b-adapt=0:scenecut=0:log-level=none"
    return dict(name=name, codec="libx265", x265_params=params, **options)


KINDS = {
    "AV1, SVT": dict(name="svt.mp4", codec="libsvtav1", g=16, preset=10, svtav1_params="scd=0"),
    "AV1, libaom": dict(name="aom.mp4", codec="libaom-av1", g=20, cpu_used=8, lag_in_frames=19),
    "H.264, open GOP, B-pyramid": x264("open.mp4", "keyint=12:open-gop=1:bframes=4:b-pyramid=2"),
    "H.264, refreshed bit by bit": x264("pir.mp4", "keyint=16:intra-refresh=1:bframes=0"),
    "the same with B-frames, in TS": x264("pir.ts", "keyint=12:intra-refresh=1:bframes=2"),
    "H.264, interlaced": x264("fields.mp4", "keyint=12:bframes=3:interlaced=1"),
    "H.264, 4:4:4": x264("high444.mp4", "keyint=12:bframes=3", pix_fmt="yuv444p"),
    "H.264, RGB": dict(name="rgb.mp4", codec="libx264rgb", pix_fmt="rgb24", g=12),
    "H.264, fragmented MP4": x264("frag.mp4", "keyint=12:bframes=3",
                                  container=dict(movflags="frag_keyframe+empty_moov")),
    "HEVC, open GOP": x265("open265.mp4", "keyint=12:open-gop=1:bframes=4:b-pyramid=1"),
    "HEVC, refreshed bit by bit": x265("pir265.mp4", "keyint=12:intra-refresh=1:bframes=0"),
    "HEVC, temporal layers": x265("layers.mkv", "keyint=16:bframes=7:temporal-layers=3"),
    "HEVC, 4:4:4": x265("high265.mp4", "keyint=12:bframes=3", pix_fmt="yuv444p"),
    "VP9, alternate references": dict(name="alt.webm", codec="libvpx-vp9", g=20, auto_alt_ref=6,
                                      lag_in_frames=25, cpu_used=8, b=200000),
    "VP9, some frames not for reference": dict(
        name="layers.webm", codec="libvpx-vp9", g=20, deadline="realtime", cpu_used=8, b=200000,
        aq_mode=3, ts_parameters="ts_number_layers=2:ts_target_bitrate=100,200:"
        "ts_rate_decimator=2,1:ts_periodicity=2:ts_layer_id=0,1:ts_layering_mode=2"),
}


@test_each(KINDS)
def test_each_frame_is_that_of_plain_decoding(kind):
    """Each frame alone, windows of 8, strides of 4, by index and by time: to the bit."""
    path = encoded(**KINDS[kind])
    check_every_way(path, plain(path))


@test
def test_each_frame_of_every_other_encoder():
    """The same for all other video encoders of this PyAV, in the first container that fits."""
    done = {kind["codec"] for kind in KINDS.values()} | {"av1", "h264", "hevc", "vp9"}
    written = set()
    for codec in sorted(av.codecs_available - done):
        with contextlib.suppress(av.codec.codec.UnknownCodecError):
            encoder = av.codec.Codec(codec, "w")
            formats = [f.name for f in encoder.video_formats or ()] or ["yuv420p"]
            pix_fmt = "yuv420p" if "yuv420p" in formats else formats[0]
            for ending in ("mkv", "mov", "avi", "rm") if encoder.type == "video" else ():
                try:
                    path = write(f"{codec}.{ending}", FRAMES[:20], codec, pix_fmt, g=8)
                    expected = plain(path)
                except (av.FFmpegError, ValueError):  # no such pair
                    continue
                check_every_way(path, expected)
                written.add(codec)
                break
    assert {"mpeg1video", "mpeg2video", "mpeg4", "wmv2", "flv", "ffv1"} < written, written


# ---------------------------------------------------------------- files that start or end oddly

def packets_of(path):
    """(time stamp, whether it is called a key frame) of each packet."""
    with av.open(path) as file:
        return [(p.pts, p.is_keyframe) for p in file.demux(video=0) if p.size]


def remuxed(path, name, start, flag=None, rest=None):
    """The packets of a file from number `start` on in a new file; the first is called a key frame
    or not (`flag`), so are the others (`rest`)."""
    with av.open(path) as file, av.open(tmp(name), "w") as out:
        stream = out.add_stream_from_template(file.streams.video[0], opaque=True)
        for packet in [p for p in file.demux(video=0) if p.size][start:]:
            packet.stream = stream
            packet.is_keyframe = packet.is_keyframe if flag is None else flag
            flag = rest
            out.mux(packet)
    return tmp(name)


CUTS = {  # what is written; how many pictures before the key frame in time can still be decoded
    "RADL pictures": (x265("radl.mkv", "keyint=16:min-keyint=16:open-gop=0:radl=2:bframes=3"), 2),
    "RASL pictures": (x265("rasl.mkv", "keyint=16:min-keyint=16:open-gop=1:bframes=3"), 0),
    "H.264's open GOP": (x264("cut.mkv", "keyint=16:min-keyint=16:open-gop=1:bframes=3"), 0),
    "MPEG-2's open GOP": (dict(name="mpeg2.mkv", codec="mpeg2video", g=16, bf=2), 0),
    "AV1": (dict(name="svt.mkv", codec="libsvtav1", g=16, preset=10), 0),
}


@test_each(CUTS)
def test_cut_at_a_key_frame(kind):
    """Pictures shown before the first key frame come where they need no other, else not at all."""
    options, early = CUTS[kind]
    whole = encoded(**options)
    packets = packets_of(whole)
    key = [i for i, (_, is_key) in enumerate(packets) if is_key][1]
    after = sum(pts >= packets[key][0] for pts, _ in packets)
    led = sum(pts < packets[key][0] for pts, _ in packets[key:])
    assert led or kind == "AV1"
    path = remuxed(whole, "cut_" + options["name"], key)
    check_every_way(path, plain(whole)[len(FRAMES) - after - early:])


@test
def test_cut_in_a_refresh():
    """A file starts at the first frame that is whole again."""
    whole = encoded(**x264("refresh.mkv", "keyint=20:intra-refresh=1:bframes=0"))
    key = [i for i, (_, is_key) in enumerate(packets_of(whole)) if is_key][1]
    path = remuxed(whole, "cut_refresh.mkv", key)
    n = len(plain(path))
    assert 20 < n < 28, n
    check_every_way(path, plain(whole)[-n:])


@test
def test_first_key_frame_is_not_called_one():
    """A picture is not lost where a container forgets a flag; gray made-up ones do not come out."""
    whole = encoded("flag.flv", "flv", g=16)
    path = remuxed(whole, "no_flag.flv", 0, flag=False)
    assert not packets_of(path)[0][1]
    check_every_way(path, plain(whole))
    whole = encoded("gray.mkv", "mpeg4", g=16, bf=2)
    path = remuxed(whole, "cut_gray.mkv", 3)
    key = next(pts for pts, is_key in packets_of(path) if is_key)
    after = sum(pts >= key for pts, _ in packets_of(path))
    assert len(plain(path)) > after
    check_every_way(path, plain(whole)[-after:])


@test
def test_no_frame_and_encryption_are_said():
    """A file without a frame that can be decoded, and an encrypted MP4 and Matroska file."""
    path = encoded(**x264("none.mp4", "keyint=12"))
    data = bytearray(open(path, "rb").read())
    at, end = data.find(b"mdat") + 4, data.find(b"moov") - 4
    data[at:end] = bytes(end - at)
    open(path, "wb").write(data)
    with raises("none.mp4: no frame could be decoded"), decode.VideoReader(path) as video:
        video.frames([3])
    key = dict(encryption_scheme="cenc-aes-ctr", encryption_key="12" * 16, encryption_kid="3" * 32)
    locked = encoded("locked.mp4", "libx264", container=key)
    with raises("locked.mp4: is encrypted"):
        decode.VideoReader(locked)
    path = tmp("locked.mkv")
    with av.open(path, "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.metadata["title"] = 96, 64, "x" * 29
        out.mux(stream.encode(av.VideoFrame.from_ndarray(FRAMES[0], "rgb24")))
        out.mux(stream.encode(None))
    encoding = bytes.fromhex("62409a 50338101 503593 47e290") + bytes(16)  # a key's name: needed
    data = open(path, "rb").read()
    name = b"\x53\x6e\x9d" + b"x" * 29
    assert name in data
    open(path, "wb").write(data.replace(name, b"\x6d\x80\x9d" + encoding))
    with raises("locked.mkv: is encrypted"):
        decode.VideoReader(path)


# ---------------------------------------------------------------- long files

def packets_read(reader, path, wanted) -> int:
    """How many packets are read until a reader that was just opened gives what is wanted."""
    read, real = [], decode.VideoReader.demux

    def spy(self, *hollow):
        for packet in real(self, *hollow):
            read.extend([] if hollow else [packet])
            yield packet
    with LONG, unittest.mock.patch.object(decode.VideoReader, "demux", spy):
        with reader(path) as video:
            get = video.frames if reader is decode.VideoReader else video.at
            get(wanted)
    return len(read)


@test
def test_long_files_are_read_near_the_clip():
    """One clip costs the packets around it, not the file."""
    frames, wanted = numbered(500), np.arange(130, 170, 4)
    fast = dict(container=dict(movflags="faststart"))
    for name, more in (("end.mp4", {}), ("front.mp4", fast), ("near.mkv", {}), ("near.ts", {})):
        path = encoded(**x264(name, "keyint=25:bframes=3", frames=frames, **more))
        n = packets_read(decode.VideoReader, path, wanted)
        assert n < 150 or not name.endswith("mp4"), (name, n)  # others are indexed once
        n = packets_read(decode.VideoReader, path, wanted)
        assert n < 150, (name, "again", n)
        for start in (0, 1, 130, 400):
            decode.INDEX_CACHE.clear()
            n = packets_read(decode.MovieReader, path, (start + np.arange(10) * 4) / 25)
            assert n < 400, (name, start, n)


@test
def test_matroska_guesses_times_of_decoding():
    """A file that begins without B-frames has some later: those near are all there by time."""
    paths = [encoded(**x264(f"{n}.mp4", f"keyint=12:repeat-headers=1:bframes={n}"))
             for n in (0, 3)]
    with av.open(tmp("later.mkv"), "w") as out:
        with av.open(paths[0]) as first, av.open(paths[1]) as second:
            stream = out.add_stream_from_template(first.streams.video[0])
            for late, file in enumerate((first, second)):
                for packet in file.demux(video=0):
                    packet.stream = stream
                    if packet.size:
                        packet.pts += 50 * 512 * late  # a gap of two frames
                        packet.dts += 50 * 512 * late
                        out.mux(packet)
    for i, picture in enumerate(plain(tmp("later.mkv"))):
        with decode.MovieReader(tmp("later.mkv")) as movie:
            found = movie.at((i + 2 * (i >= 48)) / 25)[0]
            assert (found == picture).all() and (i < 60 or movie.order is None), i


def index_of(path):
    """All that an index of a long file says."""
    decode.INDEX_CACHE.clear()
    with LONG, decode.VideoReader(path) as video:
        return video.pts, list(video.order), video.times.tolist(), video.counted, video.keys


@test
def test_headers_that_are_wrong():
    """Where a header is not all that there is to know of an MP4 file, all of it is read."""
    long = encoded(**x264("many.mp4", "keyint=40", frames=np.zeros((1040, 32, 32, 3), np.uint8)))
    whole = encoded(**x264("right.mp4", "keyint=12:bframes=3"))
    front = dict(container=dict(movflags="faststart"))
    data = open(encoded(**x264("whole.mp4", "keyint=12:bframes=3", **front)), "rb").read()
    open(tmp("cut_off.mp4"), "wb").write(data[:len(data) * 19 // 20])
    moof = dict(container=dict(movflags="frag_keyframe"))
    shuffled = tmp("shuffled.mp4")
    with av.open(whole) as original, av.open(shuffled, "w") as out:
        stream = out.add_stream_from_template(original.streams.video[0], opaque=True)
        for i, packet in enumerate(p for p in original.demux(video=0) if p.size):
            if i >= 24:  # as in test_stamps_of_decoding
                packet.dts += 4 * packet.duration
                packet.pts, packet.is_keyframe = packet.dts, False
            packet.stream = stream
            out.mux(packet)
    for path in (remuxed(whole, "all_keys.mp4", 0, True, True),
                 remuxed(whole, "no_keys.mp4", 0, False, False),
                 remuxed(whole, "no_first_key.mp4", 3, True),
                 remuxed(long, "one_key.mp4", 0, True, False),
                 remuxed(encoded(**x264("led.mp4", "keyint=12:open-gop=1:bframes=3")), "x.mp4", 16),
                 encoded(**x264("moofs.mp4", "keyint=12:bframes=3", **moof)),
                 tmp("cut_off.mp4"), shuffled):
        found = index_of(path)
        with unittest.mock.patch.object(decode.VideoReader, "stamps", lambda video: None):
            assert found == index_of(path), path
    path = remuxed(whole, "few_keys.mp4", 0, True, False)
    found, full = index_of(path), index_of(whole)
    assert found[1:4] == full[1:4] and len(found[4]) == 1 and len(full[4]) == 4
    check_every_way(path, plain(whole))


# ---------------------------------------------------------------- what else a file says

@test
def test_x264_version_is_known_everywhere():
    """The first packet's note of a bug in old x264 counts for frames of every key frame."""
    path = encoded(**x264("old444.mp4", "keyint=12:bframes=0", pix_fmt="yuv444p", crf=10))
    data = open(path, "rb").read()
    note = data.find(b"x264 - core ")
    open(path, "wb").write(data[:note + 12] + b"148" + data[note + 15:])  # which it is not
    with av.open(path) as file:
        damaged = [i for i, frame in enumerate(file.decode(video=0)) if frame.is_corrupt]
    assert damaged == [0, 12, 24, 36]
    for i in range(0, len(FRAMES), 5):
        with decode.VideoReader(path) as video, raises("is damaged"):
            video.frames([i])
        with decode.MovieReader(path) as movie, raises("is damaged"):
            movie.at(i / 25)


@test
def test_all_eight_orientations():
    """A display matrix turns and mirrors: pixel (x, y) goes to (ax + cy, bx + dy)."""
    path = encoded("matrix.mp4", "libx264", FRAMES[:2])
    data, picture = bytearray(open(path, "rb").read()), plain(path)[1]
    at = data.find(b"tkhd") + 44
    y, x = np.indices(picture.shape[:2])
    for a, b, c, d in ((1, 0, 0, 1), (-1, 0, 0, 1), (1, 0, 0, -1), (-1, 0, 0, -1),
                       (0, 1, 1, 0), (0, 1, -1, 0), (0, -1, 1, 0), (0, -1, -1, 0)):
        matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 14]) << 16
        data[at:at + 36] = matrix.astype(">i4").tobytes()
        open(path, "wb").write(data)
        right, down = a * x + c * y, b * x + d * y
        right, down = right - right.min(), down - down.min()
        expected = np.zeros((down.max() + 1, right.max() + 1, 3), np.uint8)
        expected[down, right] = picture
        with decode.VideoReader(path) as video:
            assert np.array_equal(video.frames([1])[0], expected), (a, b, c, d)


@test
def test_check_is_one_pass():
    """`data.py check --full` reads every packet about once and holds a few frames."""
    path, read = encoded("long.mp4", "libx264", numbered(250), g=250), []
    real = decode.VideoReader.read

    def spy(self, start, stop):
        for item in real(self, start, stop):
            read.append(item[0])
            yield item
    decode.VideoReader.read = spy
    tracemalloc.start()
    try:
        assert tools.check_file((path, True)) == (path, 250, None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        decode.VideoReader.read = real
        tracemalloc.stop()
    assert len(read) < 2.1 * 250, len(read)  # the first, middle and last frame by themselves, too
    assert peak < 20 * FRAMES[0].nbytes, peak / FRAMES[0].nbytes


@test
def test_what_refers_to_a_damaged_frame_is_refused():
    """No frame is wrong without an error, whether the damaged one itself is wanted or not."""
    path = encoded(**x264("hurt.mp4", "keyint=12:bframes=0"))
    expected, data = plain(path), bytearray(open(path, "rb").read())
    with av.open(path) as file:
        packet = [p for p in file.demux(video=0) if p.size][14]
    middle = packet.pos + packet.size // 2
    data[middle:packet.pos + packet.size] = bytes(packet.pos + packet.size - middle)
    open(path, "wb").write(data)
    for i, picture in enumerate(expected):
        with decode.VideoReader(path) as video, contextlib.ExitStack() as stack:
            if 14 <= i < 24:
                stack.enter_context(raises("is damaged"))
            assert (video.frames([i])[0] == picture).all(), i
    with raises("frame 14 is damaged"), decode.VideoReader(path) as video:
        video.check()


@test
def test_stamps_of_decoding():
    """Copies whose pictures have the time stamps of decoding, in all or in part, come in order."""
    source = write("b.mp4", numbered(48), bf=3, g=12, crf=1)
    for name, start in (("all.mp4", 0), ("part.mp4", 24), ("all.mkv", 0)):
        path = tmp(name)
        with av.open(source) as original, av.open(path, "w") as out:
            stream = out.add_stream_from_template(original.streams.video[0])
            for i, packet in enumerate(p for p in original.demux() if p.size):
                if i >= start:  # four frames later, so that no time stamp is there twice
                    packet.dts += 4 * packet.duration * (start > 0)
                    packet.pts = packet.dts
                packet.stream = stream
                out.mux(packet)
        with av.open(path) as file:
            plain = [decode.to_rgb(frame) for frame in file.decode(video=0)]
        with decode.VideoReader(path) as video:
            assert len(video) == len(plain) and video.counted, name
            assert all((a == b).all() for a, b in zip(video.frames(range(len(plain))), plain)), name
        for i in range(0, len(plain), 5):
            with decode.VideoReader(path) as video:
                assert (video.frames([i])[0] == plain[i]).all(), (name, i)
                t = video.times[i] - video.times[0]
            with decode.MovieReader(path) as movie:
                assert start or (movie.at(t)[0] == plain[i]).all(), (name, i)
    with decode.VideoReader(source) as video:
        assert not video.counted
