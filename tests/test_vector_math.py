import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stage_rl.vector_math import FUNCTIONS

HEADER = Path(torch.__file__).parent / "include/ATen/cpu/vml.h"


@pytest.mark.skipif(not HEADER.exists(), reason="this torch ships no header of its vector math")
def test_every_function_that_torch_has_mkl_compute_is_named():
    named = re.findall(r"^IMPLEMENT_VML_MKL\((\w+), \w+\)", HEADER.read_text(), re.MULTILINE)
    assert sorted(FUNCTIONS) == sorted(named)


@pytest.mark.parametrize("module", ["stage_rl.types", "stage_rl.algorithm"])
def test_what_computes_calls_each_function_first_on_one_number(module):
    script = f"""
import torch
from stage_rl import vector_math
calls = []
def counted(name, function):
    def call(number):
        calls.append((name, number.dtype, number.numel()))
        return function(number)
    return call
for name in vector_math.FUNCTIONS:
    setattr(torch, name, counted(name, getattr(torch, name)))
import {module}
wanted = [(n, d, 1) for d in (torch.float32, torch.float64) for n in vector_math.FUNCTIONS]
assert calls[: len(wanted)] == wanted, calls
"""
    subprocess.run([sys.executable, "-c", script], check=True)
