"""The steps between the matmuls of a decode on a CPU, by what Numba compiles."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from stage_rl.openmp import threads_beside_others
from stage_rl.rollout import numba_kernels as kernels
from stage_rl.rollout.attention import (
    Attend,
    Backend,
    HeadNorms,
    Heads,
    KeyValueCache,
    SharedPrompts,
)
from stage_rl.rollout.sampling import Drawn, Sampling

NO_NORM = np.empty(0, np.float32)


class NumbaBackend(Backend):
    """The same steps as kernels, which read the live positions alone and need no `num_live`.

    A cache in fp8 is not for them.
    """

    layout = "transposed"

    def __init__(self) -> None:
        threads = torch.get_num_threads()
        use_threads()  # the first time it starts Numba's, which gives torch one for each core
        torch.set_num_threads(threads)

    def norm(
        self,
        states_MD: Tensor,
        weight_D: Tensor,
        *,
        eps: float,
        dtype: torch.dtype,
        delta_MD: Tensor | None = None,
        delta_norm_D: Tensor | None = None,
    ) -> Tensor:
        if delta_norm_D is not None:
            assert delta_MD is not None
            delta_MD = super().norm(delta_MD.float(), delta_norm_D, eps=eps, dtype=torch.float32)
        out = torch.empty_like(states_MD, dtype=dtype)
        delta = states_MD[:0] if delta_MD is None else delta_MD
        kernels.add_and_norm(
            *map(as_array, (states_MD, delta, weight_D)), np.float32(eps), as_array(out)
        )
        return out

    def swiglu(self, gate_up_MF: Tensor) -> Tensor:
        out = gate_up_MF.new_empty(len(gate_up_MF), gate_up_MF.shape[1] // 2)
        kernels.silu_times(as_array(gate_up_MF), as_array(out))
        return out

    def draw(self, logits_RV: Tensor, uniforms_N: Tensor, sampling: Sampling) -> Drawn:
        """The tokens of torch but where a uniform number lies within rounding of a cumulative
        probability; top-k, top-p and the likeliest token are left to torch.
        """
        if not sampling.whole:
            return super().draw(logits_RV, uniforms_N, sampling)
        assert len(logits_RV) == (2 if sampling.guided else 1) * len(uniforms_N), logits_RV.shape
        tokens_N = torch.empty(len(uniforms_N), dtype=torch.long)
        statistics_4N = torch.empty(4, len(uniforms_N))
        kernels.draw_column(
            as_array(logits_RV),
            as_array(uniforms_N),
            np.float32(sampling.guidance_scale),
            np.float32(sampling.temperature),
            as_array(tokens_N),
            as_array(statistics_4N),
            use_threads(),
        )
        logprobs_N, guided_logprobs_N, entropy_N, guided_entropy_N = statistics_4N
        asked = guided_entropy_N if sampling.guided_entropy else None
        return Drawn(tokens_N, logprobs_N, guided_logprobs_N, entropy_N, asked)

    def attention(
        self,
        heads: Heads,
        cache: KeyValueCache,
        positions_R: Tensor,
        coords_RA: Tensor,
        prompts: SharedPrompts,
        num_live: int,
    ) -> Attend:
        threads = use_threads()
        rotation = [as_array(table_R1E[:, 0]) for table_R1E in heads.rotation(coords_RA)]
        eps, positions = np.float32(heads.norm_eps), as_array(positions_R)

        def attend_layer(layer: int, qkv_RC: Tensor, norms: HeadNorms) -> Tensor:
            out = qkv_RC.new_empty(len(qkv_RC), heads.num_heads * heads.head_dim)
            held = (*self.cache_arrays(cache, layer), as_array(out))
            rotate = (*rotation, *norm_arrays(norms), eps)
            kernels.attend(as_array(qkv_RC), *rotate, positions, *held, threads)
            return out

        return attend_layer

    def cache_arrays(self, cache: KeyValueCache, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys (RKWEU) and values (RKSE) of a layer as the kernels take them."""
        keys = cache.keys[layer].permute(1, 2, 0, 4, 3)
        values = cache.values[layer].permute(1, 2, 0, 3, 4).flatten(2, 3)
        return as_array(keys), as_array(values)


def norm_arrays(norms: HeadNorms) -> tuple[np.ndarray, ...]:
    """The weights of queries and of keys, of no width where there are none."""
    weights = norms.q_norm_E, norms.k_norm_E
    return tuple(NO_NORM if weight is None else as_array(weight) for weight in weights)


def use_threads() -> int:
    """Sets how many threads the kernels have. Beside others fewer: one without a core is waited
    for, and no number depends on how many there are.
    """
    threads = min(threads_beside_others(torch.get_num_threads()), kernels.MOST_THREADS)
    numba.set_num_threads(threads)
    return threads


def as_array(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor; of one in bf16 its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
