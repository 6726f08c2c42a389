"""The kernels compile for GPUs that are not here; what they compute, the interpreter tests."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from stage_rl.rollout import draw_kernel, kernels

CACHES = [{"keys": kind, "values": kind, "key_scales": "*fp32", "value_scales": "*fp32"}
          for kind in ("*bf16", "*fp8e4nv")]
HEADS = {"BLOCK": 32, "WIDTH": 128, "PADDED": 128}
CASES = [
    (
        kernels._attend,
        {"query": "*fp32", **cache, "positions": "*i64",
         "prompt_lengths": "*i64", "prompt_rows": "*i64", "out": "*fp32", "sums": "*fp32",
         "scale": "fp32", "heads_of_row": "i32", "num_lanes": "i32"},
        {"QUERIES": 1, "PARTS": 4, "TILE": form.tile, "STAGES": form.stages,
         "MASKED": form.masked, "SHARED": form.shared, "SCALED": "fp8" in cache["keys"], **HEADS},
    )
    for form in kernels.FORMS.values() for cache in CACHES
] + [
    (
        kernels._rotate,
        {"qkv": "*bf16", "q_norm": "*fp32", "k_norm": "*fp32", "cosines": "*fp32",
         "sines": "*fp32", "positions": "*i64", "coords": "*i64", "axes": "*i64", "query": "*fp32",
         **cache, "eps": "fp32"},
        {"NUM_HEADS": 32, "NUM_KV_HEADS": 32, "AXES": 1, "Q_NORM": True, "K_NORM": True,
         "LARGEST": 448.0 if "fp8" in cache["keys"] else 0.0, "SMALLEST": 1e-12, **HEADS},
    )
    for cache in CACHES
] + [
    (
        kernels._norm,
        {"states": "*fp32", "delta": "*bf16", "delta_norm": "*bf16", "weight": "*fp32",
         "out": "*bf16", "eps": "fp32"},
        {"WIDTH": 4096, "PADDED": 4096, "ADDS": True, "DELTA_NORM": False},
    ),
    (
        draw_kernel._draw,
        {"logits": "*fp32", "uniforms": "*fp32", "tokens": "*i64", "logprobs": "*fp32",
         "guided_logprobs": "*fp32", "entropies": "*fp32", "guided_entropies": "*fp32",
         "scale": "fp32", "temperature": "fp32"},
        {"WIDTH": 16384, "TILE": 2048, "GUIDED": True, "GUIDED_ENTROPY": True},
    ),
    (kernels._swiglu, {"gate_up": "*bf16", "out": "*bf16", "width": "i32"}, {"SIZE": 1024}),
]
spills = {}
for kernel, signature, constants in CASES:
    names = kernel.arg_names
    types = {name: signature.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    # Tensors begin at multiples of 16 bytes, as a launch would find.
    pointers = [names.index(name) for name, kind in signature.items() if kind.startswith("*")]
    aligned = {(index,): [["tt.divisibility", 16]] for index in pointers}
    source = ASTSource(kernel, types, values, aligned)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True})
    spills[kernel.__name__] = spills.get(kernel.__name__, False) or ".local" in made.asm["ptx"]
    if kernel is kernels._attend:
        loads_ahead = "cp.async" in made.asm["ptx"]
        assert loads_ahead, values
print(json.dumps(spills))
"""


@pytest.mark.slow
def test_the_kernels_compile_for_an_h100_without_local_memory(tmp_path):
    quiet = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=quiet | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spills = json.loads(done.stdout)
    assert spills == dict.fromkeys(("_attend", "_rotate", "_norm", "_draw", "_swiglu"), False)
