"""The rollout engine: samples image tokens with its own copies of a policy's weights.

Shape suffixes: P prompts, G group, N = P x G completions, R rows (N conditional, then with
guidance N unconditional), L prompt positions, T image tokens, D model width, V codebook size.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad

from stage_rl.allocator import keep_freed_memory
from stage_rl.errors import InputError
from stage_rl.openmp import sleep_beside_others
from stage_rl.policies.base import Policy, Prefix, TokenLayout
from stage_rl.rollout.attention import Backend, KeyValueCache, SharedPrompts
from stage_rl.rollout.decoder import CACHE_DTYPES, LINEAR_DTYPES, Decoder
from stage_rl.rollout.sampling import Sampling

BACKENDS = ("eager", "numba", "triton")

FAST_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Any of these capabilities multiplies bf16 matrices at least as fast as fp32 ones."""

OPENMP_OF_NUMBA = "numba.np.ufunc.omppool"
NO_NUMBA = (
    "sampling is faster with Numba and the system's OpenMP; write: pip install 'stage-rl[cpu]', "
    "and where libgomp.so.1 is missing apt install libgomp1"
)

IMAGES_ON_CPU = 64
"""Images of one pass on a CPU."""

CACHE_SHARE = 0.9
"""Share of the free memory of a GPU that the cache may take."""

KINDS_OF_PASS = 4
"""Kinds of passes whose buffers and graph are kept."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassStats:
    """The extent of one pass, for what it read and computed."""

    num_rows: int
    num_tokens: int
    """With control tokens: the columns of the image."""
    lengths_B: Tensor
    """Positions of each prompt that was prefilled, with guidance twice."""


class Engine:
    """Samples groups of images from a policy.

    `dtype` is `float32`, or `mixed` for bf16 linear layers. A GPU runs kernels of our own
    (`backend` None or `triton`) and replays each step from a CUDA graph; a CPU torch's operations
    (`eager`), or where they are faster what Numba compiles (`numba`). `cache_dtype` is `auto`, that
    of the linear layers, or `fp8`. The weights are those of the last `reload`; buffers keep their
    addresses.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        dtype: str = "float32",
        cache_dtype: str = "auto",
        max_images: int | None = None,
        backend: str | None = None,
        cuda_graph: bool | None = None,
    ):
        if dtype not in LINEAR_DTYPES:
            raise InputError(f"dtype: unknown '{dtype}'; write one of: {', '.join(LINEAR_DTYPES)}")
        if cache_dtype not in CACHE_DTYPES:
            known = ", ".join(CACHE_DTYPES)
            raise InputError(f"cache_dtype: unknown '{cache_dtype}'; write one of: {known}")
        if policy.device.type == "cpu":
            keep_freed_memory()
            if dtype == "mixed":
                _warn_of_slow_bf16()
        self.policy, self.dtype, self.cache_dtype = policy, dtype, cache_dtype
        self.max_images = max_images
        """Images of one pass; None: what the memory of a GPU holds, 64 on a CPU."""
        self._backend = _pick_backend(backend, policy.device, cache_dtype)
        self._columns = Columns.of(policy.layout, policy.device)
        self._cuda_graph = policy.device.type == "cuda" if cuda_graph is None else cuda_graph
        self._decoder: Decoder | None = None
        self._cache: KeyValueCache | None = None
        self._passes: dict[Hashable, DecodeState] = {}
        self.passes: list[PassStats] = []
        """The passes since the last reload."""
        self.reload()

    def reload(self) -> None:
        """Copies the policy's weights as they are now, in place; call it once per step.

        Nothing else of the engine reads them.
        """
        with self.policy.unsharded():
            if self._decoder is None:
                weights = self.policy.decoder_weights()
                self._decoder = _decoder_class(self._backend)(
                    weights,
                    dtype=self.dtype,
                    backend=self._backend,
                    cache_dtype=self.cache_dtype,
                )
            self._decoder.load(self.policy.decoder_weights())
        self.passes = []

    @property
    def decoder(self) -> Decoder:
        """The copies and what is computed with them."""
        assert self._decoder is not None
        return self._decoder

    def images_per_pass(self, prefix: Prefix, sampling: Sampling) -> int:
        """The most images of one pass; an InputError where the memory of the GPU holds none."""
        if self.max_images is not None:
            return self.max_images
        if self.policy.device.type != "cuda":
            return IMAGES_ON_CPU
        embeds_BLD, lengths_B = _rows_of(prefix, sampling)
        num_positions = embeds_BLD.shape[1] + self._columns.num_columns - 1
        rows_per_image = len(lengths_B) // len(prefix.lengths_P)
        bytes_per_image = self.decoder.cache_shape.row_bytes(num_positions) * rows_per_image
        return images_that_fit(self._free_bytes(), bytes_per_image)

    @torch.no_grad()
    def generate(
        self, prefix: Prefix, *, group_size: int, sampling: Sampling, uniforms_NT: Tensor
    ) -> Generated:
        """Samples `group_size` images for each prompt, one uniform number per token.

        Each row has its own length and positions: a batch gives what each prompt gives alone.
        """
        if self.policy.device.type == "cpu":
            sleep_beside_others(torch.get_num_threads())
        embeds_BLD, lengths_B = _rows_of(prefix, sampling)
        longest, columns = embeds_BLD.shape[1], self._columns
        num_rows = len(embeds_BLD) * group_size
        self.passes.append(PassStats(num_rows, columns.num_columns, lengths_B))
        cache = self._cache_for(num_rows, longest + columns.num_columns - 1)
        state = self._pass_of(cache, sampling, uniforms_NT)
        states_BD = self.decoder.prefill(
            embeds_BLD,
            lengths_B,
            columns.prompt_coords(longest),
            state.cache,
            group_size=group_size,
        )
        logits_BV = self.decoder.logits(states_BD)
        state.begin(_to_device(uniforms_NT, embeds_BLD.device), logits_BV, lengths_B)
        for column in range(columns.num_columns - 1):
            state.advance(longest + column + 1)
        state.draw()
        return state.result()

    @property
    def states(self) -> Sequence[DecodeState]:
        """The passes whose buffers are kept, the last one behind."""
        return tuple(self._passes.values())

    @property
    def cache_bytes(self) -> int:
        """Memory that the cache takes between two calls."""
        return self._cache.num_bytes if self._cache else 0

    def release(self) -> None:
        """Gives the memory of the cache back; the next pass allocates and captures anew."""
        # What was captured reads the old cache.
        self._passes.clear()
        self._cache = None

    def _cache_for(self, num_rows: int, num_positions: int) -> KeyValueCache:
        """A cache of so many rows and positions, in the last one's memory where they find room."""
        if self._cache is None or not self._cache.fits(num_rows, num_positions):
            self.release()
            self._cache = self.decoder.new_cache(num_rows, num_positions)
        return self._cache.rows(num_rows)

    def _pass_of(
        self, cache: KeyValueCache, sampling: Sampling, uniforms_NT: Tensor
    ) -> DecodeState:
        """The buffers of the last pass of this kind, where there was one."""
        key = (tuple(uniforms_NT.shape), cache.num_rows, sampling)
        if key not in self._passes:
            if len(self._passes) == KINDS_OF_PASS:
                del self._passes[next(iter(self._passes))]
            state = DecodeState(self.decoder, cache, sampling, self._columns, len(uniforms_NT))
            if self._cuda_graph:
                # A captured step reads whatever the cache could hold. It does not hold the pass
                # that holds it: what is released is then free at once.
                advance, own = DecodeState.advance, weakref.proxy(state)
                graph = CUDAGraph(functools.partial(advance, own, cache.num_positions))
                state.advance = lambda num_live: graph()
            self._passes[key] = state
        self._passes[key].cache = cache
        return self._passes[key]

    def _free_bytes(self) -> int:
        """Memory that a cache can have: what is free, cached by torch, or the present cache's."""
        device = self.policy.device
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused + self.cache_bytes


def images_that_fit(free_bytes: int, bytes_per_image: int) -> int:
    """Images whose cache fits into the free memory, less a share for logits and fragments."""
    images = int(free_bytes * CACHE_SHARE) // bytes_per_image
    if images < 1:
        raise InputError(
            f"rollout: the cache of one image needs {bytes_per_image / 2**30:.1f} GiB, and "
            f"{free_bytes / 2**30:.1f} GiB of the GPU are free; write rollout.dtype=mixed, or "
            "take a smaller model"
        )
    return images


@functools.cache
def _warn_of_slow_bf16() -> None:
    """Warns once where torch knows the processor and it has no bf16 arithmetic."""
    # Not every torch that the package allows has it.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities and not any(capabilities.get(name) for name in FAST_BF16):
        log.warning(
            "this CPU has no bf16 arithmetic (AVX512-BF16, AMX), so mixed precision is slow; write "
            "rollout.dtype=float32 training.dtype=float32, or --dtype float32"
        )


def _rows_of(prefix: Prefix, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Embeddings and lengths of the prefill: conditional, then with guidance unconditional rows."""
    if not sampling.guided:
        return prefix.embeds_PLD, prefix.lengths_P
    both = prefix, prefix.unconditional()
    longest = max(half.embeds_PLD.shape[1] for half in both)
    embeds = [pad(half.embeds_PLD, (0, 0, 0, longest - half.embeds_PLD.shape[1])) for half in both]
    return torch.cat(embeds), torch.cat([half.lengths_P for half in both])


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy that the GPU takes when it gets there."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


CALLS_BEFORE_CAPTURE = 2
"""Calls that run as they are: they compile the kernels and allocate what a capture must not."""


class CUDAGraph:
    """Calls a function, and after its first calls replays it from a CUDA graph.

    The function takes nothing, returns nothing, and reads and writes tensors whose addresses stay;
    nothing in it waits for the GPU.
    """

    def __init__(self, function: Callable[[], None]):
        self._function = function
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self) -> None:
        """Does the work of the function once."""
        if self._graph is None and self._calls < CALLS_BEFORE_CAPTURE:
            self._calls += 1
            self._function()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            # Other threads, such as rewards, may use the GPU meanwhile.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._function()
        self._graph.replay()


@dataclass(frozen=True)
class Columns:
    """The U columns of an image, on the device: its T tokens, and control tokens between them."""

    fixed_U: Tensor
    """-1 where a token is sampled, else the row of the input embeddings of a control token."""
    token_U: Tensor
    """Which of the T tokens a column is; T for a control token."""
    coords_UA: Tensor
    absolute: bool

    @classmethod
    def of(cls, layout: TokenLayout, device: torch.device) -> Columns:
        fixed_U, coords_UA = layout.fixed_U, layout.coords_UA
        if fixed_U is None:
            fixed_U = torch.full((layout.num_tokens,), -1)
        if coords_UA is None:
            coords_UA = torch.arange(len(fixed_U))[:, None]
        assert layout.token_columns()[-1] == len(fixed_U) - 1, "the last column is a token"
        token_U = torch.full_like(fixed_U, layout.num_tokens)
        token_U[layout.token_columns()] = torch.arange(layout.num_tokens)
        return cls(fixed_U.to(device), token_U.to(device), coords_UA.to(device), layout.absolute)

    @property
    def num_columns(self) -> int:
        return len(self.fixed_U)

    def prompt_coords(self, num_positions: int) -> Tensor:
        """Rotary coordinates of the positions of a prompt, LA."""
        position_L1 = torch.arange(num_positions, device=self.coords_UA.device)[:, None]
        return (0 * position_L1 if self.absolute else position_L1).expand(
            -1, self.coords_UA.shape[1]
        )


@dataclass(frozen=True)
class Generated:
    """Image tokens, row i * G + k for image k of prompt i, and what the sampler knew of them."""

    tokens_NT: Tensor
    logprobs_NT: Tensor
    """Conditional, temperature 1 (nats)."""
    guided_logprobs_NT: Tensor
    """Under the distribution that was sampled from (nats)."""
    entropy_NT: Tensor
    """Of the conditional distribution, temperature 1 (nats)."""
    guided_entropy_NT: Tensor | None = None
    """Of the guided distribution, temperature 1 (nats), where `Sampling.guided_entropy` asks."""
    cut_mass_NT: Tensor | None = None
    """Probability of the tokens that top-k and top-p left out, where the sampling is truncated."""
    cut_conditional_mass_NT: Tensor | None = None
    """Their conditional one, temperature 1."""


class DecodeState:
    """A pass of a number of images: `begin` it, `advance` U - 1 times, `draw` the last token.

    Which token is next, and where each row stands, is kept on the device, so that all calls of
    `advance` are one and the same work, which a CUDA graph can replay. Control columns draw too,
    into a column behind the last that nobody reads.

    Shape suffixes: B prompts of the prefill, R rows (N conditional, then with guidance N
    unconditional), U columns, A axes.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KeyValueCache,
        sampling: Sampling,
        columns: Columns,
        num_images: int,
    ):
        self._decoder, self.cache = decoder, cache
        self._sampling, self._columns = sampling, columns
        assert cache.num_rows in (num_images, 2 * num_images)
        device, num_tokens = columns.fixed_U.device, int((columns.fixed_U < 0).sum())
        shape = (num_images, num_tokens + 1)
        self._uniforms = torch.zeros(shape, device=device)
        self._known = {name: torch.zeros(shape, device=device) for name in sampling.statistics}
        self._tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self._column = torch.zeros(1, dtype=torch.long, device=device)
        self._positions_R = torch.zeros(cache.num_rows, dtype=torch.long, device=device)
        self._origins_R = torch.zeros_like(self._positions_R)
        self._prompts = SharedPrompts(*torch.zeros_like(self._positions_R).expand(2, -1).clone())
        vocabulary = len(decoder.head_layers[-1][0])
        self.logits_RV = torch.empty((cache.num_rows, vocabulary), device=device)

    def begin(
        self, uniforms_NT: Tensor, logits_BV: Tensor, lengths_B: Tensor, *, column: int = 0
    ) -> None:
        """Takes what a prefill left: the logits of the first column, and the prompts' lengths.

        A later `column` stands in the middle of an image, for measuring.
        """
        group_size = len(self.logits_RV) // len(logits_BV)
        lengths_R = lengths_B.repeat_interleave(group_size)
        row_R = torch.arange(len(lengths_R), device=lengths_R.device)
        self._uniforms[:, :-1].copy_(uniforms_NT)
        self.logits_RV.copy_(logits_BV.repeat_interleave(group_size, 0))
        self._positions_R.copy_(lengths_R + column)
        if not self._columns.absolute:
            self._origins_R.copy_(lengths_R)
        self._prompts.lengths_R.copy_(lengths_R)
        self._prompts.rows_R.copy_(row_R - row_R % group_size)
        self._column.fill_(column)

    def advance(self, num_live: int) -> None:
        """Draws the next token of every image and runs the decoder on it.

        `num_live` bounds the positions that are read where the backend needs a bound.
        """
        embeds_ND = self._decoder.input_embeds[self.draw()]
        coords_1A = self._columns.coords_UA.index_select(0, self._column)
        states_RD = self._decoder.step(
            embeds_ND.repeat(len(self._positions_R) // len(embeds_ND), 1),
            self._positions_R,
            self._origins_R[:, None] + coords_1A,
            self.cache,
            prompts=self._prompts,
            num_live=num_live,
        )
        self._decoder.logits(states_RD, self.logits_RV)
        self._positions_R += 1
        self._column += 1

    def draw(self) -> Tensor:
        """Draws the token of every image and records it; the rows of the next inputs, N."""
        token_1 = self._columns.token_U.index_select(0, self._column)
        uniforms_N = self._uniforms.index_select(1, token_1)[:, 0]
        drawn = self._decoder.backend.draw(self.logits_RV, uniforms_N, self._sampling)
        for name, buffer in (("tokens", self._tokens), *self._known.items()):
            buffer.index_copy_(1, token_1, getattr(drawn, f"{name}_N")[:, None])
        fixed_1 = self._columns.fixed_U.index_select(0, self._column)
        return torch.where(fixed_1 < 0, drawn.tokens_N, fixed_1)

    def result(self) -> Generated:
        """A copy of what was drawn, which the next pass leaves alone."""
        parts = {"tokens": self._tokens, **self._known}
        return Generated(**{f"{name}_NT": part[:, :-1].clone() for name, part in parts.items()})


def _pick_backend(name: str | None, device: torch.device, cache_dtype: str) -> Backend:
    """The backend of a name; None: the fastest that is there. An unknown one is InputError.

    Triton's interpreter (TRITON_INTERPRET=1) runs its kernels on a CPU.
    """
    if name is None and device.type == "cuda":
        name = "triton"
    elif name is None:
        name = "numba" if cache_dtype != "fp8" and _numba_is_faster() else "eager"
    if name not in BACKENDS:
        raise InputError(f"backend: unknown '{name}'; write one of: {', '.join(BACKENDS)}")
    if name == "eager":
        return Backend()
    if name == "numba":
        if cache_dtype == "fp8" or device.type != "cpu":
            raise InputError("backend: numba is for a CPU and has no fp8; write eager")
        if not _numba_is_there():
            raise InputError(f"backend: {NO_NUMBA}; or write eager")
        from stage_rl.rollout.numba_backend import NumbaBackend

        return NumbaBackend()
    if find_spec("triton") is None:
        raise InputError("the engine's kernels need triton; write: pip install 'stage-rl[triton]'")
    from stage_rl.rollout.kernels import TritonBackend

    return TritonBackend()


def _decoder_class(backend: Backend) -> type[Decoder]:
    """The decoder that runs most of its steps by this backend."""
    if backend.layout != "transposed":
        return Decoder
    from stage_rl.rollout.numba_decoder import PackedDecoder

    return PackedDecoder


def _numba_is_faster() -> bool:
    """Whether Numba's kernels are there and beat torch's operations: measured without AMX, in bf16
    with AVX512-BF16 and in fp32 with AVX2.
    """
    # Not every torch that the package allows has it.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities.get("avx2") or capabilities.get("amx_bf16"):
        return False
    if not _numba_is_there():
        log.info(NO_NUMBA)
        return False
    return True


def _numba_is_there() -> bool:
    try:
        import_module(OPENMP_OF_NUMBA)
    except ImportError:
        return False
    return True
