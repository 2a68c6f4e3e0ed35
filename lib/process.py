"""What a script needs of its process: flags that state their range, ranks, device, dtype."""

import argparse
import ctypes
import math
import os
import re
import sys
import traceback

import torch
import torch.distributed as dist

from video import frames, lists, toy

# ---- types of flags: a value out of range ends the program, which says what is allowed ----

def number(kind, allowed: str, fits):
    """An argparse type: text -> kind(text) if it is finite and fits(it); `allowed` says what is."""
    def parse(text: str):
        try:
            value = kind(text)
            good = math.isfinite(value) and fits(value)
        except (ValueError, OverflowError):
            good = False
        if not good:
            raise argparse.ArgumentTypeError(f"{text}: expected {allowed}")
        return value
    return parse


count = number(int, "a whole number from 1, below 2^31", lambda x: 1 <= x < 2**31)
few = number(int, "a whole number from 1 to 1000", lambda x: 1 <= x <= 1000)
workers = number(int, "a whole number from 0 to 1000", lambda x: 0 <= x <= 1000)
whole = random_seed = number(int, "a whole number from 0, below 2^31", lambda x: 0 <= x < 2**31)
amount = number(float, "a number from 0 to 10^9", lambda x: 0 <= x <= 1e9)
positive = number(float, "a number from 10^-9 to 10^9", lambda x: 1e-9 <= x <= 1e9)
rate = number(float, "frames per second above 0, at most 1000", lambda x: 1e-9 <= x <= 1000)
inner = number(float, "a share above 0, below 1", lambda x: 0 < x < 1)
share = number(float, "a share in [0, 1]", lambda x: 0 <= x <= 1)
fraction = number(float, "a share from 0, below 1", lambda x: 0 <= x < 1)
portion = number(float, "a share above 0, at most 1", lambda x: 0 < x <= 1)


def every(text: str) -> int | None:
    """An argparse type, steps between two of a kind: a whole number from 0, or never (None)."""
    if text == "never":
        return None
    try:
        return whole(text)
    except argparse.ArgumentTypeError:
        allowed = "a whole number from 0, or never"
        raise argparse.ArgumentTypeError(f"{text}: expected {allowed}") from None


def folder(text: str) -> str:
    """An argparse type: where a folder is or can be made."""
    if os.path.exists(text) and not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text}: is a file, expected a folder")
    return text


# ---- the command line ----

class Flags(argparse.Namespace):
    """Parsed flags; beside them `defaults`, what each is where nobody and no preset sets it."""

    __slots__ = ("defaults",)  # in no __dict__: vars(args) are the flags alone


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows the default of every flag that has one, unless its help tells it already."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=32, width=100)

    def _get_help_string(self, action):
        text = action.help or ""
        hidden = action.default is None or action.default is False  # 0 is shown
        shown = not hidden and action.default not in ("", [], argparse.SUPPRESS)
        return f"{text} (default: %(default)s)".strip() if shown and "default" not in text else text


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose help shows defaults; parse_args gives Flags."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=Help, usage="%(prog)s [flags]")

    def format_help(self) -> str:
        """The docstring, and every flag in its group with its default."""
        for action in self._actions:
            action.help = action.help or "(default: %(default)s)"
        return super().format_help()

    def parse_args(self, argv=None) -> Flags:
        """-> the flags; an impossible one ends the program and is named."""
        args = super().parse_args(argv, Flags())
        args.defaults = {a.dest: getattr(a, "plain_default", a.default) for a in self._actions}
        return args

    def error(self, message: str):
        """Ends the program with one sentence, not with the whole usage."""
        message = re.sub(r"^argument (--\w+): ", r"\1 ", message)
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")

    def preset(self, **values):
        """Other defaults for a kind of run (--toy); flags that are given still win."""
        for action in self._actions:
            if action.dest in values and not hasattr(action, "plain_default"):
                action.plain_default = action.default
        self.set_defaults(**values)

    def peek(self, argv) -> argparse.Namespace:
        """The flags so far, for presets that depend on them."""
        return self.parse_known_args(argv)[0]


def device_flags(p: Parser):
    """The flags of every script that runs a model; -> their group, to add to."""
    g = p.add_argument_group("run")
    g.add_argument("--device", help="cuda, cpu or mps (default: the first there is)")
    g.add_argument("--dtype", choices=["bf16", "fp16", "fp32"],
                   help="(default: bf16 where the hardware has it)")
    g.add_argument("--num_workers", type=workers,
                   help="decoding processes per rank (default: cores per rank, at most 32)")
    g.add_argument("--frame_rate", default=25.0, type=positive,
                   help="frames per second of folders of numbered pictures")
    return g


def run_flags(p: Parser, out_dir: str):
    """The flags of every stage that trains; -> their group, to add to."""
    flag = argparse.BooleanOptionalAction
    g = device_flags(p)
    g.add_argument("--out_dir", default=out_dir, type=folder,
                   help="for checkpoint, log and pictures")
    g.add_argument("--seed", default=0, type=random_seed)
    g.add_argument("--compile", action=flag, default=False, help="torch.compile the model")
    g.add_argument("--resume", action=flag,
                   help="continue from out_dir (default: if it holds this very run)")
    g.add_argument("--max_bad", default=0.05, type=share,
                   help="stop when more than this share of reads fails")
    g.add_argument("--log_every", default=10, type=count, help="steps")
    g.add_argument("--save_every", default=500, type=count, help="steps")
    g.add_argument("--save_minutes", default=10, type=amount,
                   help="save also when the last checkpoint is so old; 0: never")
    g.add_argument("--keep_every", type=count,
                   help="steps between checkpoints that stay, as step_0006000.pt (default: none)")
    g.add_argument("--tensorboard", action=flag, default=False, help="also write event files")
    g.add_argument("--toy", action="store_true",
                   help="presets for minutes on two CPU cores; other flags still win")
    return g


def optim_flags(p: Parser, unit: str, *, batch_size: int, epochs: float, warmup_epochs: float,
                lr: float, min_lr: float, weight_decay: float, beta2: float | None = None,
                clip_grad: float = 0.0):
    """The flags of every optimiser with a stage's own defaults; -> their group, to add to.

    unit: what a batch counts. Without a default for beta2 there is no such flag.
    """
    g = p.add_argument_group("optimisation")
    g.add_argument("--batch_size", default=batch_size, type=count,
                   help=f"{unit} per rank and accumulation step")
    g.add_argument("--accum_steps", default=1, type=count, help="batches per optimiser step")
    g.add_argument("--global_batch", type=count,
                   help=f"{unit} per optimiser step: sets accum_steps, on any number of ranks")
    g.add_argument("--epochs", default=epochs, type=positive)
    g.add_argument("--warmup_epochs", default=warmup_epochs, type=amount, help="less than --epochs")
    g.add_argument("--max_steps", type=count,
                   help="optimiser steps instead of epochs; the warm-up keeps its share")
    g.add_argument("--lr", default=lr, type=amount, help=f"per 256 {unit} of the global batch")
    g.add_argument("--min_lr", default=min_lr, type=amount, help=f"at the end, per 256 {unit}")
    g.add_argument("--weight_decay", default=weight_decay, type=amount)
    if beta2 is not None:
        g.add_argument("--beta2", default=beta2, type=fraction, help="AdamW's second")
    g.add_argument("--clip_grad", default=clip_grad, type=amount,
                   help="largest gradient norm, 0 = off")
    return g


# ---- ranks, device, dtype ----

def best_dtype(device: torch.device) -> str:
    """The default of --dtype: bf16; on a CPU that would emulate it fp32, on such a GPU fp16.

    Emulated, a matmul takes 25 to 35 times as long as in fp32 (measured on an AVX2 CPU).
    """
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return "bf16"


def find_device(name: str | None, local_rank: int) -> torch.device:
    """The device of this name (None: the first there is); ValueError where torch cannot use it."""
    mps = torch.backends.mps.is_available()
    name = name or ("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    try:
        if name == "cuda":
            torch.cuda.set_device(local_rank)
        torch.zeros(1, device=name)
    except AttributeError:
        raise ValueError(f"--device {name}: this build of torch has no such device") from None
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ValueError(f"--device {name}: {str(e).splitlines()[0]}") from None
    return torch.device(name)


def keep_memory():
    """Tells glibc to keep what is freed.

    It gives large tensors back to the system at once and faults their pages in again: a fifth of a
    step's time on a CPU, a third of RandAugment's in the data workers.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


class Process:
    """This process among the ranks that torchrun started (plain python: the only one).

    rank, local_rank, world; device; dtype (its name) and autocast (a context); num_workers; say
    (print on rank 0, nothing elsewhere); host_group, a gloo group for numbers that lie on the host,
    None without torchrun. host_only: nothing but such numbers is exchanged.
    """

    def __init__(self, args, host_only: bool = False, quiet: bool = False):
        frames.set_rate(args.frame_rate)
        self.rank = int(os.environ.get("RANK", 0))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = find_device(args.device, self.local_rank)
        self.dtype = args.dtype or best_dtype(self.device)
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.dtype]
        self.autocast = torch.autocast(self.device.type, kind, enabled=self.dtype != "fp32")
        self.host_group = None
        if "RANK" in os.environ:
            nccl = self.device.type == "cuda" and not host_only
            gpu = torch.device("cuda", self.local_rank) if nccl else None
            dist.init_process_group("nccl" if nccl else "gloo", device_id=gpu)
            # agreeing on numbers of the host must not wait for the GPU
            self.host_group = dist.new_group(backend="gloo")
        self.say = print if self.rank == 0 and not quiet else lambda *a, **k: None
        self.num_workers = args.num_workers
        if self.num_workers is None:
            known = hasattr(os, "sched_getaffinity")  # not on macOS
            cores = len(os.sched_getaffinity(0)) if known else os.cpu_count()
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            # two batches wait per worker: with 32 of them 5 GB a rank, at 32 clips of 16x224x224
            self.num_workers = min(32, max(1, cores // ranks_here))
        keep_memory()

    def once(self, function, *args, **kwargs):
        """Calls the function on the first rank of each machine; the others wait for it."""
        if self.local_rank == 0:
            function(*args, **kwargs)
        self.barrier()

    def videos(self, sources: list, data_root: str, toy: str, outside: str | None = None,
               max_bad: float = 1.0,
               folders: bool = True) -> tuple[lists.Paths, list[str | None]]:
        """lists.read_all; says which files do not exist, on rank 0 the first ten of them.

        ValueError, on all ranks, where they are more than max_bad of the files. The first rank of
        each machine looks; the machine that lacks most speaks for all.
        """
        paths, labels = lists.read_all(sources, data_root, toy, outside, folders)
        for note in lists.say_folders(paths) if self.rank == 0 else ():
            self.say(note)
        gone = lists.missing(paths) if self.local_rank == 0 else []
        count, some = max(self.gather((len(gone), gone[:10])))
        if count:
            self.say(lists.say_missing(count, some, len(paths)))
        if count > max_bad * len(paths):
            raise ValueError(f"{count} of {len(paths)} files do not exist, more than --max_bad "
                             f"{max_bad:g}, the first: {some[0]}; `python data.py check SOURCE "
                             "--write_good good.tsv` makes a list without them")
        return paths, labels

    def labelled(self, args, folders: bool = True) -> tuple:
        """-> classes, paths, labels, val_paths, val_labels of args.data and args.val_data.

        Toy videos come with their own val. The labels are places in `classes`, of training;
        --per_class is obeyed. ValueError where there is one class only, or a label that training
        does not have.
        """
        with_toy = "toy" in args.data + (args.val_data or [])
        if with_toy:
            self.once(toy.make_toy)
        paths, names = self.videos(args.data, args.data_root, "toy/train", None, args.max_bad,
                                   folders)
        classes = lists.class_names([name for name in names if name is not None])
        labels = lists.class_ids(names, classes, paths, "the training data")
        if len(classes) < 2:
            raise ValueError(f"{' '.join(args.data)}: one class only ({classes[0]}), expected 2 "
                             "at least")
        if args.per_class:
            paths, labels = lists.first_of_each(paths, labels, args.per_class)
        val_paths, val_labels = [], []
        if args.val_data or with_toy:
            val_paths, names = self.videos(args.val_data or ["toy"], args.data_root, "toy/val",
                                           folders=folders)
            val_labels = lists.class_ids(names, classes, val_paths, "the training data")
        return classes, paths, labels, val_paths, val_labels

    def barrier(self):
        """Waits until all ranks are here."""
        if self.world > 1:
            dist.barrier(group=self.host_group)

    def gather(self, thing) -> list:
        """Any picklable thing of each rank -> those of all, in their order, on every rank."""
        if self.world == 1:
            return [thing]
        parts = [None] * self.world
        dist.all_gather_object(parts, thing, group=self.host_group)
        return parts

    def close(self):
        """Ends the process group, when all have come so far."""
        if self.host_group:
            self.barrier()
            dist.destroy_process_group()


def memory_lack(error: Exception) -> str | None:
    """What to tell a user of memory that was too short; None: the error is of another kind.

    Read from what torch and numpy say, on any device, here or in a data worker.
    """
    asked = re.search(r"allocate ([\d.]+) ?(bytes|[KMGTPE]i?B)", str(error))
    size = ""
    if asked:
        power = "bKMGTPE".index(asked[2][0])
        size = f"one tensor takes {float(asked[1]) * 1024 ** power / 1e9:.3g} GB; "
    elif worker := re.search(r"DataLoader worker .*(killed by|exited).*?\.(?= |$)", str(error)):
        return f"{worker[0]} Was memory short? Try fewer --num_workers"
    elif not isinstance(error, MemoryError) and "calculation overflowed" not in str(error):
        return None
    where = traceback.extract_tb(error.__traceback__)[1]  # in main()
    return (f"out of memory at line {where.lineno}, `{where.line}`: {size}smaller clips, batch or "
            "model?")


def script_main(main):
    """Runs a script's main(): its return value is the exit status, a user's mistake a sentence."""
    script = os.path.basename(sys.argv[0])
    try:
        sys.exit(main())
    except OSError as e:
        sys.exit(f"{script}: {f'{e.filename}: {e.strerror}' if e.filename else e}")
    except ValueError as e:
        sys.exit(f"{script}: {e}")
    except (MemoryError, RuntimeError) as e:
        if not (why := memory_lack(e)):
            raise
        sys.exit(f"{script}: {why}")
    except KeyboardInterrupt:
        sys.exit(130)
