"""Freed memory is kept: a step that frees large blocks and takes them again does not fault its pages in anew."""

import subprocess
import sys

import pytest

CODE = """
import resource, torch
from sagan_attn.training.allocator import keep_freed_memory
assert keep_freed_memory()
def step():
    kept = [torch.ones(6_000_000) for _ in range(4)]  # 24 MB each
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_pages_are_not_faulted_in_again():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    pages = 5 * 4 * 24_000_000 // 4096  # which are faulted in anew by default, but for luck with the heap
    assert int(done.stdout) < pages / 20
