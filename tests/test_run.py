"""lib/process.py, lib/optim.py, lib/run.py, and what every stage has to do: a table of stages."""

import ast
import contextlib
import functools
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
import unittest.mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import finetune
import lib.run
import pretrain
import pretrain_moco
import weights
from lib.optim import load_optimizer, lr_at
from lib.process import best_dtype, script_main
from lib.run import Run
from tests.common import (DETECT, HERE, PROBE, TUNE, Skip, as_script, ava_data, call, checkpoint,
                          children, clips, difference, flags_of, kill_tree, labelled, log_rows,
                          mask_for, mistake, module_of, probe_data, raises, read, run, small, start,
                          test, test_each, tmp, toy_videos, tune_data)


# ---------------------------------------------------------------- the table of stages

TINY = """--size tiny --patch_size 8 --img_size 16 --dtype fp32 --max_steps 6 --lr 0.02
    --log_every 1 --epochs 4 --warmup_epochs 1 --num_workers 0 --device cpu""".split()
CONTRAST = [*TINY, *"--proj_width 32 --proj_dim 8 --batch_size 8".split()]

# A fork's stage gets all the tests of this file by a row of its own:
# flags    a run of 6 steps, with all that is drawn at random
# data     a function that gives the flags of the data
# plain    flags that turn off what is drawn per rank
# close    the largest difference of weights on 2 ranks, and of figures in log.jsonl
# accum    whether accumulation equals a bigger batch; if not: what --resume says has changed
# model    a flag that makes it another model, and how the message names it
# writes   what a run of one step leaves in out_dir, beside last.pt and log.jsonl
# wrong    more flags that are refused, and words of the message
STAGES = {
    "pretrain.py": dict(
        flags=[*TINY, *"--num_frames 4 --sampling_rate 1 --mask_ratio 0.5 --batch_size 4".split()],
        data=lambda: ["--data", toy_videos()],
        plain="",
        close=(2e-5, dict(loss=1e-5, lr=0)),
        accum=True,
        model=("--decoder_depth 1", "decoder_depth None -> 1"),
        writes={"vis_0000001.png"},
        wrong=[("--mask_ratio 1.2", "mask_ratio", "1.2"), ("--img_size 20", "img_size=20")]),
    "pretrain_vicmae.py": dict(
        flags=[*CONTRAST, *"""--decoder_depth 1 --decoder_width 96 --decoder_heads 3 --gap_frames 4
            --mask_ratio 0.5 --con_weight 1 --con_ramp 1""".split()],
        data=lambda: ["--data", toy_videos(), "--images", toy_videos()],
        plain="",
        close=(5e-5, dict(loss=1e-4, chance=0)),
        accum="contrasted 8 -> 4",  # other negatives: not the same run
        model=("--decoder_depth 2", "decoder_depth 1 -> 2"),
        writes={"vis_0000001.png"},
        wrong=[("--mask_ratio 0", "mask_ratio"), ("--decoder_width 97", "--decoder_width 97")]),
    "pretrain_moco.py": dict(
        flags=[*CONTRAST, *"--num_frames 4 --sampling_rate 1".split()],
        data=lambda: ["--data", toy_videos()],
        plain="",
        close=(5e-5, dict(loss=1e-4, chance=0)),
        accum="contrasted 8 -> 4",
        model=("--proj_dim 4", "proj_dim 8 -> 4"),
        writes=set(),
        wrong=[("--momentum 1.5", "--momentum 1.5"), ("--temperature 0", "--temperature 0")]),
    "finetune.py": dict(
        flags=[*TUNE, *"--drop_path 0.3 --head_dropout 0.3 --ema 0.8 --repeat_aug 2".split()],
        data=tune_data,
        plain="""--mixup 0 --cutmix 0 --drop_path 0 --reprob 0 --head_dropout 0 --ema 0
            --repeat_aug 1""",
        close=(2e-5, dict(loss=1e-4, val_top1=1e-4, val_loss=1e-4, val_videos=0)),
        accum=True,
        model=("--tubelet_size 1", "tubelet_size None -> 1"),
        writes={"best.pt"},
        wrong=[("--drop_path 1", "--drop_path 1"), ("--smoothing 1", "--smoothing 1")]),
    "probe.py": dict(
        flags=PROBE,
        data=probe_data,
        plain="",
        close=(5e-5, dict(loss=1e-4, val_top1=1e-4, val_loss=1e-4, choose_loss=1e-4, chosen=0)),
        accum=True,
        model=("--img_size 24", "img_size 16 -> 24"),
        writes={"best.pt"},
        wrong=[("--choose_on 1", "--choose_on 1"), ("--probe_lr 0.1 nan", "--probe_lr nan"),
               ("--init absent.pth", "absent.pth")]),
    "detect_ava.py": dict(
        flags=[*DETECT, "--drop_path", "0.3"],
        data=ava_data,
        plain="--drop_path 0",
        close=(2e-5, dict(loss=1e-5)),
        accum=True,
        model=("--tubelet_size 1", "tubelet_size None -> 1"),
        writes={"detections.csv", "best.pt", "bad_videos.txt"},
        wrong=[("--drop_path 1", "--drop_path 1"), ("--box_score 2", "--box_score 2")]),
}
CLOCKS = ("clips_per_s", "waiting", "memory_gb", "seconds_left")  # of a row in log.jsonl


def stage_args(script, out, *more):
    """The flags of a run of a few steps in the folder `out`; later ones win."""
    stage = STAGES[script]
    return [*stage["flags"], *stage["data"](), "--out_dir", out, *more]


def batch_size(script):
    """That of these flags."""
    flags = STAGES[script]["flags"]
    return int(flags[flags.index("--batch_size") + 1])


@functools.cache
def whole(script):
    """The folder of a run that nothing interrupts."""
    out = tmp(f"whole_{script}")
    call(module_of(script), *stage_args(script, out))
    return out


@functools.cache
def killed(script, ranks=None):
    """The folder of a run that SIGKILL has ended after 3 to 5 of 6 steps."""
    out, last_step = tmp(f"killed_{script}_{ranks}"), random.randint(3, 5)
    size = batch_size(script) // (ranks or 1)
    process = start(script, *stage_args(script, out, "--save_every", 2, "--num_workers", 2,
                                        "--batch_size", size), ranks=ranks)
    for line in process.stdout:
        if line.startswith(f"step {last_step}/"):
            kill_tree(process.pid)
            break
    text = process.communicate()[0]
    assert os.path.exists(os.path.join(out, "last.pt")), text
    return out


def copied(folder, name):
    """A copy of a run's folder, to go on in or to spoil."""
    return shutil.copytree(folder, tmp(name))


def files(folder):
    """{path: bytes} of all files of a folder."""
    found = {}
    for where, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(where, name), "rb") as f:
                found[os.path.relpath(f.name, folder)] = f.read()
    return found


def results(folder):
    """{file: content} of a run, without what the clock says and where and how often it saved."""
    found = files(folder)
    for name in found:
        if name.endswith(".pt"):
            found[name] = checkpoint(folder, name)
            for flag in ("out_dir", "num_workers", "save_every"):
                del found[name]["args"][flag]
    rows = log_rows(folder)
    found["log.jsonl"] = [{k: v for k, v in row.items() if k not in CLOCKS} for row in rows]
    return found


def assert_same(a, b, where):
    """Two nested things are the same to the last bit; if not, the first that differs is named."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {a.keys() ^ b.keys()} in one of them only"
        for key in a:
            assert_same(a[key], b[key], f"{where} {key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), f"{where}: {len(a)} and {len(b)} of them"
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where} {i}")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), f"{where}: a difference of up to {(a - b).abs().max()}"
    else:
        assert a == b, f"{where}: {str(a)[:80]} and {str(b)[:80]}"


# ---------------------------------------------------------------- lib/process.py, lib/optim.py

@test
def test_default_dtype():
    """--dtype is bf16 where the hardware has it: AVX-512 on an x86 CPU, Ampere on a GPU."""
    name, about = best_dtype(torch.device("cpu")), ""
    if os.path.exists("/proc/cpuinfo"):
        about = open("/proc/cpuinfo").read().split()
    if "avx2" in about:
        assert name == ("bf16" if "avx512bw" in about else "fp32"), name
    before_ampere = lambda including_emulation: False
    with unittest.mock.patch.object(torch.cuda, "is_bf16_supported", before_ampere):
        assert best_dtype(torch.device("cuda")) == "fp16"


@test
def test_help_shows_defaults():
    """--help gives the default of a flag unless it is none or its help tells it; 0 is one."""
    with contextlib.suppress(SystemExit), as_script(pretrain_moco, "--help") as out:
        pretrain_moco.main()
    text = out.getvalue()
    for line in ("--min_lr .*default: 0.0", "--epochs .*default: 300", "--seed .*default: 0"):
        assert re.search(line, text), line
    assert "default: None" not in text and "default: False" not in text


@test
def test_what_a_run_says_first():
    """A peak lr too low to learn at, with the --lr that is not; the time of a large toy model."""
    said, model = [], small()
    for lr, low in (("1.5e-4", True), ("1e-2", False)):  # per 256, at a batch of 8
        run = Run(pretrain.get_args(["--batch_size", "8", "--lr", lr, "--out_dir", tmp("said")]))
        run.plan(64, 2)
        text = run.summary("videos")
        assert ("the peak lr is low" in text and "--lr 0.0096" in text) == low, text
    run.say, run.net = lambda text, **_: said.append(text), model
    run.warn_of_toys("base", lambda: model(clips(model, 1), mask_for(model, 1))[0])
    assert "size base" in said[0] and "--toy" in said[0], said
    assert f"{2 * 800 * 64} clips take about" in said[1], said
    assert all(p.grad is None for p in model.parameters())


@test
def test_an_hour():
    """--hour sets steps unless --epochs are given; other flags win; --toy is another preset."""
    for module, steps in ((pretrain, 1200), (finetune, 400)):
        args = module.get_args(["--hour", "cpu"])
        assert (args.max_steps, args.size, args.img_size) == (steps, "small", 112)
        args = module.get_args(["--hour", "cpu", "--epochs", "300", "--img_size", "64"])
        assert (args.max_steps, args.epochs, args.img_size) == (None, 300, 64)
        assert module.get_args(["--hour", "gpu"]).max_steps > steps
        assert "one of them" in mistake(module, "--hour", "gpu", "--toy")
    assert finetune.get_args(["--hour", "cpu", "--init", "x"]).size is None


@test
def test_lr_schedule():
    """0 at first, the peak after the warm-up, half way in the middle, the floor at the end."""
    lr = [lr_at(s, 1.0, 0.1, 10, 110) for s in range(111)]
    assert lr[0] == 0 and lr[5] == 0.5 and lr[10] == 1
    assert abs(lr[60] - 0.55) < 1e-12 and abs(lr[110] - 0.1) < 1e-12
    assert lr[:11] == sorted(lr[:11]) and lr[10:] == sorted(lr[10:], reverse=True)
    # the paper's code: as docs/methods.md says, at the peak a step earlier
    theirs = torch.linspace(0, 1, 10, dtype=torch.float64)
    ours = lambda warmup: torch.tensor([lr_at(s, 1.0, 0.1, warmup, 110) for s in range(10)])
    assert torch.allclose(theirs.float(), ours(9)) and abs((theirs - ours(10)).max() - 0.1) < 1e-6
    assert "its last warm-up step has the peak" in read("docs/methods.md")


@test
def test_nonfinite_steps_are_skipped_on_the_device():
    """The fused AdamW leaves weights and moments alone when found_inf is set."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
    p.grad = torch.ones(3)
    optimizer.found_inf = torch.zeros(())
    optimizer.step()
    before, state = p.detach().clone(), {k: v.clone() for k, v in optimizer.state[p].items()}
    p.grad = torch.full((3,), float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(p, before)
    assert all(torch.equal(v, state[k]) for k, v in optimizer.state[p].items())


# ---------------------------------------------------------------- lib/run.py

@test
def test_any_optimizer_skips_nonfinite_steps():
    """One NaN gradient under fused and unfused optimisers: the step is left out and counted."""
    fused = functools.partial(torch.optim.AdamW, fused=True)
    unfused = functools.partial(torch.optim.AdamW, foreach=True)
    for n, make in enumerate((fused, unfused, torch.optim.NAdam, torch.optim.SGD)):
        out = tmp(f"optimizer_{n}")
        args = pretrain.get_args([*map(str, TINY), "--max_steps", "3", "--out_dir", out])
        with as_script(pretrain):
            stage = Run(args)
            stage.plan(4)
            stage.resume({})
            model = torch.nn.Linear(3, 1)
            stage.start(model, make(model.parameters(), lr=0.1), [None] * 4)
            for step in stage.steps():
                before = {k: v.clone() for k, v in model.state_dict().items()}
                model(torch.ones(2, 3)).sum().backward()
                if step == 1:
                    model.weight.grad[0, 0] = float("nan")
                stage.update()
                change = difference(before, model.state_dict())
                assert change == 0 if step == 1 else change > 0.01, (make, step, change)
                assert int(stage.skipped) == (step > 0)
            stage.save(model=model.state_dict(), config={})
            stage.end()
        state = checkpoint(out)
        tensors = [x for x in torch.utils._pytree.tree_leaves(state) if torch.is_tensor(x)]
        assert len(tensors) >= 2 and all(torch.isfinite(x).all() for x in tensors), make


@test
def test_nonfinite_runs_stop_and_keep_their_checkpoint():
    """Steps with NaN gradients are skipped and counted; 20 in a row stop the run and say where."""
    out = tmp("nan")
    text = run("pretrain.py", *stage_args("pretrain.py", out, "--lr", 1e9, "--max_steps", 40,
                                          "--save_every", 1), ok=False)
    assert "20 steps in a row with a non-finite gradient, at step" in text and "lr " in text
    assert "Traceback" not in text
    rows = log_rows(out)
    assert any(row["loss"] is None for row in rows) and not any(row["loss"] == 0 for row in rows)
    assert rows[0]["skipped_steps"] == 0 and rows[-1]["skipped_steps"] >= 20
    assert all(torch.isfinite(v).all() for v in checkpoint(out)["model"].values())


@test_each(STAGES)
def test_killed_and_resumed_is_bit_identical(script):
    """SIGKILL at a random step, resume with other workers: every file as if nothing had been."""
    out = copied(killed(script), f"again_{script}")
    text = call(module_of(script), *stage_args(script, out, "--num_workers", 1))
    assert "resumed" in text and "step 6/6" in text, text
    assert_same(results(out), results(whole(script)), script)
    steps = [row["step"] for row in log_rows(out) if "lr" in row]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert all("loss" in row for row in log_rows(out) if "lr" in row)


COMPILED = """
import functools, sys, torch
from torch._dynamo.testing import CompileCounterWithBackend
from tests.common import call, module_of
counter = CompileCounterWithBackend("aot_eager")  # the same kernels as without: equal results
torch.compile = functools.partial(torch.compile, backend=counter)
call(module_of(sys.argv[1]), *sys.argv[2:], "--compile")
print("graphs:", counter.frame_count)
"""


@test_each(STAGES)
def test_compiled_once(script):
    """--compile: one graph without a break for 20 steps and the tests between; equal losses."""
    out = tmp(f"compiled_{script}"), tmp(f"eager_{script}")
    tested = "best.pt" in STAGES[script]["writes"]
    more = ["--max_steps", 20, *STAGES[script]["plain"].split(), *["--eval_every", 2] * tested]
    args, eager = (stage_args(script, folder, *more) for folder in out)
    # in a process of its own: what earlier tests have met would not be met while tracing
    command = [sys.executable, "-c", COMPILED, script, *map(str, args)]
    threads = dict(OMP_NUM_THREADS=str(torch.get_num_threads()))  # sums in the same order
    text = subprocess.run(command, cwd=HERE, capture_output=True, text=True,
                          env=os.environ | threads)
    assert text.stdout.endswith("graphs: 1\n"), (text.stdout, text.stderr[-3000:])
    call(module_of(script), *eager)
    pairs = list(zip(*map(log_rows, out), strict=True))
    assert sum("lr" in a for a, _ in pairs) == 20
    assert all(abs(a["loss"] - b["loss"]) < 1e-5 for a, b in pairs if "lr" in a)
    assert tested == any("lr" not in a for a, _ in pairs[:-1])


class Waits(TorchDispatchMode):
    """Notes which lines would have the host wait for a GPU: a value read, a constant copied."""

    def __init__(self):
        super().__init__()
        self.lines = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        waits = name in ("_local_scalar_dense", "lift_fresh", "nonzero", "masked_select")
        waits |= name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in ("index", "index_put", "index_put_"):  # by a mask: its nonzero places
            waits |= any(i is not None and i.dtype == torch.bool for i in args[1])
        if waits or name == "where":
            ours = [f for f in traceback.extract_stack() if f.filename.startswith(HERE)
                    and "site-packages" not in f.filename]  # an environment may lie in here
            line = ours[-2].line
            if name == "where":  # has a number copied; autograd's own makes it on the device
                waits = "where(" in line and any(x.ndim == 0 for x in args[1:])
            if waits and "stopping" not in line:  # the signal's number stays on the host
                self.lines.add(f"{name}: {line}")
        return func(*args, **kwargs)


def watched(script, out, begin, end, *more):
    """A run of the stage: begin() before each step and end() after its update, before its log."""
    def steps(run):
        for step in whole_steps(run):
            begin()
            yield step

    def update(run, *args, **kwargs):
        whole_update(run, *args, **kwargs)
        end()
    whole_steps, whole_update = Run.steps, Run.update
    if script == "pretrain.py":
        more += "--decoder_mask_ratio", 0.5
    with unittest.mock.patch.multiple(Run, steps=steps, update=update):
        call(module_of(script), *stage_args(script, out, "--num_workers", 1, *more))


@test_each(STAGES)
def test_no_step_waits(script):
    """Within a step nothing is read from the device, no constant is built for it on the host."""
    waits = Waits()
    end = lambda: waits.__exit__(None, None, None)
    watched(script, tmp(f"waits_{script}"), waits.__enter__, end)
    assert not waits.lines, waits.lines


@test_each(STAGES)
def test_no_step_waits_on_a_gpu(script):
    """Within a step, masks, data, augmentation and update included, the host waits for no GPU."""
    if not torch.cuda.is_available():
        raise Skip("no GPU here")
    mode = lambda name: lambda: torch.cuda.set_sync_debug_mode(name)
    for dtype in ("bf16", "fp16"):
        out = tmp(f"gpu_{script}_{dtype}")  # a wait is an error of torch's
        watched(script, out, mode("error"), mode("default"), "--device", "cuda", "--dtype", dtype)
        assert checkpoint(out)["step"] == 6, dtype


@test
def test_finetuning_keeps_its_best_and_averages():
    """best.pt has the best epoch's averaged weights and the classes; a resume knows how good."""
    out = whole("finetune.py")
    last, best = checkpoint(out), checkpoint(out, "best.pt")
    assert difference(last["model"], last["ema"]) > 0
    validations = [row for row in log_rows(out) if "val_top1" in row]
    assert [row["step"] for row in validations] == [3, 6]
    assert all(row["val_videos"] == 5 for row in validations)
    assert best["best"] == last["best"] and best["step"] in (3, 6)
    assert best["step"] == 3 or difference(best["model"], last["ema"]) == 0
    about = weights.build_model(os.path.join(out, "best.pt"), verbose=False)[1]
    assert about["classes"] == ["x class", "y class", "z class"]
    out = copied(killed("finetune.py"), "best")
    torch.save(checkpoint(out) | dict(best=101.0), os.path.join(out, "last.pt"))
    before = files(out).get("best.pt")
    call(finetune, *stage_args("finetune.py", out))
    assert checkpoint(out)["best"] == 101  # no later epoch can beat it
    assert files(out).get("best.pt") == before


@test
def test_killed_and_resumed_on_two_ranks():
    """The same on 2 ranks, which both have data workers."""
    script = "pretrain.py"
    args = ["--batch_size", batch_size(script) // 2]
    undisturbed, out = tmp("whole_2"), killed(script, 2)
    run(script, *stage_args(script, undisturbed, *args), ranks=2)
    text = run(script, *stage_args(script, out, *args, "--num_workers", 1), ranks=2)
    assert "resumed" in text and "step 6/6" in text, text
    assert_same(results(out), results(undisturbed), script)


@test
def test_half_the_ranks_at_the_same_global_batch():
    """2 ranks are killed, one goes on: the weights of one all along, whatever is drawn."""
    args = ["--batch_size", batch_size("finetune.py") // 2, "--global_batch",
            batch_size("finetune.py")]
    alone, out = tmp("one_rank"), copied(killed("finetune.py", 2), "half")
    call(finetune, *stage_args("finetune.py", alone, *args))
    text = call(finetune, *stage_args("finetune.py", out, *args))
    assert "resumed" in text and "1 rank(s) x 2 videos x 2 = batch 4" in text, text
    assert difference(checkpoint(alone)["model"], checkpoint(out)["model"]) < 1e-5
    for more, words in ((["--global_batch", 5], ("--global_batch 5", "multiple of", "= 2")),
                        (["--accum_steps", 2], ("--accum_steps 2", "--global_batch"))):
        text = mistake(finetune, *stage_args("finetune.py", alone, *args, *more))
        assert all(word in text for word in words), text


@test
def test_a_killed_rank_comes_back():
    """SIGKILL of one of 2 ranks under --max_restarts: the weights of an undisturbed run."""
    half = batch_size("finetune.py") // 2
    args = ["--batch_size", half, "--global_batch", 2 * half, "--max_steps", 30, "--save_every", 2]
    alone, out = tmp("undisturbed"), tmp("restarted")
    call(finetune, *stage_args("finetune.py", alone, *args))
    # as docs/clusters.md says; without it new ranks may find addresses of dead ones
    with unittest.mock.patch.dict(os.environ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"):
        process = start("finetune.py", *stage_args("finetune.py", out, *args),
                        ranks="2 --max_restarts 1")
    for line in process.stdout:
        if line.startswith("step 5/"):
            os.kill(max(children(process.pid)), signal.SIGKILL)
            break
    try:
        text = process.communicate(timeout=300)[0]
    finally:
        kill_tree(process.pid)
    assert process.returncode == 0 and "resumed" in text and "step 30/30" in text, text
    assert difference(checkpoint(alone)["model"], checkpoint(out)["model"]) < 1e-5
    assert [row["step"] for row in log_rows(out) if "lr" in row] == [*range(1, 31)]


@test
def test_checkpoints_that_stay():
    """--keep_every leaves step_N.pt, from which a run goes on as the undisturbed one did."""
    out, again = tmp("kept"), tmp("kept_again")
    call(pretrain, *stage_args("pretrain.py", out, "--max_steps", 5, "--keep_every", 2))
    assert sorted(f for f in os.listdir(out) if f.startswith("step")) == [
        "step_0000002.pt", "step_0000004.pt"]
    os.makedirs(again)
    shutil.copy(os.path.join(out, "step_0000002.pt"), os.path.join(again, "last.pt"))
    assert "resumed" in call(pretrain, *stage_args("pretrain.py", again, "--max_steps", 5))
    assert difference(checkpoint(out)["model"], checkpoint(again)["model"]) == 0


@test
def test_saved_by_time_and_in_the_background():
    """A save per --save_minutes is what the model was, while training goes on; errors are told."""
    out, found, write = tmp("minutes"), {}, lib.run.write_whole

    def slow(path, state):
        time.sleep(0.2)  # some steps
        found[state["step"]] = state["model"]
        write(path, state)
    args = ["--save_minutes", 1e-3, "--max_steps", 40, "--log_every", 40, "--vis_every", "never"]
    with unittest.mock.patch.object(lib.run, "write_whole", slow):
        call(pretrain, *stage_args("pretrain.py", out, *args))
    early = sorted(found)[1]  # the first is waited for
    assert early < 40 and max(found) == 40, [*found]
    assert not any(name.startswith("vis_") for name in os.listdir(out))  # never
    assert difference(found[40], checkpoint(out)["model"]) == 0
    again = tmp("minutes_again")
    with unittest.mock.patch.object(Run, "due_to_save", lambda run: run.step == early):
        call(pretrain, *stage_args("pretrain.py", again, *args))
    assert difference(found[early], checkpoint(again)["model"]) == 0
    drawn, args[-1] = tmp("minutes_drawn"), 1000
    with unittest.mock.patch.object(Run, "save", lambda run, **state: saved.append(run.step)):
        saved = []
        call(pretrain, *stage_args("pretrain.py", drawn, *args, "--max_steps", 2,
                                  "--save_minutes", 1e-9))
    assert saved == [1, 2]  # never saved, so it is always due
    assert {"vis_0000001.png", "vis_0000002.png"} < {*os.listdir(drawn)}
    full = OSError(28, "No space left on device", "last.pt")
    with unittest.mock.patch.object(lib.run, "write_whole", side_effect=full):
        text = mistake(pretrain, *stage_args("pretrain.py", tmp("full"), *args))
    assert "No space left" in text, text


@test
def test_out_dir_is_one_folder():
    """A rank that does not see rank 0's file in out_dir is named at the start; none is left."""
    stage = Run(pretrain.get_args(["--device", "cpu", "--out_dir", tmp("shared")]))
    stage.world, stage.gather = 2, lambda thing: [thing, thing]
    stage.one_folder()
    stage.rank, others = 1, [".elsewhere"]  # its file
    stage.gather = lambda thing: [*others, thing] if isinstance(thing, str) else [thing]
    with raises(tmp("shared"), "not the same folder", platform.node()):
        stage.one_folder(0.1)
    assert not os.listdir(tmp("shared"))


@test_each(STAGES)
def test_ranks_and_accumulation_equal_a_bigger_batch(script):
    """2 ranks, and 2 accumulated batches, give the weights and figures of one bigger batch."""
    stage, batch = STAGES[script], batch_size(script)
    close, figures = stage["close"]
    one, two, summed = (tmp(f"{name}_{script}") for name in ("one", "two", "summed"))
    plain, half = stage["plain"].split(), ["--batch_size", batch // 2]
    call(module_of(script), *stage_args(script, one, *plain))
    run(script, *stage_args(script, two, *plain, *half), ranks=2)
    others = [two]
    half += ["--accum_steps", 2]
    if stage["accum"] is True:
        call(module_of(script), *stage_args(script, summed, *plain, *half))
        others.append(summed)
    else:
        text = call(module_of(script), *stage_args(script, one, *plain, *half, "--resume"))
        assert stage["accum"] in text, text
    wanted = checkpoint(one)["model"]
    for other in others:
        found = checkpoint(other)["model"]
        far = max((difference({k: wanted[k]}, {k: found[k]}), k) for k in wanted)
        assert far[0] < close, far
        for a, b in zip(log_rows(one), log_rows(other), strict=True):
            assert a["step"] == b["step"] and a.keys() == b.keys()
            for name, allowed in figures.items():
                assert name not in a or abs(a[name] - b[name]) <= allowed, (name, a, b)
        assert all(any(name in row for row in log_rows(one)) for name in figures)


@test_each(STAGES)
def test_signal_saves_and_other_runs_are_kept(script):
    """SIGTERM saves; another run is refused, or set aside by --no-resume."""
    stage, out = STAGES[script], tmp(f"signal_{script}")
    long = stage_args(script, out, "--max_steps", 1000, "--num_workers", 1)
    process = start(script, *long)
    for line in process.stdout:
        if line.startswith("step 2/"):
            for pid in (*children(process.pid), process.pid):  # a scheduler signals them all
                os.kill(pid, signal.SIGTERM)
            break
    rest = process.communicate()[0]
    step, lr = checkpoint(out)["step"], stage["flags"][stage["flags"].index("--lr") + 1]
    assert f"saved {out}/last.pt at step {step}" in rest and 2 <= step < 1000, rest
    assert process.returncode == 128 + signal.SIGTERM
    before = files(out)
    text = mistake(module_of(script), *long, "--lr", 0.01)
    assert "unfinished run" in text and f"lr {lr} -> 0.01" in text, text
    flag, named = stage["model"]
    text = mistake(module_of(script), *long, *flag.split(), "--resume")
    assert "another model" in text and named in text, text
    assert files(out) == before
    out = tmp(f"short_{script}")
    one, two = (stage_args(script, out, "--max_steps", n) for n in (1, 2))
    call(module_of(script), *one)
    before = files(out)
    assert before.keys() == {"last.pt", "log.jsonl", *stage["writes"]}, [*before]
    text = mistake(module_of(script), *two)
    assert "another finished run (max_steps 1 -> 2)" in text and "--no-resume" in text, text
    assert files(out) == before
    call(module_of(script), *two, "--no-resume")
    assert files(os.path.join(out, "previous-1")) == before
    after = files(out)
    assert "finished" in call(module_of(script), *two)
    assert files(out) == after


@test_each(STAGES)
def test_user_mistakes(script):
    """Impossible flags and bad data are named in a sentence, and a finished run stays in place."""
    out = copied(whole(script), f"mistakes_{script}")
    before, empty = files(out), tmp(f"nothing_{script}")
    shared = [("--batch_size 0", "--batch_size 0"), ("--lr -1", "--lr -1"), ("--lr nan", "--lr"),
              ("--beta2 1e9", "--beta2 1e9"), ("--weight_decay inf", "--weight_decay inf"),
              ("--seed -1", "--seed -1"), ("--num_workers -1", "--num_workers -1"),
              ("--max_bad 1.5", "--max_bad 1.5"), ("--log_every 0", "--log_every 0"),
              ("--epochs 1 --warmup_epochs 1", "--epochs 1", "--warmup_epochs 1"),
              ("--dtype fp8", "--dtype", "fp8"), ("--device foo", "--device foo"),
              ("--no_such_flag 1", "--no_such_flag"),
              ("--data nowhere", "nowhere", "o such file"),
              (f"--out_dir {HERE}/requirements.txt", "requirements.txt"),
              (f"--out_dir {empty} --resume", "--resume", empty)]
    for flags, *words in [*shared, *STAGES[script]["wrong"]]:
        text = mistake(module_of(script), *stage_args(script, out), *flags.split())
        assert all(word in text for word in words), (flags, text)
        assert files(out) == before, flags
    full = unittest.mock.patch.object(Run, "add", side_effect=MemoryError)  # in the first step
    with full, contextlib.suppress(MemoryError):
        call(module_of(script), *stage_args(script, out, "--lr", 0.01, "--no-resume"))
    assert files(out) == before
    text = run(script, *stage_args(script, out, "--device", "foo"), ok=False)
    assert "--device foo" in text and "Traceback" not in text, text
    assert "finished" in call(module_of(script), *stage_args(script, out))
    assert files(out) == before


def spoil(path, tensor):
    """Overwrites 4 KB (less in a small one) in the middle of a tensor that lies in a file."""
    start = open(path, "rb").read().find(tensor.numpy().tobytes())
    assert start > 0
    with open(path, "r+b") as f:
        f.seek(start + tensor.nbytes // 2)
        f.write(b"\xff" * min(4096, tensor.nbytes // 2))


@test_each(STAGES)
def test_damaged_checkpoints_and_logs(script):
    """A last.pt or log.jsonl that is not what it should be: a sentence, and no file changes."""
    out = copied(killed(script), f"damaged_{script}")
    path, log = os.path.join(out, "last.pt"), os.path.join(out, "log.jsonl")
    good = checkpoint(out)
    weight = next(k for k, v in good["model"].items() if v.ndim > 1 and len(v) > 1)
    lacks = lambda key: {k: v for k, v in good.items() if k != key}
    other = lambda **changed: good | dict(model=good["model"] | changed)
    states = dict(model=lacks("model"), optimizer=lacks("optimizer"), scaler=lacks("scaler"),
                  step=lacks("step"), config=lacks("config"), args=lacks("args"))
    states["of this model"] = other(**{weight: good["model"][weight][:1]})  # another shape
    states[weight] = good | dict(model={k: v for k, v in good["model"].items() if k != weight})
    states["not a checkpoint"] = [1, 2]
    states |= {"step" + " " * n: good | dict(step=step) for n, step in
               enumerate((-1, 10**9, True), 1)}

    def refused(*words, real=False):
        before = files(out)
        args = stage_args(script, out)
        if real:
            process = start(script, *args)
            text = process.communicate()[0]
            assert process.returncode == 1 and "Traceback" not in text, text
            assert text.splitlines()[-1].startswith(f"{script}: "), text
        else:
            text = mistake(module_of(script), *args)
        assert all(word in text for word in words), (words, text)
        assert files(out) == before, words
    for word, state in states.items():
        torch.save(state, path)
        refused(path, word.strip(), real=word == "model")
    for content in (b"", b"no checkpoint", open(path, "rb").read()[:-1000]):
        with open(path, "wb") as f:
            f.write(content)
        refused(path, "not a checkpoint")
    torch.save(good, path)
    spoil(path, good["model"][weight])
    refused(path, "damaged on the disk", "data/", "another copy")
    with raises(path, "damaged on the disk"):
        weights.read_weights(path)  # what eval.py and --init take
    torch.save(good, path)
    rows = open(log).read()
    for row in ("[1]", '{"loss": 1}', "1", '{"step": "x"}', "{"):
        with open(log, "w") as f:
            f.write(f"{row}\n{rows}")
        refused(log, "row 1", row)
    with open(log, "wb") as f:
        f.write(b"\xbe\xff\n" + rows.encode())
    refused(log, "row 1")


@test
def test_a_pipe_is_no_checkpoint():
    """A last.pt that is a pipe is named, and not waited for."""
    os.makedirs(tmp("pipe"))
    os.mkfifo(tmp("pipe", "last.pt"))
    process = start("pretrain.py", *stage_args("pretrain.py", tmp("pipe")))
    try:
        text = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert process.returncode == 1 and "last.pt: not a file" in text, text


@test_each(["finetune.py", "detect_ava.py"])
def test_killed_between_a_validation_and_its_checkpoint(script):
    """Killed twice after a validation's row was written: at the end each row stands there once."""
    class Killed(Exception):
        pass

    def killed_after(run, row):
        write_row(run, row)
        if "lr" not in row:
            raise Killed

    def stopped_at(run, *args):
        update(run, *args)
        run.stopping = signal.SIGTERM * (run.step == step)
    out, write_row, update = tmp(f"validation_{script}"), Run.write_row, Run.update
    rows = [(row["step"], row.keys()) for row in log_rows(whole(script))]
    step = next(row["step"] for row in log_rows(whole(script)) if "lr" not in row)
    with unittest.mock.patch.object(Run, "update", stopped_at):  # before its validation
        with as_script(module_of(script), *stage_args(script, out)):
            assert module_of(script).main() == 128 + signal.SIGTERM
    for _ in range(2):
        with unittest.mock.patch.object(Run, "write_row", killed_after):
            with contextlib.suppress(Killed):
                call(module_of(script), *stage_args(script, out))
        assert [(row["step"], row.keys()) for row in log_rows(out)] == rows[:step + 1]
    call(module_of(script), *stage_args(script, out))
    assert_same(results(out), results(whole(script)), script)


@test
def test_another_optimizer_is_refused():
    """States of AdamW in SGD, and the other way, are refused before a step, with what differs."""
    p = torch.nn.Parameter(torch.ones(3))
    makes = [lambda: torch.optim.AdamW([p], lr=0.1), lambda: torch.optim.SGD([p], lr=0.1)]
    for (make, other), word in ((makes, "betas"), (makes[::-1], "momentum")):
        optimizer = make()
        p.grad = torch.ones(3)
        optimizer.step()
        load_optimizer(make(), optimizer.state_dict(), False)
        with raises(word, type(other()).__name__):
            load_optimizer(other(), optimizer.state_dict(), False)
    state = makes[0]().state_dict()
    del state["param_groups"][0]["eps"]  # newer than the checkpoint
    load_optimizer(optimizer := makes[0](), state, False)
    assert optimizer.param_groups[0]["eps"] == 1e-8
    for wrong in (dict(betas=None), dict(weight_decay="x")):
        state = makes[0]().state_dict()
        state["param_groups"][0] |= wrong
        with raises(*wrong, *wrong.values()):
            load_optimizer(makes[0](), state, False)
    for wrong in (dict(exp_avg=None), dict(step=torch.ones(2))):
        (optimizer := makes[0]()).step()
        state = optimizer.state_dict()
        state["state"][0] |= wrong
        with raises(*wrong):
            load_optimizer(makes[0](), state, False)


@test_each([*STAGES, "eval.py"])
def test_extreme_numbers(script):
    """Numbers that make no sense and sizes that no memory holds: a sentence, out_dir untouched."""
    module, out = module_of(script), tmp(f"extreme_{script}")
    args = [*"--num_workers 0 --device cpu --out_dir".split(), out]
    if script in STAGES:
        args = stage_args(script, out)
    else:
        args += ["--ckpt", os.path.join(whole("finetune.py"), "best.pt"), "--data", labelled()[1]]

    def message(function, flag, value):
        """What ends a call of the script's, "" where it goes well."""
        try:
            with as_script(module, *args, flag, value) as printed:
                function()
        except SystemExit as e:
            return e.code if isinstance(e.code, str) else printed.getvalue()
        return ""
    wanted = "expected (a|a whole|a finite)? ?(number|whole|share)"
    numeric = [f"--{flag}" for flag in flags_of(script)
               if re.search(wanted, message(module.get_args, f"--{flag}", "word"))]
    assert len(numeric) > 8, numeric
    for flag in numeric:
        for value in "nan inf 1e30 1e308 1e-300 -1 0 1000000000".split():
            text = message(module.get_args, flag, value)
            assert not text or re.fullmatch(rf"{script}: .*--.*\n", text), (flag, value, text)
            assert text or value in ("0", "-1", "1e-300", "1000000000"), (flag, value)
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, limits[1]))  # some machines have more
    try:
        sizes = {"--num_frames", "--img_size", "--repeat_aug", "--proj_width"}
        if script not in STAGES:
            sizes = {"--num_crops", "--num_segments"}
        elif script.startswith("pretrain"):  # others need as many videos as a batch has
            sizes.add("--batch_size")
        for flag in sizes & {*numeric}:
            text = message(lambda: script_main(module.main), flag, 10**9)
            assert re.search(r"takes [\d.e+]+ GB", text) and "\n" not in text, (flag, text)
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
    assert not os.path.exists(out) or not os.listdir(out)


@test_each(STAGES)
def test_checkpoints_without_a_newer_flag(script):
    """A last.pt from before a flag existed: an unfinished run goes on, a finished one stays."""
    for n, folder in enumerate((killed(script), whole(script))):
        out = copied(folder, f"older_{script}_{n}")
        state = checkpoint(out)
        del state["args"]["clip_grad"]
        torch.save(state, os.path.join(out, "last.pt"))
        before = files(out)
        text = call(module_of(script), *stage_args(script, out))
        if folder == whole(script):
            assert "finished" in text and files(out) == before, text
        else:
            assert "resumed" in text and "step 6/6" in text, text
            assert_same(results(out), results(whole(script)), script)


# ---------------------------------------------------------------- the files

def source(*names):
    """The text of files, from the folder of the scripts."""
    return "\n".join(open(os.path.join(HERE, name), encoding="utf-8").read() for name in names)


def modules(*folders):
    """The Python files of folders, from the folder of the scripts."""
    return [os.path.join(folder, name) for folder in folders
            for name in sorted(os.listdir(os.path.join(HERE, folder))) if name.endswith(".py")]


@test_each([*STAGES, "eval.py", "bench.py", "video/tools.py"])
def test_every_flag_is_read(script):
    """No flag that nothing reads, no type=bool, no unsafe torch.load."""
    flags = set(re.findall(r'add_argument\(\s*"(?:--)?(\w+)"', source(script)))
    if script in STAGES:  # those of lib/process.py too
        flags |= {flag for flag in flags_of(script) if not flag.startswith("no-")}
        assert flags >= {"lr", "out_dir", "max_bad", "toy"}
    assert len(flags) > 5, flags
    read = source(script, *modules("lib", "video", "ava"))
    for flag in flags - {"toy", "help"}:
        assert re.search(rf"\bargs\.{flag}\b", read), f"{flag} is never read"
    assert not re.search(r"type\s*=\s*bool|weights_only\s*=\s*False", read)


@test
def test_defaults_are_the_papers():
    """pretrain.py's defaults are the paper's ViT-B on Kinetics-400; --toy gives way to a flag."""
    args = pretrain.get_args([])
    assert (args.size, args.num_frames, args.sampling_rate) == ("base", 16, 4)
    assert (args.mask_ratio, args.lr, args.beta2, args.epochs) == (0.9, 1.5e-4, 0.95, 800)
    args = pretrain.get_args(["--toy", "--max_steps", "3"])
    assert args.size == "tiny" and args.max_steps == 3


@test_each(["", "lib", "video", "ava", "tests"])
def test_files_are_as_the_style_wants(folder):
    """At most 100 columns, plain line ends, docstrings of files and of what is public."""
    for name in modules(folder):
        text = source(name)
        if os.path.basename(name) == "__init__.py":
            assert not text, f"{name}: expected to be empty"
            continue
        assert not re.search(r"[\ufeff\r\t]|[ ]$", text, re.M), f"{name}: BOM, CR, tab or space"
        assert text.endswith("\n") and not text.endswith("\n\n"), f"{name}: ends oddly"
        tree = ast.parse(text)
        assert ast.get_docstring(tree), f"{name} has no docstring"
        for n in tree.body:
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name != "main":
                assert ast.get_docstring(n), f"{name}: {n.name} has no docstring"
                claim = re.match(r"test_", n.name) and ast.get_docstring(n)
                assert not claim or "\n" not in claim, f"{name}: {n.name}: expected one line"
        long = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 100]
        assert not long, f"{name}: lines {long} are too long"


@test
def test_imports_go_one_way():
    """Stages import lib, video, ava, never each other; these import no stage, video nothing."""
    rooms = dict(video=["video"], lib=["lib", "video", "model", "masking", "weights", "data"],
                 ava=["ava", "lib", "video", "model", "weights", "data"])
    ours = {name.removesuffix(".py") for name in modules("")} | {"lib", "video", "ava", "tests"}
    stages = {name.removesuffix(".py") for name in [*STAGES, "eval.py", "bench.py"]}
    for name in modules("", *rooms):
        tree = ast.parse(source(name))
        nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        found = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        found |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
        found = {module.split(".")[0] for module in found} & ours
        room = os.path.dirname(name)
        if room:
            assert found <= set(rooms[room]), f"{name} imports {found - set(rooms[room])}"
        elif name != "test_all.py":
            assert not found & (stages | {"tests"}), f"{name} imports {found & stages}"
