"""python test_all.py [filter]: what the code says of itself, checked in a few minutes on two cores.

Comparisons are with slow float64 references, hand-computed values, published numbers, and
transformers' VideoMAE where it is installed. The tests lie in tests/, a file per room.
"""

import argparse
import importlib
import os
import sys
import time
import traceback

import torch

from tests.common import HERE, TESTS, Skip


def load() -> int:
    """Imports the files of tests/, which register their tests -> how many could not be."""
    failed = 0
    for name in sorted(os.listdir(os.path.join(HERE, "tests"))):
        if not name.startswith("test_") or not name.endswith(".py"):
            continue
        try:
            importlib.import_module(f"tests.{name.removesuffix('.py')}")
        except Exception:
            failed += 1
            print(f"FAIL  tests/{name} cannot be imported\n{traceback.format_exc()}")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("filter", nargs="?", default="", help="run the tests whose name holds this")
    part = parser.parse_args().filter
    torch.set_num_threads(1)  # on a busy machine two threads wait for each other
    failed, passed, skipped, start = load(), 0, 0, time.time()
    for test in [t for t in TESTS if part in t.__name__]:
        began = time.time()
        try:
            test()
        except Skip as e:
            skipped += 1
            print(f"skip  {test.__name__}: {e}")
        except Exception:  # whatever a test raises, it has failed, and the others still run
            failed += 1
            print(f"FAIL  {test.__name__}: {test.__doc__}\n{traceback.format_exc()}")
        else:
            passed += 1
            took = time.time() - began
            print(f"ok    {test.__name__} ({took:.1f} s): {test.__doc__}", flush=True)
    print(f"{time.time() - start:.0f} s")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
