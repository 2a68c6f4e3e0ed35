"""Checkpoints and logs on disk: written whole or not at all, checked before they are used."""

import argparse
import copy
import json
import os
import re
import zipfile

import torch

PARTS = dict(model=dict, optimizer=(dict, list), scaler=dict, step=int, config=dict, args=dict)


def write_whole(path: str, state: dict):
    """A file that is whole at any moment: written beside, flushed, renamed."""
    with open(path + ".part", "wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".part", path)


def host_copy(state):
    """The same nested thing, its tensors copied to memory where no training step changes them."""
    if torch.is_tensor(state):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        same = copy.copy(state)  # with what torch hangs on a state_dict
        same.update((k, host_copy(v)) for k, v in state.items())
        return same
    return type(state)(map(host_copy, state)) if isinstance(state, (list, tuple)) else state


def load_torch(path: str, mmap: bool = False):
    """What a file of torch.save holds, on the CPU; ValueError says what is wrong with it.

    Pickled code is not executed. torch stores a CRC-32 of each record and reads on over damage;
    zipfile compares them (3 GB/s). Files older than torch 1.6 have none, others may go without.
    mmap: tensors are read from the file where they are used, for those that go to a GPU at once:
    once the file is replaced on another node's disk, they can no longer be.
    """
    damaged = None
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
        raise ValueError(f"{path}: not a file, expected one of torch.save")
    try:
        if zipped := zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                summed = any(record.CRC for record in file.infolist())
                damaged = summed and file.testzip()
        if not damaged:
            with torch.serialization.safe_globals([argparse.Namespace]):  # released files' args
                return torch.load(path, map_location="cpu", weights_only=True,
                                  mmap=mmap and zipped)
    except OSError:
        raise
    except Exception as e:  # torch raises whatever the broken bytes lead to
        code = re.search(r"GLOBAL (\S+)", str(e))
        why = "cut off, damaged, or not written by torch.save"
        if code:
            why = f"it holds a pickled {code[1]}, and only tensors and plain values are read"
        raise ValueError(f"{path}: not a checkpoint that can be read ({why})") from None
    raise ValueError(f"{path}: damaged on the disk: the checksum of its record {damaged} differs; "
                     "take another copy of this file")


def read_checkpoint(path: str, script: str, flags, parts={}, mmap: bool = False) -> dict:
    """The checkpoint of a script with these flags; ValueError says what is wrong with it.

    parts: {name: kind} of what it has to hold beside PARTS. A checkpoint may lack a flag that is
    newer than it, but none of its own may be unknown here: another script wrote it then.
    """
    try:
        saved = load_torch(path, mmap)
    except ValueError as e:
        raise ValueError(f"{e}; --no-resume moves it aside") from None
    saved, wanted = saved if isinstance(saved, dict) else {}, PARTS | parts
    args = saved.get("args")
    unknown = sorted(set(args) - {*flags, "total_steps"}) if isinstance(args, dict) else []
    if unknown:
        raise ValueError(f"{path}: a checkpoint of another script than {script}, which has no "
                         f"{', '.join(map(str, unknown[:5]))}: choose another --out_dir, or "
                         "--no-resume, which moves it aside")
    lacks = [k for k, kind in wanted.items() if k not in saved or not isinstance(saved[k], kind)]
    if not lacks and not isinstance(saved["args"].get("total_steps"), int):
        lacks = ["args.total_steps"]
    step = saved.get("step")
    if not lacks and (isinstance(step, bool) or not 0 <= step <= saved["args"]["total_steps"]):
        lacks = ["step"]
    if lacks:
        raise ValueError(f"{path}: not a checkpoint of {script}: {', '.join(lacks)} is missing or "
                         "of another kind; --no-resume moves it aside")
    return saved


def write_rows(path: str, rows: list[str]):
    """A log.jsonl of these lines, whole at any moment."""
    with open(path + ".part", "w") as f:
        f.writelines(rows)
    os.replace(path + ".part", path)


def read_rows(path: str, step: int) -> list[str]:
    """The lines of a log.jsonl up to a step: later ones will be written again, as a torn last one.

    ValueError names a row that is none.
    """
    if not os.path.exists(path):
        return []
    rows = []
    with open(path, "rb") as f:
        for i, line in enumerate(f, 1):
            row = line.decode(errors="replace")
            if not row.endswith("\n"):
                break
            try:
                keep = json.loads(line)["step"] <= step
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path} row {i}: {row.strip()[:60]!r}: expected an object with a "
                                 "step; remove that row, or move the file away") from None
            rows += [row] if keep else []
    return rows
