"""lib/feed.py: batches, the clock of the loader, the end of its workers."""

import subprocess
import sys
import time
import unittest.mock

import numpy as np
import torch

from lib import feed
from tests.common import HERE, test


@test
def test_batches():
    """Epochs are permutations; ranks, accumulation cut one stream; a later start continues it."""
    def stream(b, acc, world, first=0, last=6):
        ranks = [feed.Batches(7, b, acc, r, world, first, last, 0) for r in range(world)]
        return [sum(batches, []) for batches in zip(*ranks, strict=True)]
    one = sum(stream(4, 1, 1), [])
    assert [sorted(i for e, i in one if e == epoch) for epoch in range(3)] == [list(range(7))] * 3
    assert one == sum(stream(2, 1, 2), []) == sum(stream(2, 2, 1), []) == sum(stream(1, 2, 2), [])
    assert one[8:] == sum(stream(4, 1, 1, first=2), []) and one[:7] != [(0, i) for i in range(7)]


@test
def test_batches_of_shards():
    """Epochs are permutations, few shards at a time; ranks, later starts as of other batches."""
    n, size = 1000, 10
    shards = np.arange(n) // size
    def stream(b, world, first=0, last=300, shards=shards):
        ranks = [feed.Batches(n, b, 1, r, world, first, last, 3, shards) for r in range(world)]
        return sum((sum(batches, []) for batches in zip(*ranks, strict=True)), [])
    one = stream(8, 1)
    assert one == stream(4, 2) == stream(2, 4) and one[80:] == stream(8, 1, first=10)
    orders = [[i for e, i in one if e == epoch] for epoch in range(2)]
    assert all(sorted(order) == list(range(n)) for order in orders) and orders[0] != orders[1]
    for order in orders:
        for start in range(0, n, feed.WINDOW * size):
            some = shards[order[start:start + feed.WINDOW * size]]
            assert len(set(some)) == min(feed.WINDOW, len(some) // size)
            assert (np.diff(some) != 0).mean() > 0.5, "mixed within a window"
        runs = shards[order][::feed.WINDOW * size]
        assert (np.diff(runs) < 0).any() and (np.diff(runs) > 0).any(), "shards are permuted"
    mixed = np.where(np.arange(n) % 2, shards, -1)  # every other sample is of no shard
    order = [i for e, i in stream(8, 1, shards=mixed) if e == 0]
    assert sorted(order) == list(range(n))
    share = [np.mean(mixed[order[i:i + 100]] < 0) for i in range(0, n, 100)]
    assert 0.25 < min(share) and max(share) < 0.75
    plain = [np.random.default_rng([3, epoch]).permutation(n) for epoch in range(3)]
    assert stream(8, 1, last=250, shards=None) == [(e, i) for e in range(2) for i in plain[e]]


@test
def test_waiting_for_data():
    """On a CPU the time in the loader counts, on a GPU what its kernels waited for."""
    cpu = feed.Waiting(torch.device("cpu"))
    for _ in range(2):
        with cpu:
            time.sleep(0.05)
    assert 0.1 <= cpu.seconds() < 0.2 and cpu.seconds() == 0
    busy_until = [0.0]  # of a pretended device, in seconds of the host's clock

    class Event:
        def __init__(self, enable_timing): assert enable_timing
        def record(self): self.at = max(time.perf_counter(), busy_until[0])
        def elapsed_time(self, later): return 1000 * (later.at - self.at)
        def synchronize(self): pass
    with unittest.mock.patch.object(torch.cuda, "Event", Event):
        gpu = feed.Waiting(torch.device("cuda"))
        # work queued before the wait: idle for .04, .02, 0 s
        for work, wait in ((0.0, 0.04), (0.03, 0.05), (0.2, 0.05)):
            busy_until[0] = time.perf_counter() + work
            with gpu:
                time.sleep(wait)
        assert 0.06 <= gpu.seconds() < 0.09, "the device's own idle time"


@test
def test_errors_end_the_process():
    """An unexpected error ends a process with data workers instead of hanging it."""
    code = """
import torch
from lib import feed
class Ones(torch.utils.data.Dataset):
    def __getitem__(self, key): return torch.ones(1), []
batches = [[(0, i)] for i in range(1000)]
stream = iter(feed.make_loader(Ones(), batches, 2, torch.device("cpu")))
next(stream)
raise RuntimeError("out of memory")
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                             timeout=100)
    assert process.returncode == 1 and "out of memory" in process.stderr
    assert "killed by signal" not in process.stderr, "the workers' end is taken for the cause"
