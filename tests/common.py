"""What the tests share: how one is registered, tiny models, videos, scripts and runs."""

import contextlib
import functools
import http.server
import importlib
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import unittest.mock
from fractions import Fraction

import av
import numpy as np
import torch

import masking
from model import VideoMAE
from video import pictures, toy

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # where the scripts lie
TESTS = []


# ---------------------------------------------------------------- tests

class Skip(Exception):
    """A test that cannot run here; the message says what is missing."""


def test(f):
    """Registers a test; its docstring is the claim."""
    TESTS.append(f)
    return f


def test_each(names):
    """Registers a test once for each name: test_x("a") is known as test_x[a]."""
    def register(f):
        for name in names:
            one = functools.partial(f, name)
            one.__name__, one.__doc__ = f"{f.__name__}[{name}]", f.__doc__
            TESTS.append(one)
        return f
    return register


@contextlib.contextmanager
def raises(*words):
    """Context: a ValueError whose message holds all the words."""
    try:
        yield
    except ValueError as error:
        assert all(str(w) in str(error) for w in words), f"{error} lacks one of {words}"
    else:
        raise AssertionError(f"expected a ValueError with {words}")


@functools.cache
def folder():
    """The folder of all that the tests write; it goes when the process ends."""
    return tempfile.TemporaryDirectory()


def read(name):
    """The text of a file, from the folder of the scripts."""
    with open(os.path.join(HERE, name), encoding="utf-8") as f:
        return f.read()


def tmp(*names):
    """A path in that folder."""
    return os.path.join(folder().name, *names)


# ---------------------------------------------------------------- models

def small(**kw):
    """A tiny VideoMAE with random biases and norms, so that no term is hidden by a zero."""
    torch.manual_seed(0)
    model = VideoMAE(**(dict(size="tiny", num_frames=4, img_size=(16, 24), patch_size=8) | kw))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def clips(model, batch=2, frames=None):
    """(batch, T, H, W, 3) uint8 noise of the model's size, always the same."""
    t, h, w = (g * c for g, c in zip(model.grid, model.cube))
    g = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, frames or t, h, w, 3), dtype=torch.uint8, generator=g)


def mask_for(model, batch=2, ratio=0.5, kind="tube"):
    """(batch, N) bool, always the same."""
    return masking.make_mask(kind, batch, model.grid, ratio, torch.Generator().manual_seed(2))


def saved(name, obj):
    """Path of a new file that torch.save has written."""
    path = os.path.join(tempfile.mkdtemp(dir=tmp()), name)
    torch.save(obj, path)
    return path


def released_vit(seed: int, **more) -> dict:
    """A random state dict in MAE's released layout: width 128, 4 blocks, patch 8, grid 4x4."""
    torch.manual_seed(seed)
    shapes = {"cls_token": (1, 1, 128), "pos_embed": (1, 17, 128),
              "patch_embed.proj.weight": (128, 3, 8, 8), "patch_embed.proj.bias": (128,),
              "norm.weight": (128,), "norm.bias": (128,)}
    for i in range(4):
        for name, shape in {"norm1": (128,), "norm2": (128,), "attn.qkv": (384, 128),
                            "attn.proj": (128, 128), "mlp.fc1": (512, 128),
                            "mlp.fc2": (128, 512)}.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    return {k: torch.randn(shape) * 0.2 for k, shape in (shapes | more).items()}


def difference(a, b):
    """The largest difference of two state dicts."""
    return max((a[k] - b[k]).abs().max().item() for k in a)


# ---------------------------------------------------------------- videos

def numbered(n=40, h=64, w=96):
    """Frames that show their number in 8 black and white blocks beside moving noise: real GOPs."""
    rng, frames = np.random.default_rng(0), np.full((n, h, w, 3), 128, np.uint8)
    size = (h // 8 + 1, max(w * 4, 2 * n + w), 3)
    noise = rng.integers(0, 255, size, dtype=np.uint8).repeat(8, 0)[:h]
    for i in range(n):
        frames[i, :, w // 2:] = noise[:, 2 * i:2 * i + w - w // 2]
        for bit in range(8):
            y, x = bit // 4 * h // 2, bit % 4 * w // 8
            frames[i, y:y + h // 2, x:x + w // 8] = 255 * (i >> bit & 1)
    return frames


def numbers(frames):
    """Reads the numbers back."""
    h, w = frames.shape[1:3]
    bits = [frames[:, bit // 4 * h // 2 + h // 4, bit % 4 * w // 8 + w // 16].mean(-1) > 128
            for bit in range(8)]
    return sum(b.astype(int) << k for k, b in enumerate(bits))


def write(name, frames, codec="libx264", pix_fmt="yuv420p", pts=None, container={}, **options):
    """Like pictures.write_video, with any codec and any time stamps (in 1/1000 s)."""
    path = tmp(name)
    with av.open(path, "w", options=container) as out:
        options = {k.replace("_", "-"): str(v) for k, v in options.items()}
        stream = out.add_stream(codec, rate=25, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pix_fmt
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i, frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(frame, "rgb24").reformat(format=pix_fmt)
            if pts is not None:
                frame.pts, frame.time_base = int(pts[i]), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


@functools.cache
def odd_files():
    """{kind: path} of files with the same 40 numbered frames."""
    f, regular = numbered(), 5000 + 40 * np.arange(40)
    uneven = np.cumsum(np.random.default_rng(0).integers(10, 200, 40))
    ten_bit = dict(codec="libx265", pix_fmt="yuv420p10le", x265_params="log-level=error")
    vp8 = dict(codec="libvpx", auto_alt_ref=1, lag_in_frames=16)
    vp9 = dict(codec="libvpx-vp9", lag_in_frames=16, cpu_used=8)
    mpeg4 = dict(codec="mpeg4", qscale=2, flags="+qscale")
    return {
        "B-frames, pyramid, long GOP": write("bframes.mp4", f, g=250, bf=3),
        "short GOP, open": write("open.mkv", f, g=10, bf=3, x264_params="open-gop=1:scenecut=0"),
        "no B-frames": write("plain.mp4", f, bf=0, g=12),
        "non-zero start": write("start.mkv", f, pts=regular, bf=2, g=12),
        "variable rate": write("vfr.mkv", f, pts=uneven, bf=2, g=12),
        "AVI with B-frames": write("b.avi", f, bf=2, g=12, **mpeg4),
        "H.264 with B-frames in AVI": write("h264.avi", f, bf=2, g=12),
        "MPEG transport stream": write("x.ts", f, bf=2, g=12),
        "MPEG-2": write("x.mpg", f, codec="mpeg2video", bf=2, g=12, b=4000000),
        "4:4:4": write("444.mp4", f, pix_fmt="yuv444p", g=12),
        "10 bit": write("10.mp4", f, g=12, **ten_bit),
        "MJPEG, no key frame structure": write("mj.avi", f, codec="mjpeg", pix_fmt="yuvj420p"),
        "odd size": write("odd.mp4", numbered(40, 63, 97), pix_fmt="yuv444p", g=12),
        "VP8 with hidden frames": write("vp8.webm", f, b=2000000, g=20, **vp8),
        "VP9": write("vp9.webm", f, b=2000000, g=20, **vp9),
        "GIF": write("x.gif", f, codec="gif", pix_fmt="rgb8"),
    }


@functools.cache
def toy_videos(n=12):
    """A folder of n toy videos."""
    os.makedirs(tmp("toy_videos"))
    for i in range(n):
        clip = toy.toy_clip(np.random.default_rng(i), i % 8)
        pictures.write_video(tmp("toy_videos", f"{i}.mp4"), clip, g=8)
    return tmp("toy_videos")


@functools.cache
def labelled():
    """A list of 12 toy videos in 3 classes, and one of 5 for validation."""
    lists = []
    for name, ids in (("train", range(12)), ("val", (0, 1, 2, 4, 8))):
        rows = [f"{toy_videos()}/{i}.mp4\t{'xyz'[i % 3]} class\n" for i in ids]
        lists.append(tmp(f"tune_{name}.tsv"))
        open(lists[-1], "w").writelines(rows)
    return lists


@functools.cache
def tiny_ava():
    """An AVA set of 4 movies of 5 s, two boxes a second; movie d is cut off, e does not exist."""
    os.makedirs(tmp("ava", "movies"))
    rng = np.random.default_rng(0)
    for k, name in enumerate("abcd"):
        frames = rng.integers(0, 255, (60, 8, 12, 3), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
        path = tmp("ava", "movies", f"{name}.mp4")
        pictures.write_video(path, frames, fps=12, g=12 + k, bf=2)
    os.truncate(path, os.path.getsize(path) - 2000)
    rows = []
    for video in "abcde":
        for second in (1, 2, 3):
            found = [(".1,.1,.5,.8", 1 + second % 2)]
            if second < 3:
                found += [(".4,.2,.9,.9", 3), (".4,.2,.9,.9", 1)]
            rows += [f"{video},{second:04d},{box},{action},7\n" for box, action in found]
    for name, videos in (("train", "abc"), ("val", "abde")):
        open(tmp("ava", f"{name}.csv"), "w").writelines(r for r in rows if r[0] in videos)
    return tmp("ava")


# ---------------------------------------------------------------- addresses

def need_http():
    """Skips a test where what reads http:// is not installed; fsspec itself comes with torch."""
    if not all(map(importlib.util.find_spec, ("fsspec", "aiohttp", "requests"))):
        raise Skip("pip install aiohttp requests to read http:// addresses")


class Server(http.server.SimpleHTTPRequestHandler):
    """Files of tmp() over HTTP, byte ranges too; some of its answers break off."""

    ranges, fails, sent, requests, absent = True, 0, 0, 0, 404

    def log_message(self, *args):
        pass

    def do_GET(self):
        cls, path = type(self), self.translate_path(self.path)
        cls.requests += 1
        if not os.path.isfile(path):
            return self.send_error(cls.absent)
        total = os.path.getsize(path)
        first, last = 0, total - 1
        wanted = self.headers.get("Range") if cls.ranges else None
        self.send_response(206 if wanted else 200)
        if wanted:
            first, last = map(int, wanted.removeprefix("bytes=").split("-"))
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        with open(path, "rb") as f:
            f.seek(first)
            data = f.read(last + 1 - first)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if cls.fails:
            cls.fails -= 1
            data = data[:len(data) // 2]
            self.close_connection = True
        cls.sent += len(data)
        self.wfile.write(data)


@functools.cache
def server():
    """The class of a server's requests and its address."""
    kind = type("OneServer", (Server,), {})
    listens = http.server.ThreadingHTTPServer(("127.0.0.1", 0),
                                              functools.partial(kind, directory=tmp()))
    threading.Thread(target=listens.serve_forever, daemon=True).start()
    return kind, f"http://127.0.0.1:{listens.server_port}"


@contextlib.contextmanager
def answers(**how):
    """Context: the server answers so -> its class, which counts."""
    kind, _ = server()
    with unittest.mock.patch.multiple(kind, **dict(sent=0, requests=0, fails=0) | how):
        yield kind


# ---------------------------------------------------------------- scripts

def start(script, *args, ranks=None, cwd=None):
    """Starts a script, on torchrun ranks if told (with more of its flags); its output is a pipe."""
    command = [sys.executable]
    if ranks:
        command += f"-m torch.distributed.run --standalone --nproc_per_node {ranks}".split()
    command += [os.path.join(HERE, script), *map(str, args)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            cwd=cwd or tmp(), env=os.environ | {"OMP_NUM_THREADS": "1"})


def children(pid):
    """Process ids of a process's children: from /proc, or from pgrep where there is none."""
    if not os.path.exists("/proc/self/stat"):
        listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True)
        return [int(p) for p in listed.stdout.split()]
    found = []
    for other in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it may have ended
            if int(open(f"/proc/{other}/stat").read().rpartition(")")[2].split()[1]) == pid:
                found.append(int(other))
    return found


def kill_tree(pid):
    """SIGKILL to a process and all below it: torchrun puts each rank into a session of its own."""
    below = children(pid)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in below:
        kill_tree(child)


def run(script, *args, ok=True, **kw):
    """Runs a script to its end; returns its output."""
    out = start(script, *args, **kw)
    out.stdout = out.communicate()[0]
    assert (out.returncode == 0) == ok, f"exit status {out.returncode}\n{out.stdout[-3000:]}"
    return out.stdout


def module_of(script):
    """The module that has the main() of a script."""
    return importlib.import_module({"data.py": "video.tools"}.get(script, script[:-len(".py")]))


@contextlib.contextmanager
def as_script(module, *args):
    """Context: this process's arguments are those of a script -> what is printed meanwhile."""
    argv, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, args)]
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            yield out
    finally:
        sys.argv = argv
        for s, handler in handlers.items():
            signal.signal(s, handler)


@functools.cache
def flags_of(script, *command):
    """The flags that `python SCRIPT [command] --help` lists, without their two dashes."""
    module = module_of(script)
    with contextlib.suppress(SystemExit), as_script(module, *command, "--help") as out:
        module.main()
    heads = re.findall(r"^  (-.*?)(?:  |$)", out.getvalue(), re.M)  # two spaces, a flag
    return {flag for head in heads for flag in re.findall(r"--(\w[\w-]*)", head)}


def call(module, *args):
    """Runs a script's main() in this process -> what it printed; the exit status has to be 0."""
    with as_script(module, *args) as out:
        status = module.main()
    assert not status, f"exit status {status}: {out.getvalue()}"
    return out.getvalue()


def mistake(module, *args):
    """Runs a script's main() in this process -> the error message that a user would see."""
    try:
        with as_script(module, *args) as out:
            module.main()
    except (ValueError, OSError) as e:
        return str(e)
    except SystemExit as e:
        assert e.code, out.getvalue()
        return out.getvalue()
    raise AssertionError(f"no error: {out.getvalue()}")


# ---------------------------------------------------------------- runs

# six steps of fine-tuning on tune_data(), of probes on probe_data(), of detection on ava_data()
TUNE = """--size tiny --num_frames 4 --img_size 16 --patch_size 8 --sampling_rate 1 --dtype fp32
    --max_steps 6 --epochs 2 --warmup_epochs 0.5 --lr 0.05 --log_every 1 --num_workers 0
    --device cpu --eval_every 1 --batch_size 4""".split()
PROBE = """--num_frames 4 --img_size 16 --sampling_rate 1 --dtype fp32 --max_steps 6 --epochs 2
    --lr 0.05 --log_every 1 --num_workers 0 --device cpu --eval_every 1 --batch_size 4
    --num_segments 2 --probe_lr 0.005 0.02 --probe_wd 0.01 0.5""".split()
DETECT = """--size tiny --num_frames 4 --img_size 24 --short_side 32 --patch_size 8 --dtype fp32
    --sampling_rate 3 --max_steps 6 --lr 0.05 --log_every 1 --num_workers 0 --device cpu
    --batch_size 4 --max_bad 1""".split()


def tune_data():
    """What TUNE goes with."""
    train, val = labelled()
    return ["--data", train, "--val_data", val]


@functools.cache
def pretrained():
    """The path of a random tiny encoder, shaped as TUNE and PROBE want it."""
    torch.manual_seed(1)
    model = VideoMAE("tiny", num_frames=4, img_size=16, patch_size=8)
    return saved("init.pt", dict(model=model.state_dict(), config=model.config))


def probe_data():
    """What PROBE goes with."""
    return [*tune_data(), "--init", pretrained()]


def ava_data():
    """What DETECT goes with."""
    root = tiny_ava()
    return ["--data", f"{root}/train.csv", "--val_data", f"{root}/val.csv",
            "--data_root", f"{root}/movies"]


def log_rows(folder):
    """The rows of a run's log.jsonl."""
    with open(os.path.join(folder, "log.jsonl")) as f:
        return [json.loads(row) for row in f]


def checkpoint(folder, name="last.pt"):
    """What a run has saved."""
    return torch.load(os.path.join(folder, name), weights_only=True)
