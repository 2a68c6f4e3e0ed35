"""A training run: its length, its checkpoint, the loader, the guarded step, log, signals, end.

A stage's loop calls it and it calls nothing back: it knows no model, no loss and no schedule.

    run = Run(args)
    run.plan(len(paths))                            # global batch, steps, warm-up, peak lr
    saved = run.resume(model.config, videos=...)    # this very run's checkpoint, or None
    net = run.start(model, optimizer, train_set)    # device, states, compile, DDP, loader, files
    for step in run.steps():
        for place, batch in run.batches():          # run.accum_steps of them, on the device
            ...
            run.scaler.scale(loss / run.accum_steps).backward()
            run.add(loss=loss)
        run.update(args.clip_grad)
        if run.due(args.log_every):
            run.log("loss {loss:.4f}")
        if run.due_to_save():
            run.save(model=model.state_dict(), config=model.config)
    return run.end()
"""

import contextlib
import datetime
import itertools
import json
import math
import os
import platform
import re
import resource
import secrets
import signal
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lib.checkpoint import host_copy, read_checkpoint, read_rows, write_rows, write_whole
from lib.feed import Batches, Waiting, make_loader, send
from lib.optim import guarded_step, load_optimizer
from lib.process import Process
from video.prepared import shards

MAX_NONFINITE = 20  # steps in a row with a non-finite gradient before the run gives up

# flags that may differ when a run goes on: where things lie, how often, by what means
MAY_CHANGE = {
    "out_dir", "resume", "num_workers", "log_every", "save_every", "save_minutes", "keep_every",
    "vis_every", "eval_every", "tensorboard", "max_bad", "toy", "hour", "device", "compile",
    "checkpointing", "batch_size", "accum_steps", "data", "data_root", "val_data", "images"}

# what a run writes: moved aside when another one begins
OURS = r"last\.pt|best\.pt|step_\d+\.pt|log\.jsonl|bad_videos|vis_|events|detections\.csv"

LOW_LR = 3e-5  # below it no small run here left its baseline within 500 steps

ANEW = "choose another --out_dir, or --no-resume to start anew (the old files are kept)"


class Run(Process):
    """A run of a stage in --out_dir, on all ranks; step counts the steps done."""

    def __init__(self, args):
        if args.epochs <= args.warmup_epochs:
            raise ValueError(f"--epochs {args.epochs:g}: expected more than "
                             f"--warmup_epochs {args.warmup_epochs:g}")
        super().__init__(args)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where fp32 is left
        torch.manual_seed(args.seed)  # initial weights; all later draws: see steps()
        self.args, self.script = args, os.path.basename(sys.argv[0])
        self.board_class = import_tensorboard() if args.tensorboard else None
        self.checkpoint, self.log_file = self.path("last.pt"), self.path("log.jsonl")
        self.bad_file = self.path("bad_videos.txt")
        self.fused = self.device.type in ("cuda", "cpu")  # torch's optimisers have such kernels
        os.makedirs(args.out_dir, exist_ok=True)
        self.one_folder()

    def path(self, name: str) -> str:
        """A file in out_dir."""
        return os.path.join(self.args.out_dir, name)

    def one_folder(self, seconds: float = 10):
        """ValueError, on all ranks, where a rank does not see in out_dir what rank 0 writes there.

        A disk of a network may show it late, by so many seconds at most.
        """
        if self.world == 1:
            return
        name, until = f".rank0-{secrets.token_hex(8)}", time.monotonic() + seconds
        if self.rank == 0:
            open(self.path(name), "w").close()
        path = self.path(self.gather(name)[0])
        while not os.path.exists(path) and time.monotonic() < until:
            time.sleep(0.1)
        nodes = self.gather((os.path.exists(path), platform.node()))
        blind = sorted({node for seen, node in nodes if not seen})
        if self.rank == 0:
            os.remove(path)
        if blind:
            raise ValueError(f"--out_dir {self.args.out_dir} is not the same folder on all nodes: "
                             f"{', '.join(blind[:5])} cannot see what rank 0 writes there; "
                             "expected one on a disk that all share")

    # ---- before the loop

    def plan(self, samples: int, clips_each: int = 1, unit: str = "clips", whole: str = ""):
        """An epoch has so many samples: global_batch, total_steps, warmup_steps; lr, min_lr.

        The latter two are peak and floor at this global batch. clips_each and unit are for the
        log: how many clips one sample gives, and what they are called. whole: what the samples are
        called, where an epoch has to fill a batch.
        """
        args = self.args
        self.samples, self.clips_each, self.unit = samples, clips_each, unit
        self.accum_steps, at_once = args.accum_steps, args.batch_size * self.world
        if args.global_batch:
            if args.accum_steps > 1:
                raise ValueError(f"--accum_steps {args.accum_steps}: --global_batch sets it, leave "
                                 "one of them out")
            if args.global_batch % at_once:
                raise ValueError(f"--global_batch {args.global_batch}: expected a multiple of "
                                 f"--batch_size {args.batch_size} x {self.world} rank(s) = "
                                 f"{at_once}")
            self.accum_steps = args.global_batch // at_once
        self.global_batch = at_once * self.accum_steps
        if whole and samples < self.global_batch:
            flags = "--global_batch" if args.global_batch else "--batch_size or --accum_steps"
            raise ValueError(f"{samples} {whole} are fewer than a batch of {args.batch_size} x "
                             f"{self.world} rank(s) x {self.accum_steps} = {self.global_batch}: "
                             f"lower {flags}")
        self.total_steps = args.max_steps or max(1, int(args.epochs * samples / self.global_batch))
        self.warmup_steps = int(self.total_steps * args.warmup_epochs / args.epochs)
        self.lr, self.min_lr = (x * self.global_batch / 256 for x in (args.lr, args.min_lr))

    def summary(self, what: str) -> str:
        """What every stage says of its plan; a batch holds so many of `what`."""
        args, each, low = self.args, self.clips_each, ""
        if 0 < self.lr < LOW_LR:
            low = (f"\nthe peak lr is low: --lr counts per 256 {what}, and a batch of "
                   f"{self.global_batch} has {self.global_batch / 256:.3g} of it; small batches "
                   f"learnt at peaks of 3e-4 to 1.5e-3, which --lr "
                   f"{3e-4 * 256 / self.global_batch:.2g} would begin")
        return (f"{self.world} rank(s) x {args.batch_size} {what} x {self.accum_steps} = batch "
                f"{self.global_batch}{f' (x {each} clips)' if each > 1 else ''}, "
                f"{self.total_steps} steps = {self.epoch(self.total_steps):.1f} epochs, "
                f"peak lr {self.lr:.2e}, {self.device.type} {self.dtype}, "
                f"{self.num_workers} workers{low}")

    def warn_of_toys(self, size: str, loss_of_one):
        """Says what a large model on the toy videos costs, and what --toy is.

        loss_of_one(): the loss of one clip, from which the time of all steps is estimated.
        """
        self.say(f"a model of size {size} on toy videos: --toy is a tiny model, for minutes; "
                 "--data takes your own videos", flush=True)
        for _ in range(2):  # the second one's time counts
            start = time.time()
            with self.autocast:
                loss = loss_of_one()
            params = [p for p in self.net.parameters() if p.requires_grad]
            grads = torch.autograd.grad(loss, params, allow_unused=True)  # no hook of DDP's
            float(grads[0].sum())  # has waited for the device
            seconds = time.time() - start
        clips = self.total_steps * self.global_batch * self.clips_each
        left = datetime.timedelta(seconds=round(seconds * clips / self.world))
        self.say(f"its {clips} clips take about {left} here", flush=True)

    def epoch(self, step: int) -> float:
        """Steps -> epochs."""
        return step * self.global_batch / self.samples

    def resume(self, config: dict, classes=None, may_change=(), parts={}, **facts) -> dict | None:
        """-> the checkpoint in out_dir if it is this very run's, else None. Nothing is touched yet.

        Runs are the same if all flags are (but those of MAY_CHANGE and may_change), and the facts
        given here (what the videos are, for one), the model's config, the classes. A flag that the
        checkpoint does not know had its default. Another run is refused, --no-resume has it moved
        aside by take_over(). parts: {name: kind} of what else the stage will read.
        """
        args, path = self.args, self.checkpoint
        shape = config.get("num_frames", 1), *config.get("img_size", ())
        clips = args.batch_size * self.clips_each
        size, memory = (x / 1e9 for x in (clips * math.prod(shape) * 3, physical_memory()))
        if size > memory:
            raise ValueError(f"--batch_size {args.batch_size}: a batch of {clips} clips of "
                             f"{'x'.join(map(str, shape))} takes {size:.3g} GB, this machine has "
                             f"{memory:.3g}")
        self.facts = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE | {*may_change}}
        self.facts |= dict(dtype=self.dtype, global_batch=self.global_batch) | facts
        self.saved, self.changed, self.first_step, self.rows = None, [], 0, []
        if args.resume and not os.path.exists(path):
            raise ValueError(f"--resume: there is no {path}")
        if args.resume is False or not os.path.exists(path):
            return None
        saved = read_checkpoint(path, self.script, {*vars(args), *self.facts}, parts,
                                mmap=self.device.type == "cuda")
        then = {k: saved["args"].get(k, args.defaults.get(k, v)) for k, v in self.facts.items()}
        self.changed = [f"{k} {then[k]} -> {v}" for k, v in self.facts.items() if then[k] != v]
        by_init = [k for k in ("pos_grid", "encoder_norm") if k in config]  # --init may set these
        differ = [k for k, v in config.items()
                  if k not in by_init and saved["config"].get(k, v) != v]
        differ += [k for k in by_init if type(saved["config"].get(k)) is not type(config[k])]
        differ += ["classes"] if saved.get("classes") != classes else []
        changed = ", ".join(self.changed)
        finished = saved["step"] >= saved["args"]["total_steps"]
        if differ:
            raise ValueError(f"{path} holds another model ({changed or ', '.join(differ)}): it "
                             f"cannot go on with this one; {ANEW}")
        if changed and args.resume is None:
            kind = "finished" if finished else "unfinished"
            raise ValueError(f"{path} holds another {kind} run ({changed}): {ANEW}, or --resume to "
                             "go on with the new settings")
        if changed:
            self.say(f"going on with other settings: {changed}")
        self.saved, self.first_step = saved, saved["step"]
        self.rows = read_rows(self.log_file, self.first_step)
        return saved

    def sampler(self, paths, batch_size: int) -> Batches:
        """This rank's batches of videos, from where the run stands to its end."""
        return Batches(len(paths), batch_size, self.accum_steps, self.rank, self.world,
                       self.first_step, self.total_steps, self.args.seed, shards(paths))

    def start(self, model, optimizer, train_set, sampler=None):
        """-> what the loop calls in the model's place: on the device, compiled, in DDP.

        model and optimizer (or a list of them) take the checkpoint's states. train_set is read in
        the order of sampler (default: that of all its samples). out_dir stays as it is until there
        is something to write: see take_over().
        """
        self.optimizers = optimizer if isinstance(optimizer, (list, tuple)) else [optimizer]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == "fp16")
        model.to(self.device)
        if self.saved:
            self.load(model)
        self.net = wrap(model, self, self.args.compile)
        if sampler is None:
            paths = getattr(train_set, "paths", [""] * self.samples)  # a fork's may have none
            sampler = self.sampler(paths, self.args.batch_size)
        self.loader = make_loader(train_set, sampler, self.num_workers, self.device)
        self.same_on_all_ranks()
        self.saved, self.step = None, self.first_step
        self.owned, self.board, self.bad_seen, self.bad_new = False, None, set(), []
        self.bad_files = set()  # since the start, as bad_reads
        if self.first_step:
            self.say(f"resumed {self.checkpoint} at step {self.first_step} of {self.total_steps}")
            if os.path.exists(self.bad_file):
                with open(self.bad_file) as f:
                    self.bad_seen = {row.split("\t")[0] for row in f}
        self.sums = self.averages = self.failure = None
        self.skipped, self.in_row = torch.zeros(2, device=self.device)  # non-finite steps
        self.generator = torch.Generator(device=self.device)
        self.reads = self.bad_reads = self.stopping = 0
        self.advised, self.overdue = False, 0
        self.saved_at = time.monotonic()
        self.writer, self.writing = ThreadPoolExecutor(1), None  # at exit python waits for it
        self.signals = signals = []  # a handler that held the run would keep its workers alive
        speaks = self.rank == 0

        def handler(number, frame):
            if number in signals:  # a second one ends it at once
                os._exit(128 + number)
            signals.append(number)
            if speaks:  # print could be interrupted by itself
                os.write(1, f"signal {number}: stopping after this step; a second one ends the "
                            "run at once\n".encode())
        signal.signal(signal.SIGINT, handler)
        signal.signal(signal.SIGTERM, handler)
        for note in getattr(train_set, "notes", list)() if self.rank == 0 else ():
            self.say(note)
        model.train()
        return self.net

    def load(self, model):
        """The checkpoint's weights and states; ValueError where they are not those of this run."""
        try:
            model.load_state_dict(self.saved["model"])
        except (RuntimeError, TypeError, AttributeError) as e:
            why = " ".join(str(e).split())[:300]
            raise ValueError(f"{self.checkpoint}: its weights are not those of this model ({why}); "
                             f"{ANEW}") from None
        states = self.saved["optimizer"]
        states = states if isinstance(states, list) else [states]
        try:
            for optimizer, state in zip(self.optimizers, states, strict=True):
                load_optimizer(optimizer, state, bool(self.changed))
            if self.saved["scaler"]:
                self.scaler.load_state_dict(self.saved["scaler"])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as e:
            raise ValueError(f"{self.checkpoint}: its optimizer is not that of this run ({e}); "
                             "the optimiser, which parameters it trains and how they are grouped "
                             f"cannot change within a run; {ANEW}") from None

    def same_on_all_ranks(self):
        """ValueError where ranks see different checkpoints, as a disk's cache may be behind."""
        steps = sorted(set(self.gather(self.first_step)))
        if len(steps) > 1:
            raise ValueError(f"{self.checkpoint}: some ranks see it at step {steps[0]}, others at "
                             f"{steps[-1]}: the shared disk shows old files; start again")

    def take_over(self):
        """out_dir becomes this run's, on rank 0, once: when the first step was made.

        Another run's files are moved aside, or the log is cut at the checkpoint. So nothing has
        changed there if the first step fails, for want of memory for one.
        """
        if self.rank != 0 or self.owned:
            return
        out_dir, self.owned = self.args.out_dir, True
        old = [f for f in sorted(os.listdir(out_dir)) if re.match(OURS, f)]
        if self.first_step:
            write_rows(self.log_file, self.rows)
        elif old:
            names = (f"previous-{n}" for n in itertools.count(1))
            kept = next(name for name in names if not os.path.exists(self.path(name)))
            os.mkdir(self.path(kept))
            for f in old:
                os.rename(self.path(f), self.path(os.path.join(kept, f)))
            why = f" ({', '.join(self.changed)})" if self.changed else ""
            self.say(f"{out_dir} held another run{why}: kept in {kept}/")
        self.board = self.board_class(out_dir) if self.board_class else None

    # ---- in the loop

    def steps(self):
        """Yields the steps (0-based) that are left, until the last one or a signal.

        Before each, torch's global generator is seeded from (seed, step, rank), self.generator
        from (seed, step): a resumed run draws what an uninterrupted one would have drawn.
        """
        self.stream, self.waiting = iter(self.loader), Waiting(self.device)
        self.clock, self.logged = time.time(), self.step
        while self.step < self.total_steps and not self.stopping:
            step = self.step
            self.seed(self.rank)
            self.generator.manual_seed(self.args.seed * 1_000_003 + step)
            yield step
            if self.step != step + 1:
                raise RuntimeError("the loop has to call run.update() once in every step")
            if self.failure:
                self.written()
                raise ValueError(self.failure)

    def seed(self, place: int):
        """Seeds what torch draws in this step: on this rank, or for a place in its batch."""
        torch.manual_seed(zlib.crc32(f"{self.args.seed} {self.step} {place}".encode()))

    def batches(self):
        """Yields (place, batch on the device) accum_steps times.

        Place p holds the p-th batch_size samples of the global batch, on any number of ranks; with
        --global_batch what torch draws (drop path) goes by it, too. DDP averages the gradients in
        the backward pass of the last.
        """
        args = self.args
        for micro in range(self.accum_steps):
            with self.waiting:
                batch, bad = next(self.stream)
            self.bad_new += bad
            self.reads += args.batch_size + len(bad)
            self.bad_reads += len(bad)
            if batch is None:
                raise ValueError(f"10 reads in a row failed, the last: {bad[-1][1]}; `python "
                                 "data.py check` lists all")
            if self.world > 1:  # what DDP's no_sync() sets
                self.net.require_backward_grad_sync = micro == self.accum_steps - 1
            if torch.is_tensor(batch):
                batch = send(batch, self.device)
            else:
                batch = [send(x, self.device) for x in batch]
            place = micro * self.world + self.rank
            if args.global_batch:
                self.seed(place)
            yield place, batch

    def add(self, count: int = 1, **losses: torch.Tensor):
        """Adds this batch's scalars to what the log shows the mean of, unless one is not finite.

        count: of how many things they are the sum (1: of the batch, whose mean they are).
        """
        values = [x.detach().float() for x in losses.values()]
        values = torch.stack([*values, values[0].new_full((), count)])
        values = values.masked_fill(~torch.isfinite(values).all(), 0)
        self.sums = values if self.sums is None else self.sums + values  # on the device
        self.names = list(losses)

    def update(self, clip_grad: float = 0.0, apart: bool = False):
        """The optimisers' step; left out, and counted, where a gradient is not finite.

        clip_grad: the largest gradient norm, 0 for any. apart: each optimiser's gradient is clipped
        and looked at by itself, as if it trained alone. All ranks agree here whether to stop, and
        by rank 0's clock whether to save.
        """
        parts = [[p for group in o.param_groups for p in group["params"] if p.grad is not None]
                 for o in self.optimizers]
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        # of the average that DDP made: the same on all ranks
        norm_of = lambda params: torch.nn.utils.get_total_norm([p.grad for p in params])
        norms = [norm_of(params) for params in parts] if apart else (
            [norm_of(sum(parts, []))] * len(parts))
        self.grad_norm = torch.stack(norms).max()
        for params, norm in zip(parts, norms):
            if clip_grad:
                torch.nn.utils.clip_grads_with_norm_(params, clip_grad, norm)
        bad = ~torch.isfinite(torch.stack(norms))
        self.skipped = self.skipped + bad.any()
        self.in_row = (self.in_row + 1) * bad.all()
        for optimizer, bad_step in zip(self.optimizers, bad):
            guarded_step(optimizer, self.scaler, bad_step)
            optimizer.zero_grad(set_to_none=True)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.step += 1
        self.take_over()
        minutes = (time.monotonic() - self.saved_at) / 60
        overdue = self.rank == 0 and 0 < self.args.save_minutes <= minutes
        stopping = torch.tensor([max(self.signals, default=0), overdue])
        if self.world > 1:
            dist.all_reduce(stopping, dist.ReduceOp.MAX, group=self.host_group)
        self.stopping, self.overdue = stopping.tolist()
        while self.bad_new:
            self.note_bad(*self.bad_new.pop(0))

    def due(self, every: int | None, at_stop: bool = True, by_time: bool = False) -> bool:
        """Whether what happens every so many steps does now; also at the end and when stopping.

        every: 0, only then; None, never. by_time: also with a save by --save_minutes.
        """
        ends = self.step == self.total_steps or at_stop and (self.stopping or self.failure)
        now = every and (self.step % every == 0 or by_time and self.overdue)
        return every is not None and bool(ends or now)

    def due_to_save(self) -> bool:
        """Whether last.pt is to be written now: by --save_every, --save_minutes, --keep_every."""
        return self.due(self.args.save_every, by_time=True) or self.keeps

    @property
    def keeps(self) -> bool:
        """Whether the checkpoint of this step is one that stays."""
        return bool(self.args.keep_every) and self.step % self.args.keep_every == 0

    def means(self) -> dict:
        """What was added since the last log line: {name: mean over all ranks' batches, a float}."""
        if self.averages is None and self.sums is not None:
            if self.world > 1:
                dist.all_reduce(self.sums)
            *sums, n = self.sums.tolist()
            self.averages = {k: x / n if n else math.nan for k, x in zip(self.names, sums)}
        return self.averages or {}

    def log(self, text: str, **values):
        """A line on the screen and a row in log.jsonl, of means(), these values and the rest.

        Tensors are averaged over the ranks. text is formatted with the row. Too many non-finite
        steps in a row end the run; too many bad reads do, after the save that is due then.
        """
        row = dict(step=self.step) | self.means() | self.averaged(values)
        reads, bad_reads, waited = self.tally()
        seconds, steps = time.time() - self.clock, self.step - self.logged
        clips = steps * self.global_batch * self.clips_each
        row |= dict(lr=max(g["lr"] for o in self.optimizers for g in o.param_groups),
                    grad_norm=self.grad_norm.item(), epoch=self.epoch(self.step),
                    clips_per_s=clips / seconds, waiting=waited / seconds,
                    memory_gb=peak_memory(self.device) / 2**30,
                    seconds_left=(self.total_steps - self.step) * seconds / steps,
                    bad_reads=bad_reads, skipped_steps=int(self.skipped))
        self.write_row(row)
        left = datetime.timedelta(seconds=round(row["seconds_left"]))
        line = [f"step {self.step}/{self.total_steps}", text.format(**row),
                f"lr {row['lr']:.2e}", f"grad norm {row['grad_norm']:.3f}",
                f"{row['clips_per_s']:.1f} {self.unit}/s",
                f"waiting for data {row['waiting']:.0%}", f"{row['memory_gb']:.2f} GB",
                f"{left} left"]
        if row["skipped_steps"]:
            line.append(f"{row['skipped_steps']} non-finite steps skipped")
        if bad_reads:
            bad_files = len(set().union(*self.gather(self.bad_files)))
            line.append(f"{bad_reads} bad reads of {bad_files} files")
        self.say(" | ".join(line), flush=True)
        if not self.advised and self.logged > self.first_step:  # the first line has the start in it
            self.advised = True
            if row["waiting"] < 0.05:
                self.say("hardly waits for data: a prepared set would not make this run faster")
            elif row["waiting"] > 0.2:
                self.say("waits for data: `data.py prepare`, more --num_workers or --repeat_aug "
                         "would make this run faster")
        if int(self.in_row) >= MAX_NONFINITE:
            raise ValueError(f"{int(self.in_row)} steps in a row with a non-finite gradient, at "
                             f"step {self.step}, lr {row['lr']:.2e}: lower --lr or use --clip_grad "
                             f"or --dtype fp32; {self.checkpoint} is as last saved")
        if reads >= 20 and bad_reads / reads > self.args.max_bad:
            self.failure = (f"{bad_reads} of {reads} reads failed ({bad_files} files), more than "
                            f"--max_bad {self.args.max_bad}: see {self.bad_file}; `python data.py "
                            f"check` lists all. {self.checkpoint} is saved at step {self.step}")
        self.sums = self.averages = None
        self.clock, self.logged = time.time(), self.step

    def averaged(self, values: dict) -> dict:
        """The same values, tensors as their mean over all ranks."""
        tensors = {k: v.detach().float() for k, v in values.items() if torch.is_tensor(v)}
        if tensors:
            stack = torch.stack(list(tensors.values()))
            if self.world > 1:
                dist.all_reduce(stack)
            values = values | dict(zip(tensors, (stack / self.world).tolist()))
        return values

    def tally(self) -> tuple[int, int, float]:
        """-> reads and failed ones of all ranks, seconds waited of the rank that waited longest."""
        counts = [self.reads, self.bad_reads] + [0.0] * self.world
        counts[2 + self.rank] = self.waiting.seconds()
        counts = torch.tensor(counts, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(counts, group=self.host_group)
        reads, bad_reads, *waited = counts.tolist()
        return int(reads), int(bad_reads), max(waited)

    def write_row(self, row: dict):
        """Appends numbers to log.jsonl and the event files; what is not finite becomes null.

        A test made anew, as the run was killed between its row and its checkpoint, has one row.
        """
        if self.rank != 0:
            return
        self.take_over()
        line = json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}) + "\n"
        if row["step"] == self.first_step:
            same = lambda old: old["step"] == row["step"] and old.keys() == row.keys()
            self.rows = [old for old in self.rows if not same(json.loads(old))] + [line]
            write_rows(self.log_file, self.rows)
        else:
            with open(self.log_file, "a") as f:
                f.write(line)
        for k, v in row.items() if self.board else ():
            if k != "step":
                self.board.add_scalar(k, v, row["step"])

    def note_bad(self, path: str, why: str):
        """Names a file that cannot be read in bad_videos.txt, once."""
        self.bad_files.add(path)
        if path not in self.bad_seen:
            self.bad_seen.add(path)
            with open(self.bad_file, "a") as f:
                f.write(f"{path}\t{why.removeprefix(path + ': ')}\n")

    @contextlib.contextmanager
    def paused(self):
        """What is done inside does not count as training time in the log."""
        start = time.time()
        self.written()  # no processes are forked while a thread writes
        yield
        self.clock += time.time() - start

    def write(self, name: str, **state):
        """A checkpoint in out_dir, by rank 0: what the stage gives, and what tells of the run.

        It is copied here and written in the background, one after the other: see written().
        """
        if self.rank != 0:
            return
        self.take_over()
        args = vars(self.args) | self.facts | dict(accum_steps=self.accum_steps,
                                                  total_steps=self.total_steps)
        about = dict(step=self.step, epoch=self.epoch(self.step), args=args, classes=None,
                     rng=dict(seed=self.args.seed))  # all draws follow from it, step and index
        self.written()
        state = host_copy(about | state)
        self.writing = self.writer.submit(write_whole, self.path(name), state)

    def written(self):
        """Waits until what was to be written is; its error, if it had one, is raised here."""
        if self.writing:
            self.writing.result()
            self.writing = None

    def save(self, **state):
        """last.pt: the same with the states of optimiser and scaler; by --keep_every a copy."""
        first, self.saved_at = not os.path.exists(self.checkpoint), time.monotonic()
        states = [optimizer.state_dict() for optimizer in self.optimizers]
        for name in ["last.pt"] + [f"step_{self.step:07d}.pt"] * self.keeps:
            self.write(name, optimizer=states[0] if len(states) == 1 else states,
                       scaler=self.scaler.state_dict(), **state)
        if first:  # a disk that takes none is known at once
            self.written()

    # ---- after it

    @property
    def done(self) -> bool:
        """Whether this call made the last step."""
        return self.first_step < self.step == self.total_steps

    def end(self) -> int:
        """Says how it ended and closes everything; -> exit status, 128 + the signal if stopped."""
        self.written()
        stopped = self.stopping if self.step > self.first_step else 0
        if stopped:
            self.say(f"stopped by signal {stopped}; saved {self.checkpoint} at step {self.step}: "
                     "the same command goes on from there")
        elif self.first_step >= self.total_steps:
            self.say("this run is finished; --no-resume starts it anew")
        if self.board:
            self.board.close()
        self.close()
        return 128 + stopped if stopped else 0


def wrap(model, process: Process, compiled: bool):
    """-> what a loop calls in the model's place: compiled if wanted, in DDP if there are ranks."""
    net = model
    if compiled:  # as one graph: what would come in parts is an error
        net = torch.compile(model, fullgraph=True, dynamic=False)
    if process.world > 1:
        ids = [process.local_rank] if process.device.type == "cuda" else None
        norms = torch.nn.modules.batchnorm._BatchNorm  # their buffers alone ever change
        net = DistributedDataParallel(net, device_ids=ids,
                                      gradient_as_bucket_view=True)  # no second copy
        # as an argument torch 2.13 warns of it, 2.11 has no other
        net.broadcast_buffers = any(isinstance(m, norms) for m in model.modules())
    return net


def import_tensorboard():
    """SummaryWriter, or a ValueError that says what to install."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs `pip install tensorboard`") from None
    return SummaryWriter


def physical_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, StopIteration):  # ru_maxrss begins at what the parent had
        with open("/proc/self/status") as f:
            return int(next(line for line in f if line.startswith("VmHWM")).split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
