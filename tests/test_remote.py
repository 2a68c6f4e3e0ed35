"""video/remote.py: members of tars and addresses read like the files that they are."""

import contextlib
import gzip
import io
import os
import shutil
import sys
import tarfile
import unittest.mock

import av

import eval as evaluate
import finetune
import pretrain
from tests.common import (TUNE, answers, call, checkpoint, difference, labelled, log_rows, mistake,
                          need_http, numbered, odd_files, raises, server, test, test_each, tmp,
                          toy_videos, write)
from video import decode, lists, prepared, remote, tools

PRETRAIN = """--size tiny --patch_size 8 --img_size 16 --num_frames 4 --sampling_rate 1
    --mask_ratio 0.5 --max_steps 4 --warmup_epochs 0 --batch_size 4 --log_every 1 --device cpu
    --dtype fp32 --num_workers 0""".split()
TEST = "--num_segments 2 --num_crops 1 --device cpu --num_workers 0".split()


def packed(name, paths, folder=""):
    """A tar of files -> its path."""
    with tarfile.open(tmp(name), "w") as tar:
        for path in paths:
            tar.add(path, folder + os.path.basename(path))
    return tmp(name)


def moved(source, out, place):
    """A list with each path changed by place(path) -> its name."""
    rows = zip(*lists.read_videos(source))
    lists.write_list(tmp(out), [(place(path), label) for path, label in rows])
    return tmp(out)


def alike(path, other):
    """Asserts that all frames and times, by index and by time, are the same."""
    with prepared.open_video(path) as a, prepared.open_video(other) as b:
        assert len(a) == len(b) and (a.times == b.times).all(), other
        wanted = [17, 3, 3, *range(len(a))]
        assert (a.frames(wanted) == b.frames(wanted)).all(), other
    with prepared.open_movie(path) as a, prepared.open_movie(other) as b:
        for x, y in zip(a.at([[0.4, 1.2]]), b.at([[0.4, 1.2]])):
            assert (x == y).all(), other


@contextlib.contextmanager
def in_blocks(size=400):
    """Context: nothing is fetched whole, all in small blocks."""
    with unittest.mock.patch.object(decode.VideoReader, "at_once", 0), \
            unittest.mock.patch.object(decode.MovieReader, "at_once", 0), \
            unittest.mock.patch.object(remote, "BLOCK", size):
        yield


# ---------------------------------------------------------------- members of tars

@test
def test_members_of_tars():
    """Every kind of file in a tar gives its own frames, at once and in blocks."""
    tar = packed("my shard.tar", odd_files().values(), "./a b/")
    for path in odd_files().values():
        alike(path, f"{tar}::a b/{os.path.basename(path)}")
    for kind in ("B-frames, pyramid, long GOP", "MPEG transport stream", "GIF"):
        path = odd_files()[kind]
        with in_blocks():
            alike(path, f"{tar}::a b/{os.path.basename(path)}")


@test
def test_lists_of_members():
    """Members in lists, with spaces, under --data_root; check, split and write keep them."""
    packed("to ys.tar", [os.path.join(toy_videos(), f"{i}.mp4") for i in range(12)], "v w/")
    listed, rows = tmp("members.tsv"), [f"to ys.tar::v w/{i}.mp4 c{i % 2}\n" for i in range(12)]
    open(listed, "w").writelines(rows)
    paths, labels = lists.read_videos(listed, tmp())
    assert paths == [f"{tmp('to ys.tar')}::v w/{i}.mp4" for i in range(12)]
    assert labels == ["c0", "c1"] * 6 and not lists.missing(paths)
    gone = [f"{tmp('no.tar')}::{i}.mp4" for i in range(12)]
    assert lists.missing([*paths, *gone]) == gone
    assert lists.read_videos(paths[3]) == ([paths[3]], [None])
    call(tools, "split", listed, tmp("m1.tsv"), tmp("m2.tsv"), "--data_root", tmp())
    both = [lists.read_videos(tmp(name))[0] for name in ("m1.tsv", "m2.tsv")]
    assert sorted(sum(both, [])) == sorted(paths) and both[1]
    open(listed, "a").write("to ys.tar::v w/1.mp4 c1\nto ys.tar::none.mp4 c1\n")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert tools.main(["check", listed, "--data_root", tmp(), "--num_workers", "1", "--full",
                           "--write_good", tmp("good members.tsv")]) == 1
    text = out.getvalue()
    assert "none.mp4: cannot be opened (no such file among the 12 in the archive)" in text, text
    assert "13 of 14 files can be read" in text and "1 rows name a file" in text
    assert lists.read_videos(tmp("good members.tsv"))[0] == [*paths, paths[1]]
    copied = tmp("copied.tar")
    with tarfile.open(copied, "w") as tar:
        tar.add(os.path.join(toy_videos(), "5.mp4"), "copy.mp4")
    same = [os.path.join(toy_videos(), "5.mp4"), paths[5], f"{copied}::copy.mp4"]
    assert tools.copies([*same, *paths[:3]]) == [same]
    said = [*lists.describe(["a"], paths, [0] * 12, paths[2:4], [0] * 2)]
    assert any("2 of the 2 validation videos are also trained on" in line for line in said)


@test
def test_names_that_only_look_remote():
    """A file whose name has `://` or `::` in it is that file; a set's folder goes before."""
    plain = odd_files()["no B-frames"]
    for name in ("x.tar::plain.mp4", "s3:/bucket.mp4"):
        os.makedirs(os.path.dirname(tmp(name)), exist_ok=True)
        with open(tmp(name), "wb") as f:
            f.write(open(plain, "rb").read())
    open(tmp("looks.tsv"), "w").write("x.tar::plain.mp4\ns3://bucket.mp4\n")
    paths = lists.read_videos(tmp("looks.tsv"), tmp())[0]
    assert paths == [tmp("x.tar::plain.mp4"), tmp() + "/s3://bucket.mp4"]
    assert not lists.missing(paths) and not any(map(remote.is_remote, paths))
    for path in paths:
        alike(plain, path)


@test
def test_wrong_tars():
    """A tar that is compressed, cut off, none, or lacks a member is told in a sentence."""
    first, last = (odd_files()[kind] for kind in ("no B-frames", "MPEG-2"))
    whole = packed("whole.tar", [first, last])
    with tarfile.open(whole) as tar:
        tar.getmembers()
        within = tar.getmember("x.mpg").offset_data + 2000
        end = tar.offset
    data = open(whole, "rb").read()
    files = {"z.tar": gzip.compress(data), "z.tar.gz": gzip.compress(data), "none.tar": b"x" * 2000,
             "empty.tar": b"", "cut.tar": data[:within], "endless.tar": data[:end]}
    for name, content in files.items():
        open(tmp(name), "wb").write(content)
    for name, words in (("z.tar::x.ts", "compressed: expected a plain .tar"),
                        ("z.tar.gz::x.ts", "compressed: expected a plain .tar"),
                        ("none.tar::x.ts", "is no tar"), ("empty.tar::x.ts", "is no tar"),
                        ("nowhere.tar::x.ts", "No such file"),
                        ("whole.tar::x.ts", "no such file among the 2 in the archive)"),
                        ("cut.tar::x.mpg", "the archive is cut off within it"),
                        ("cut.tar::x.ts", "among the 2 in the archive, which is cut off)"),
                        ("endless.tar::x.ts", "2 in the archive, which is cut off)")):
        with raises(f"{tmp(name)}: cannot be opened", words):
            prepared.open_video(tmp(name))
    alike(first, f"{tmp('cut.tar')}::{os.path.basename(first)}")  # what is there can be read


@test
def test_runs_from_a_tar():
    """Pre-training, fine-tuning with validation, the test, a prepared set: as from the files."""
    tar = packed("runs.tar", [os.path.join(toy_videos(), f"{i}.mp4") for i in range(12)])
    same_runs("tar", lambda path: f"{tar}::{os.path.basename(path)}")


def same_runs(name, place, workers=0):
    """Asserts that runs on the videos of labelled(), each at place(path), are those of files."""
    train, val = labelled()
    there = [moved(source, f"{name}_{i}.tsv", place) for i, source in enumerate((train, val))]
    out = lambda kind, where: tmp(f"{kind}_from_{where}")
    for where, (some, other) in dict(files=(train, val), **{name: there}).items():
        more = ["--num_workers", workers if where == name else 0]
        if os.path.exists(out("tune", where)):
            continue
        call(pretrain, *PRETRAIN, "--data", some, "--out_dir", out("pre", where), *more)
        call(finetune, *TUNE, "--data", some, "--val_data", other, "--out_dir", out("tune", where),
             *more)
        call(evaluate, "--ckpt", tmp("tune_from_files", "last.pt"), "--data", other, *TEST, *more,
             "--out_dir", out("test", where))
        text = call(evaluate, "--ckpt", tmp("tune_from_files", "last.pt"), "--predict",
                    lists.read_videos(other)[0][2], "--device", "cpu", "--out_dir",
                    out("test", where))
        assert "class" in text
        call(tools, "prepare", some, out("set", where), "--num_workers", 1 + workers)
    for kind in ("pre", "tune"):
        weights = (checkpoint(out(kind, where))["model"] for where in ("files", name))
        assert difference(*weights) == 0
        losses = [[row.get("loss") for row in log_rows(out(kind, where))]
                  for where in ("files", name)]
        assert losses[0] == losses[1] and len(losses[0]) >= 4
    probs = [open(os.path.join(out("test", where), "predictions.csv")).read().splitlines()
             for where in ("files", name)]
    assert [row.split(",", 1)[1] for row in probs[0]] == [row.split(",", 1)[1] for row in probs[1]]
    stored = [open(os.path.join(out("set", where), "000000.raw"), "rb").read()
              for where in ("files", name)]
    assert stored[0] == stored[1]
    index = prepared.read_index(out("set", name))
    assert [path for path, _ in index["rows"]] == lists.read_videos(there[0])[0]
    listed = [f"{out('set', name)}::{path}" for path in lists.read_videos(there[0])[0]]
    assert lists.read_videos(out("set", name))[0] == listed and not lists.missing(listed)


# ---------------------------------------------------------------- connections

@test
def test_what_passes_is_tried_again():
    """Errors that may pass are tried again, with growing pauses; others and too many are told."""
    class Refused(Exception):
        status = 403
    def failing(times, error):
        left = iter([error] * times)
        def function():
            for e in left:
                raise e
            return "read"
        return function
    with unittest.mock.patch.object(remote.time, "sleep") as sleep:
        assert remote.retried(failing(4, ConnectionError("reset"))) == "read"
        assert [call.args[0] for call in sleep.call_args_list] == [0.5, 1, 2, 4]
        for error, calls, words in ((ConnectionError("reset"), 4, "reset, tried again and again"),
                                    (FileNotFoundError("x"), 0, "no such file"),
                                    (PermissionError("no"), 0, "PermissionError: no"),
                                    (Refused("forbidden"), 0, "Refused: forbidden")):
            sleep.reset_mock()
            try:
                remote.retried(failing(5, error))
            except OSError as e:
                assert str(e) == words or words in str(e), e
            else:
                raise AssertionError(error)
            assert sleep.call_count == calls, error
        sleep.reset_mock()
        with unittest.mock.patch.object(remote.time, "monotonic", iter(range(0, 999, 40)).__next__):
            with contextlib.suppress(OSError):
                remote.retried(failing(5, ConnectionError("slow")))
        assert sleep.call_count == 1  # 80 s have passed


@test_each(["short", "long"])
def test_a_lost_connection_is_no_end(length):
    """Where reading breaks off anywhere, it is named; no frame is left out then, or later."""
    keep = decode.KEEP_PACKETS if length == "short" else 0  # 0: as files over 64 MB are
    shuffled, stamps = write("in order.mkv", numbered(), bf=2, g=12), tmp("shuffled.mkv")
    with av.open(shuffled) as file, av.open(stamps, "w") as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        for i, packet in enumerate(p for p in file.demux(video=0) if p.size):
            packet.pts = packet.dts = 40 * i  # as copied from AVI
            packet.stream = stream
            out.mux(packet)
    files = odd_files() | {"shuffled": stamps}
    for kind in ("shuffled", "B-frames, pyramid, long GOP", "MPEG transport stream",
                 "AVI with B-frames", "short GOP, open", "VP8 with hidden frames"):
        tar = packed("lost.tar", [files[kind]])
        path = f"{tar}::{os.path.basename(files[kind])}"
        size = os.path.getsize(files[kind])
        read, block, fetched = remote.Part.read_block, -(-size // 20), []

        def failing(part, i):
            if part.name == path and i not in part.held:
                fetched.append(i)
                if len(fetched) > left:
                    raise OSError("connection lost")
            return read(part, i)
        with in_blocks(block), unittest.mock.patch.object(decode, "KEEP_PACKETS", keep):
            for left in (0, 1, 2, 5, 11, 16, 20, 22, 23, 24, 25, 30, 35, 40, 44, 60, 100, 200):
                decode.INDEX_CACHE.clear()
                decode.SHUFFLED.clear()
                with unittest.mock.patch.object(remote.Part, "read_block", failing):
                    for use in (lambda: prepared.open_video(path).frames(range(40)),
                                lambda: prepared.open_movie(path).at([0.5, 1.5])):
                        fetched.clear()
                        try:
                            use()
                        except decode.VideoError as e:
                            assert path in str(e) and "connection lost" in str(e), (kind, left, e)
                        else:
                            assert len(fetched) <= left, (kind, left)
                alike(files[kind], path)  # by what the process keeps of the file
            assert len(fetched) <= left, kind  # it has come to the end


@test
def test_fsspec_is_asked_for():
    """Without fsspec an address is one sentence, before anything runs; no list goes to one."""
    open(tmp("far.tsv"), "w").write("s3://bucket/a b.mp4 x\ns3://bucket/b.mp4 y\n")
    remote.know.cache_clear()
    with unittest.mock.patch.dict(sys.modules, fsspec=None):
        for source in (tmp("far.tsv"), "https://host/list.csv"):
            text = mistake(pretrain, *PRETRAIN, "--data", source, "--out_dir", tmp("no_run"))
            assert "pip install fsspec" in text, text
        with raises("s3://bucket/a b.mp4: cannot be opened", "pip install fsspec"):
            prepared.open_video("s3://bucket/a b.mp4")
    remote.know.cache_clear()
    with raises("s3://bucket/x.tsv: expected the name of a list"):
        lists.check_out("s3://bucket/x.tsv")


# ---------------------------------------------------------------- addresses

@test
def test_addresses():
    """Files, members and lists at file:// and http:// addresses are those on the disk."""
    need_http()
    _, base = server()
    packed("far shard.tar", odd_files().values())
    for path in odd_files().values():
        name = os.path.basename(path)
        for place in (f"file://{tmp()}", base):
            alike(path, f"{place}/{name}")
            tar = "far shard.tar" if place != base else "far%20shard.tar"
            alike(path, f"{place}/{tar}::{name}")
    path = odd_files()["B-frames, pyramid, long GOP"]
    with in_blocks(), answers() as kind:
        alike(path, f"{base}/{os.path.basename(path)}")
        assert kind.requests > 10
    with in_blocks(), answers(ranges=False) as kind:  # as of python -m http.server
        alike(path, f"{base}/{os.path.basename(path)}")
        alike(path, f"{base}/far%20shard.tar::{os.path.basename(path)}")
    alike(path, f"simplecache::{base}/{os.path.basename(path)}")
    open(tmp("far list.csv"), "w").write(f"{base}/a b.mp4,x\nplain.mp4,y\n")
    paths, labels = lists.read_videos(f"{base}/far%20list.csv", base)
    assert paths == [f"{base}/a b.mp4", f"{base}/plain.mp4"] and labels == ["x", "y"]
    with answers(absent=403):  # so S3, where there is no index.json
        shutil.copy(tmp("far list.csv"), tmp("other.csv"))
        assert lists.read_videos(f"{base}/other.csv", base)[0] == paths
        assert lists.read_videos(f"{base}/far%20list.csv?again", base)[0] == paths
    assert lists.read_videos(f"{base}/a.mp4?sig=1/x")[0] == [f"{base}/a.mp4?sig=1/x"]
    open(tmp("page"), "w").write("<!DOCTYPE html>\n")
    for source, words in (("page", "a web page"), ("", "a folder is searched on a disk only"),
                          ("far%20shard.tar", "a tar; expected TAR::NAME")):
        with raises(f"{base}/{source}: {words}"):
            lists.read_videos(f"{base}/{source}")
    for name, words in ((f"{base}/absent.mp4", "no such file"),
                        (f"{base}/absent.tar::a", "no such file"),
                        (f"{base}/far%20shard.tar::a.mp4", "no such file among the 16"),
                        (f"file://{tmp()}", "is a folder"),
                        ("foo://x/y.mp4", "foo://... is no address that fsspec knows")):
        with raises(f"{name}: cannot be opened", words):
            prepared.open_video(name)
    with raises("foo://... is no address"):
        lists.missing(["foo://x/y.mp4"])


@test
def test_broken_connections():
    """An answer that breaks off is asked for again; one that always does is a broken video."""
    need_http()
    _, base = server()
    path = odd_files()["B-frames, pyramid, long GOP"]
    address = f"{base}/{os.path.basename(path)}"
    with unittest.mock.patch.object(remote.time, "sleep") as sleep:
        with answers(fails=2):
            alike(path, address)
            assert sleep.call_count == 2
        with answers(fails=99), raises(f"{address}: cannot be opened", "tried again and again"):
            prepared.open_video(address)
        with answers(), in_blocks(), prepared.open_video(address) as video:
            server()[0].fails = 99
            video.packets = None
            video.source.held.clear()
            with raises(f"{address}: ", "tried again and again"):
                video.frames([20])
    with raises("http://127.0.0.1:9/x.mp4: cannot be opened", "tried again"), \
            unittest.mock.patch.object(remote, "PAUSES", (0.01,)):
        prepared.open_video("http://127.0.0.1:9/x.mp4")


@test
def test_runs_from_file_addresses():
    """Training, the test, prepared sets from file://: as from files; members, lists, too."""
    import fsspec.implementations.local
    same_runs("addresses", lambda path: f"file://{path}")
    _, val = labelled()
    tar = packed("at home.tar", odd_files().values())
    for path in odd_files().values():
        alike(path, f"file://{path}")
        alike(path, f"file://{tar}::{os.path.basename(path)}")
    assert lists.read_videos(f"file://{val}") == lists.read_videos(val)
    paths = [f"file://{tmp()}/{name}.mp4" for name in ("plain", "is no file")]
    assert not lists.missing(paths)
    with raises(paths[1], "cannot be opened (no such file)"):
        prepared.open_video(paths[1])
    with raises(f"file://{tmp()}/none.csv: no such file"):
        lists.read_videos(f"file://{tmp()}/none.csv")
    far = moved(val, "far rows.tsv", lambda path: f"file://{path}")
    paths, labels = lists.read_videos(far)
    call(tools, "split", far, tmp("f1.tsv"), tmp("f2.tsv"), "--folds", 2)
    assert sorted(sum((lists.read_videos(tmp(f"f{i}.tsv"))[0] for i in (1, 2)), [])) == (
        sorted(paths))
    assert [*lists.read_all([far], "elsewhere", "", outside=os.getcwd())[0]] == paths
    whole, calls = fsspec.implementations.local.LocalFileSystem.cat_file, []

    def short(files, place, **kw):
        calls.append(place)
        return whole(files, place, **kw)[:-1 if len(calls) < 3 else None]
    with unittest.mock.patch.object(fsspec.implementations.local.LocalFileSystem, "cat_file",
                                    short), unittest.mock.patch.object(remote.time, "sleep"):
        alike(paths[0].removeprefix("file://"), paths[0])
        assert len(calls) == 4  # two of them of the second reader


@test
def test_runs_over_http():
    """Training, the test, prepared sets over HTTP, with workers: as from files."""
    need_http()
    _, base = server()
    same_runs("http", lambda path: f"{base}/toy_videos/{os.path.basename(path)}", workers=2)
