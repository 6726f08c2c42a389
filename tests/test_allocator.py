"""How memory is taken: of a GPU before it is used first, unless the user has said it; of a CPU."""

import platform
import subprocess
import sys

import pytest

from stage_rl.allocator import keep_freed_memory, let_segments_grow


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_grow_unless_the_user_has_said_how(name):
    environment = {}
    let_segments_grow(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    environment = {name: "max_split_size_mb:64"}
    let_segments_grow(environment)
    assert environment == {name: "max_split_size_mb:64"}


# Four buffers of 8 MB, taken and freed twenty times: 2,000 pages each of 4 KB.
FAULTS = """
import resource
import numpy
from stage_rl.allocator import keep_freed_memory
if {keep}:
    assert keep_freed_memory()
for _ in range(20):
    buffers = [numpy.ones(1_000_000) for _ in range(4)]
    del buffers
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(keep):
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    return int(subprocess.run(command, check=True, capture_output=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no GNU C library")
def test_memory_taken_again_is_not_cleared_again():
    # Cleared each time, the buffers cost up to 20 x 4 x 2,000 faults, kept 4 x 2,000.
    assert faults(True) < faults(False) - 20_000


def test_where_the_library_has_no_such_setting_nothing_happens(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
