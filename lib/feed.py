"""From data sets to the device: what makes a batch, workers, copies, how long a step waited.

What is drawn for a sample depends on (seed, epoch, index) alone, never on the number of workers.
"""

import atexit
import multiprocessing
import signal
import time

import numpy as np
import torch

from video.decode import VideoError

WINDOW = 8  # shards of the form `files` whose samples are mixed


# ---- samples ----

class Samples(torch.utils.data.Dataset):
    """(epoch, index) -> (item, bad): a training sample, and (path, reason) of all that failed.

    A video that cannot be read is reported and another, drawn from (seed, epoch, index), takes its
    place; after ten such in a row the item is None.

    Subclasses have load(index, rng) -> the item; VideoError where paths[index] cannot be read. With
    several kinds of files, `paths` is a list per kind, keys are (epoch, index, kind), and
    load(index, rng, kind) is called. What notes() gives, where there is one, is said at the start.
    """

    def __init__(self, paths, seed: int):
        self.paths, self.seed = paths, seed

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, key: tuple):
        _, index, *kind = key
        paths, bad = self.paths[kind[0]] if kind else self.paths, []
        for attempt in range(10):
            rng = np.random.default_rng([self.seed, *key, attempt])
            i = index if attempt == 0 else int(rng.integers(len(paths)))
            try:
                return self.load(i, rng, *kind), bad
            except VideoError as e:
                bad.append((paths[i], str(e)))
        return None, bad


def collate(samples: list):
    """[(item, bad), ...] -> the items concatenated, tensor by tensor, and all that was bad.

    None instead of the items if one of them is None.
    """
    items, bad = [item for item, _ in samples], [b for _, bad in samples for b in bad]
    if any(item is None for item in items):
        return None, bad
    if torch.is_tensor(items[0]):
        return torch.cat(items), bad
    return tuple(torch.cat(parts) for parts in zip(*items)), bad


# ---- which samples make a batch ----

class Batches:
    """Batch sampler without end-of-epoch gaps: the permutations of all epochs, cut into batches.

    Position p of that stream is sample (epoch, index) = (p // n, permutation(seed, epoch)[p % n]).
    Step s takes `accum` * `world` batches; this rank's are yielded in order. So 1 rank x 2B, 2
    ranks x B and 2 accumulated x B see the same samples, sets smaller than a batch work, and a
    resumed run starts at any step.

    shards (n,): the shard that each sample is read from, -1: none, of prepared.shards. The shards
    are permuted then, and the samples within WINDOW of them, so that few are read from at a time;
    those of none are spread over all windows.
    """

    def __init__(self, n: int, batch_size: int, accum: int, rank: int, world: int,
                 first_step: int, last_step: int, seed: int, shards: np.ndarray | None = None):
        self.n, self.batch_size, self.accum, self.shards = n, batch_size, accum, shards
        self.rank, self.world = rank, world
        self.first_step, self.last_step, self.seed = first_step, last_step, seed

    def __len__(self):
        return (self.last_step - self.first_step) * self.accum

    def __iter__(self):
        orders = {}  # epoch -> its permutation
        for micro in range(self.first_step * self.accum, self.last_step * self.accum):
            start = (micro * self.world + self.rank) * self.batch_size
            batch = []
            for p in range(start, start + self.batch_size):
                epoch, i = divmod(p, self.n)
                if epoch not in orders:
                    orders = {e: order for e, order in orders.items() if e >= epoch - 1}
                    orders[epoch] = self.permutation(epoch)
                batch.append((epoch, int(orders[epoch][i])))
            yield batch

    def permutation(self, epoch: int) -> np.ndarray:
        """(n,) the order of an epoch's samples."""
        rng = np.random.default_rng([self.seed, epoch])
        if self.shards is None:
            return rng.permutation(self.n)
        window = rng.permutation(self.shards.max() + 1) // WINDOW  # of each shard
        anywhere = rng.integers(window.max() + 1, size=self.n)
        return np.lexsort((rng.random(self.n),
                           np.where(self.shards < 0, anywhere, window[self.shards])))


class MixedBatches:
    """Batches of (epoch, index, False) of videos, then (epoch, index, True) of images.

    They come from a stream each; one of the two may be None.
    """

    def __init__(self, videos: Batches | None, images: Batches | None):
        self.streams = [(stream, is_image)
                        for stream, is_image in ((videos, False), (images, True))
                        if stream is not None]

    def __len__(self):
        return len(self.streams[0][0])

    def __iter__(self):
        for parts in zip(*(stream for stream, _ in self.streams)):
            yield [(*key, is_image)
                   for part, (_, is_image) in zip(parts, self.streams) for key in part]


# ---- workers ----

def make_loader(dataset, batches, num_workers: int, device: torch.device):
    """A DataLoader of collated batches; `batches` yields lists of the data set's keys."""
    return torch.utils.data.DataLoader(
        dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=collate,
        worker_init_fn=ignore_signals, pin_memory=device.type == "cuda",
        prefetch_factor=2 if num_workers else None)


def ignore_signals(worker: int):
    """For data workers: a terminal and a job scheduler signal all processes.

    The main one decides, workers go on.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_workers():
    """Kills the workers: multiprocessing would send them SIGTERM at exit, and wait for them.

    They ignore that signal.
    """
    if hasattr(signal, "SIGCHLD"):  # or the loader's handler takes this for an accident
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for process in multiprocessing.active_children():
        process.kill()


atexit.register(end_workers)  # after multiprocessing's own, so it is called before that


# ---- on the way to the device ----

SIDE_STREAMS: dict = {}  # device -> the CUDA stream of its copies


def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor from the loader to the device; on CUDA its copy overlaps with the step before.

    There the copy has a stream of its own, so it does not queue behind the kernels that the host
    has launched already.
    """
    if device.type != "cuda":
        return x.to(device)
    side = SIDE_STREAMS.setdefault(device, torch.cuda.Stream(device))
    with torch.cuda.stream(side):
        x = x.to(device, non_blocking=True)
    torch.cuda.current_stream(device).wait_stream(side)
    x.record_stream(torch.cuda.current_stream(device))
    return x


class Waiting:
    """How long the device had nothing to do because a batch was not there.

    Used as `with waiting: batch = next(loader)`. The host runs ahead of a GPU and may wait for data
    while that still works. There the gap between the last kernel before the wait and the first one
    after it counts, if it is shorter than the host's wait.
    """

    def __init__(self, device: torch.device):
        self.cuda, self.waits = device.type == "cuda", []

    def event(self):
        """A mark in the device's queue; None on a CPU."""
        if not self.cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        self.before, self.start = self.event(), time.perf_counter()

    def __exit__(self, *exc):
        self.waits.append((time.perf_counter() - self.start, self.before, self.event()))

    def seconds(self) -> float:
        """The sum since the last call; on CUDA this waits for the start of the last step."""
        if self.cuda and self.waits:
            self.waits[-1][2].synchronize()
        total = sum(min(host, before.elapsed_time(after) / 1000) if before else host
                    for host, before, after in self.waits)
        self.waits = []
        return total
