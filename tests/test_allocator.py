"""Memory of tensors on the CPU is used again, not cleared anew by the system."""

import os
import platform
import subprocess
import sys

import pytest

# The fewest pages that the system had to give for one of several tensors of 2**24 numbers, each freed before the next.
PROGRAM = """
import resource, sys, torch
from lmppo.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    keep_freed_memory()
given = []
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    given.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(given))
"""


def pages(how, **environment):
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", PROGRAM, how]
    return int(subprocess.run(command, env=others | environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_the_next_tensor_takes_the_place_of_the_one_that_was_freed():
    assert pages("keep") < 100 < pages("default")
    assert pages("keep", MALLOC_MMAP_THRESHOLD_="65536") > 100, "unless the environment says what is to be done"


def test_elsewhere_nothing_happens(monkeypatch):
    from lmppo.allocator import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr("ctypes.CDLL", None)
    keep_freed_memory()
