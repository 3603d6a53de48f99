import ctypes
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from llmcompress import heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(6 << 20).add(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

heap.keep_freed_memory()
faults(), faults()  # a small allocation may come to lie in a hole
again, held = faults(), resident()
heap.trim()
print(again, held - resident())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt")
def test_freed_tensors_pages_are_used_again_until_they_are_given_back():
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    faults, given_back = map(int, found.split())
    assert faults < 49_152 / 4  # pages of four tensors of 24 MiB and their sums
    assert given_back > 40 << 20
