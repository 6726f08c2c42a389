"""The steps between the matmuls of a decode on a CPU, and whole layers, compiled by Numba.

Torch's own attention is made for many queries, and each of its operations starts the threads anew.
Here what a layer does between two matmuls is one pass over rows and heads, a draw is one, and where
the processor multiplies bf16 a layer is.

Shape suffixes: R rows, M rows, D model width, C width of queries, keys and values together,
K key-value heads, W blocks of positions, U positions of a block, S positions, E head dimension,
F width of the gate, N images, V codebook size.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import extending, float32, njit, prange, types
from numba.core import cgutils, config

intrinsic: Any = extending.intrinsic
# Without fast math: code that was loaded from the disk, or made for another processor, is optimized
# otherwise, and all of it shall round alike.
inlined: Any = njit(error_model="numpy", forceinline=True)
settings: Any = config
settings.THREADING_LAYER = "omp"  # threads of the others sleep too long between two calls


def multiplies_bf16() -> bool:
    """Whether the processor, and Numba's code for it, has what `multiply_tile` is made of."""
    # Not every torch that the package allows has it.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16")) and not (
        settings.CPU_NAME or settings.CPU_FEATURES
    )


def parallel(function: Any) -> Any:
    """Compiles a function whose loops have threads; keeps it on disk where that can be written."""
    compiled = partial(njit, error_model="numpy", parallel=True)
    try:
        return compiled(cache=True)(function)
    except RuntimeError:  # Numba finds no such folder
        return compiled()(function)


LOG2_E, SMALLEST_EXPONENT = float32(1 / math.log(2)), float32(-126)
C1, C2, C3, C4, C5, C6 = (float32(math.log(2) ** k / math.factorial(k)) for k in range(1, 7))
"""Of the Taylor series of 2^x."""
CACHE_LINE = 64
"""Bytes that a processor fetches at a time."""
PIECE = 64
"""Numbers that are summed by themselves, so that a processor has several sums at a time."""
MOST_THREADS: int = settings.NUMBA_NUM_THREADS
AVX = "x86.avx512bf16"
LANES, TILE_ROWS, TILE_COLUMNS = 16, 8, 32
"""Numbers in fp32 of a vector; the part of a product whose sums are held in registers."""
CHUNK = 64
"""Rows that go through a layer together: what they leave between two matmuls stays in the cache."""


@intrinsic
def widened(context: Any, number: Any) -> Any:
    """A number of an array as float32; one in bf16 comes as its 16 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (number,) = arguments
        if signature.args[0] == types.float32:
            return number
        wide = builder.zext(number, ir.IntType(32))
        return builder.bitcast(builder.shl(wide, ir.Constant(wide.type, 16)), ir.FloatType())

    return types.float32(number), generate


@intrinsic
def narrowed(context: Any, number: Any, array: Any) -> Any:
    """A float32 as a number of an array: in bf16 to nearest, ties to even, as its 16 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = arguments[0]
        if signature.return_type == types.float32:
            return number

        def constant(value: int) -> Any:
            return ir.Constant(ir.IntType(32), value)

        bits = builder.bitcast(number, ir.IntType(32))
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        rounded = builder.add(builder.add(bits, constant(0x7FFF)), odd)
        is_nan = builder.fcmp_unordered("uno", number, number)
        high = builder.lshr(builder.select(is_nan, constant(0x7FC00000), rounded), constant(16))
        return builder.trunc(high, ir.IntType(16))

    return array.dtype(types.float32, array), generate


@intrinsic
def fma(context: Any, left: Any, right: Any, addend: Any) -> Any:
    """left x right + addend, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


@intrinsic
def power_of_two(context: Any, exponent: Any) -> Any:
    """2 to an int32 in [-126, 127]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        biased = builder.add(arguments[0], ir.Constant(ir.IntType(32), 127))
        bits = builder.shl(biased, ir.Constant(ir.IntType(32), 23))
        return builder.bitcast(bits, ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def prefetch(context: Any, array: Any, index: Any) -> Any:
    """Asks for the memory of a number of a flat array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = context.make_array(signature.args[0])(context, builder, arguments[0])
        i32, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        place = builder.bitcast(builder.gep(held.data, [arguments[1]]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        builder.call(function, [place, i32(0), i32(3), i32(1)])  # to read, into all caches, data
        return context.get_dummy_value()

    return types.void(array, types.int64), generate


def _operation(builder: Any, name: str, result: Any, *taken: Any) -> Any:
    """An operation of LLVM that llvmlite has no name for."""
    known = builder.module.globals.get(f"llvm.{name}")
    kind = ir.FunctionType(result, taken)
    return known or ir.Function(builder.module, kind, f"llvm.{name}")


class Vector(types.Type):
    """Numbers in fp32 that one instruction takes together; what is held so is held in registers."""

    def __init__(self) -> None:
        super().__init__(f"vector of {LANES} float32")


VECTOR = Vector()


@extending.register_model(Vector)
class _VectorModel(extending.models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.FloatType(), LANES))


@intrinsic
def two_vectors(context: Any, array: Any, index: Any) -> Any:
    """Numbers of a flat array from an index on: the first half and the second, or in bf16, widened,
    those at even places and those at odd ones, which takes half the instructions.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        held = context.make_array(signature.args[0])(context, builder, arguments[0])
        place = builder.gep(held.data, [arguments[1]])
        word, floats = ir.IntType(32), ir.VectorType(ir.FloatType(), LANES)
        if signature.args[0].dtype == types.float32:
            places = (place, builder.gep(place, [word(LANES)]))
            both = [
                builder.load(builder.bitcast(at, floats.as_pointer()), align=4) for at in places
            ]
        else:
            words = ir.VectorType(word, LANES)
            pairs = builder.load(builder.bitcast(place, words.as_pointer()), align=2)
            even = builder.shl(pairs, ir.Constant(words, [16] * LANES))
            odd = builder.and_(pairs, ir.Constant(words, [0xFFFF0000] * LANES))
            both = [builder.bitcast(each, floats) for each in (even, odd)]
        return context.make_tuple(builder, signature.return_type, both)

    return types.UniTuple(VECTOR, 2)(array, types.int64), generate


@intrinsic
def put_two(context: Any, first: Any, second: Any, array: Any, index: Any, like: Any) -> Any:
    """Writes to a flat array of fp32 what `two_vectors` of `like` would read."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first, second, array, index, _ = arguments
        held = context.make_array(signature.args[2])(context, builder, array)
        joined = range(2 * LANES)
        if signature.args[4].dtype != types.float32:
            joined = [place // 2 + LANES * (place % 2) for place in joined]
        order = ir.Constant(ir.VectorType(ir.IntType(32), 2 * LANES), list(joined))
        both = builder.shuffle_vector(first, second, order)
        place = builder.bitcast(builder.gep(held.data, [index]), both.type.as_pointer())
        builder.store(both, place, align=4)
        return context.get_dummy_value()

    return types.void(first, second, array, types.int64, like), generate


def _fma(builder: Any, *numbers: Any) -> Any:
    kind = numbers[0].type
    return builder.call(_operation(builder, f"fma.v{LANES}f32", kind, kind, kind, kind), numbers)


def _repeated(builder: Any, number: Any) -> Any:
    alone = ir.Constant(ir.VectorType(number.type, LANES), None)
    alone = builder.insert_element(alone, number, ir.IntType(32)(0))
    places = ir.Constant(ir.VectorType(ir.IntType(32), LANES), None)
    return builder.shuffle_vector(alone, alone, places)


@intrinsic
def splat(context: Any, number: Any) -> Any:
    """A vector of one number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _repeated(builder, arguments[0])

    return VECTOR(types.float32), generate


@intrinsic
def vector_fma(context: Any, left: Any, right: Any, addend: Any) -> Any:
    """left x right + addend, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _fma(builder, *arguments)

    return VECTOR(left, right, addend), generate


@intrinsic
def vector_sum(context: Any, left: Any, right: Any) -> Any:
    """left + right."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return VECTOR(left, right), generate


class _BFloat(ir.Type):
    """LLVM's bf16, which its operations take; llvmlite has no name for it."""

    def __str__(self) -> str:
        return "bfloat"


@intrinsic
def multiply_tile(context: Any, left: Any, m: Any, panel: Any, bias: Any, out: Any, n: Any) -> Any:
    """Rows m to m + 7 and columns n to n + 31 of a product with a bias, summed in fp32.

    `left` MK and `out` MN in fp32, and a panel that holds its columns row by row; or in bf16, by
    pairs of rows, on a processor with AVX512-BF16. One product, or pair of them, is added after
    another, as oneDNN does.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word, size, vectors = ir.IntType(32), ir.IntType(64), range(TILE_COLUMNS // LANES)
        floats, in_bf16 = ir.VectorType(ir.FloatType(), LANES), signature.args[0].dtype != float32
        factors = ir.VectorType(_BFloat(), 2 * LANES) if in_bf16 else floats
        rounded = ir.VectorType(_BFloat(), LANES) if in_bf16 else floats
        left, panel, bias, out = (
            context.make_array(signature.args[i])(context, builder, arguments[i])
            for i in (0, 2, 3, 4)
        )
        m, n, together = arguments[1], arguments[5], size(2 if in_bf16 else 1)
        rows = [builder.add(m, size(row)) for row in range(TILE_ROWS)]
        columns = [builder.add(n, size(LANES * v)) for v in vectors]
        depth, width = (builder.extract_value(array.shape, 1) for array in (left, out))
        starts = [builder.mul(row, depth) for row in rows]

        def place(array: Any, index: Any, kind: Any) -> Any:
            return builder.bitcast(builder.gep(array.data, [index]), kind.as_pointer())

        def load(array: Any, index: Any, kind: Any) -> Any:
            return builder.load(place(array, index, kind), align=2)

        def add_product(total: Any, factor: Any, column: Any) -> Any:
            if not in_bf16:
                return _fma(builder, factor, column, total)
            kinds = floats, floats, factors, factors
            dot = _operation(builder, f"{AVX}.dpbf16ps.512", *kinds)
            return builder.call(dot, [total, factor, column])

        def narrow(total: Any) -> Any:
            if not in_bf16:
                return total
            return builder.call(
                _operation(builder, f"{AVX}.cvtneps2bf16.512", rounded, floats), [total]
            )

        # What has a place of its own on the stack is held in registers.
        nothing = ir.Constant(floats, [0.0] * LANES)
        sums = [[cgutils.alloca_once_value(builder, nothing) for _ in vectors] for _ in rows]
        with cgutils.for_range(builder, builder.udiv(depth, together)) as loop:
            first = builder.mul(loop.index, size(TILE_COLUMNS))
            held = [load(panel, builder.add(first, size(LANES * v)), factors) for v in vectors]
            for start, row_sums in zip(starts, sums, strict=True):
                at = builder.add(start, builder.mul(loop.index, together))
                factor = builder.bitcast(_repeated(builder, load(left, at, word)), factors)
                for total, column in zip(row_sums, held, strict=True):
                    builder.store(add_product(builder.load(total), factor, column), total)
        for row, row_sums in zip(rows, sums, strict=True):
            for column, total in zip(columns, row_sums, strict=True):
                whole = builder.fadd(builder.load(total), load(bias, column, floats))
                into = place(out, builder.add(builder.mul(row, width), column), rounded)
                builder.store(narrow(whole), into, align=2)
        return context.get_dummy_value()

    return types.void(left, types.int64, panel, bias, out, types.int64), generate


@inlined
def exp(x):
    """e^x of an x <= 0, within 3e-7, or 0 below 2^-126: of libm's no loop makes vectors."""
    exponent = x * LOG2_E
    is_zero = exponent < SMALLEST_EXPONENT
    exponent = SMALLEST_EXPONENT if is_zero else exponent
    whole = np.floor(exponent + float32(0.5))
    f = exponent - whole
    series = fma(f, fma(f, fma(f, fma(f, fma(f, C6, C5), C4), C3), C2), C1)
    # No integer is NaN; the series is.
    power = fma(f, series, float32(1)) * power_of_two(np.int32(whole if whole == whole else 0))
    return float32(0) if is_zero else power


@inlined
def dot(left, right):
    """The sum of products, in four sums."""
    a = b = c = d = float32(0)
    fours = len(left) - len(left) % 4
    for i in range(0, fours, 4):
        a, b = fma(left[i], right[i], a), fma(left[i + 1], right[i + 1], b)
        c, d = fma(left[i + 2], right[i + 2], c), fma(left[i + 3], right[i + 3], d)
    for i in range(fours, len(left)):
        a = fma(left[i], right[i], a)
    return (a + b) + (c + d)


@inlined
def largest(numbers):
    """The largest number, found in four parts; NaN is passed over, unless it is the first."""
    a = b = c = d = numbers[0]
    fours = len(numbers) - len(numbers) % 4
    for i in range(0, fours, 4):
        a, b = max(a, numbers[i]), max(b, numbers[i + 1])
        c, d = max(c, numbers[i + 2]), max(d, numbers[i + 3])
    for i in range(fours, len(numbers)):
        a = max(a, numbers[i])
    return max(max(a, b), max(c, d))


@inlined
def total(numbers):
    """The sum of numbers, in four sums."""
    a = b = c = d = float32(0)
    fours = len(numbers) - len(numbers) % 4
    for i in range(0, fours, 4):
        a, b = a + numbers[i], b + numbers[i + 1]
        c, d = c + numbers[i + 2], d + numbers[i + 3]
    for i in range(fours, len(numbers)):
        a += numbers[i]
    return (a + b) + (c + d)


@inlined
def distribution(weights_V, logits_V):
    """Lowers logits until the largest is 0, and makes weights of them; returns what they were
    lowered by, the sum of the weights, and the entropy (nats).
    """
    top, all_weights, by_logits = largest(logits_V), float32(0), float32(0)
    for v in range(len(logits_V)):
        logits_V[v] -= top
        weights_V[v] = exp(logits_V[v])
    for first in range(0, len(logits_V), PIECE):
        weights, logits = weights_V[first : first + PIECE], logits_V[first : first + PIECE]
        all_weights += total(weights)
        by_logits += dot(weights, logits)
    return top, all_weights, math.log(all_weights) - by_logits / all_weights


@inlined
def first_above(weights_V, share, all_weights):
    """The first entry up to which the weights sum to more than a share of all; where rounding
    leaves none, the last one with a weight.
    """
    threshold, below = share * all_weights, float32(0)
    for first in range(0, len(weights_V), PIECE):
        piece = weights_V[first : first + PIECE]
        behind = below + total(piece)
        if behind > threshold:
            for v in range(len(piece)):
                below += piece[v]
                if below > threshold and piece[v] > 0:
                    return first + v
        below = behind
    for v in range(len(weights_V) - 1, 0, -1):
        if weights_V[v] > 0:
            return v
    return 0


@inlined
def rotate(into_E, head_E, norm_E, eps, cos_E, sin_E):
    """A head, through its norm where that has a width, rotated."""
    half = len(into_E) // 2
    for e in range(len(into_E)):
        into_E[e] = widened(head_E[e])
    if len(norm_E):
        scale = float32(1) / math.sqrt(dot(into_E, into_E) / float32(len(into_E)) + eps)
        for e in range(len(into_E)):
            into_E[e] *= scale * norm_E[e]
    for e in range(half):
        low, high = into_E[e], into_E[e + half]
        into_E[e] = fma(high, sin_E[e], low * cos_E[e])
        into_E[e + half] = fma(low, sin_E[e + half], high * cos_E[e + half])


@inlined
def weighted_sum(into_E, weights_S, numbers, first, ahead, next_first):
    """The sum of rows of `numbers`, which begin at `first`, by their weights, eight rows at a time.

    Meanwhile as much of `ahead` is fetched, what will be read next: it lies elsewhere, and no
    processor foresees that.
    """
    width, both, line = len(into_E), 2 * LANES, CACHE_LINE // ahead.itemsize
    eights = len(weights_S) - len(weights_S) % 8
    for e in range(0, width - width % both, both):
        sum0, sum1 = splat(float32(0)), splat(float32(0))
        for s in range(0, eights, 8):
            for number in range(s * both, (s + 8) * both, line):
                prefetch(ahead, next_first + e * len(weights_S) + number)
            at = first + s * width + e
            right0, right1 = splat(float32(0)), splat(float32(0))
            for i in range(4):
                row0, row1 = two_vectors(numbers, at)
                w = splat(weights_S[s + i])
                sum0, sum1 = vector_fma(w, row0, sum0), vector_fma(w, row1, sum1)
                row0, row1 = two_vectors(numbers, at + 4 * width)
                w = splat(weights_S[s + 4 + i])
                right0, right1 = vector_fma(w, row0, right0), vector_fma(w, row1, right1)
                at += width
            sum0, sum1 = vector_sum(sum0, right0), vector_sum(sum1, right1)
        for s in range(eights, len(weights_S)):
            row0, row1 = two_vectors(numbers, first + s * width + e)
            w = splat(weights_S[s])
            sum0, sum1 = vector_fma(w, row0, sum0), vector_fma(w, row1, sum1)
        put_two(sum0, sum1, into_E, e, numbers)
    for e in range(width - width % both, width):
        rest = float32(0)
        for s in range(0, eights, 8):
            at, right = first + s * width + e, float32(0)
            for i in range(4):
                rest = fma(weights_S[s + i], widened(numbers[at]), rest)
                right = fma(weights_S[s + 4 + i], widened(numbers[at + 4 * width]), right)
                at += width
            rest += right
        for s in range(eights, len(weights_S)):
            rest = fma(weights_S[s], widened(numbers[first + s * width + e]), rest)
        into_E[e] = rest


@inlined
def softmax(scores_S):
    """Turns scores into weights, of which the largest is 1; returns their sum."""
    top = largest(scores_S)
    for s in range(len(scores_S)):
        scores_S[s] = exp(scores_S[s] - top)
    return total(scores_S)


@inlined
def attend_lane(
    qkv_C,
    k,
    position,
    q_norm_E,
    k_norm_E,
    eps,
    cos_E,
    sin_E,
    keys,
    keys_at,
    values,
    values_at,
    next_keys_at,
    block,
    out,
    room,
):
    """What the query heads of one row and one key-value head read; writes the new position.

    The scores are a sum of the rows of transposed keys, so that they too are made in vectors. They
    are made of whole blocks: what is left of a loop behind its vectors takes longer than they do.
    The row's keys (WEU) and values (SE) lie in the whole cache from `keys_at` and `values_at` on.
    `room` is for a head, for what it reads, and for its scores.
    """
    head_dim = len(cos_E)
    num_heads = len(out) // head_dim
    num_kv_heads = (len(qkv_C) // head_dim - num_heads) // 2
    queries, scale = num_heads // num_kv_heads, float32(1 / math.sqrt(head_dim))
    num_blocks = position // block + 1
    head, mixed = room[:head_dim], room[head_dim : 2 * head_dim]
    scores = room[2 * head_dim : 2 * head_dim + num_blocks * block]
    key = qkv_C[(num_heads + k) * head_dim :][:head_dim]
    value = qkv_C[(num_heads + num_kv_heads + k) * head_dim :][:head_dim]
    rotate(head, key, k_norm_E, eps, cos_E, sin_E)
    new_key = keys_at + position // block * head_dim * block + position % block
    for e in range(head_dim):
        keys[new_key + e * block] = narrowed(head[e], keys)
        values[values_at + position * head_dim + e] = value[e]
    for h in range(k * queries, (k + 1) * queries):
        query, read = qkv_C[h * head_dim :][:head_dim], out[h * head_dim :][:head_dim]
        rotate(head, query, q_norm_E, eps, cos_E, sin_E)
        for e in range(head_dim):
            head[e] *= scale
        for w in range(num_blocks):
            before = w * block * head_dim
            scores_of_block = scores[w * block : (w + 1) * block]
            weighted_sum(scores_of_block, head, keys, keys_at + before, values, values_at + before)
        scores[position + 1 :] = -np.inf
        all_weights = softmax(scores)
        weighted_sum(mixed, scores[: position + 1], values, values_at, keys, next_keys_at)
        for e in range(head_dim):
            read[e] = narrowed(mixed[e] / all_weights, out)


@parallel
def attend(
    qkv_RC,
    cos_RE,
    sin_RE,
    q_norm_E,
    k_norm_E,
    eps,
    positions_R,
    keys_RKWEU,
    values_RKSE,
    out_RC,
    threads,
):
    """Rotates, writes the new position to the cache, and reads for each head up to it."""
    num_kv_heads, num_positions, head_dim = values_RKSE.shape[1:]
    lanes, row = len(qkv_RC) * num_kv_heads, num_positions * head_dim
    keys, values, block = keys_RKWEU.reshape(-1), values_RKSE.reshape(-1), keys_RKWEU.shape[4]
    share = (lanes + threads - 1) // threads
    for thread in prange(threads):
        room = np.empty(2 * head_dim + num_positions, np.float32)
        for lane in range(thread * share, min(lanes, (thread + 1) * share)):
            r, k = lane // num_kv_heads, lane % num_kv_heads
            attend_lane(
                qkv_RC[r],
                k,
                positions_R[r],
                q_norm_E,
                k_norm_E,
                eps,
                cos_RE[r],
                sin_RE[r],
                keys,
                lane * row,
                values,
                lane * row,
                (lane + 1) * row,
                block,
                out_RC[r],
                room,
            )


@inlined
def add(states_D, delta_D):
    """Adds a change to a row of the residual stream."""
    for d in range(len(states_D)):
        states_D[d] += widened(delta_D[d])


@inlined
def norm(states_D, weight_D, eps, out_D):
    """RMSNorm of a row."""
    scale = float32(1) / math.sqrt(dot(states_D, states_D) / float32(len(states_D)) + eps)
    for d in range(len(states_D)):
        out_D[d] = narrowed(states_D[d] * scale * weight_D[d], out_D)


@inlined
def gate(gate_up_F, out_F):
    """silu(gate) x up of a row, each rounded."""
    width = len(out_F)
    gates, ups = gate_up_F[:width], gate_up_F[width:]
    for f in range(width):
        gate = widened(gates[f])
        small = exp(-abs(gate))
        sigmoid = (float32(1) if gate > 0 else small) / (float32(1) + small)
        silu = widened(narrowed(gate * sigmoid, out_F))
        out_F[f] = narrowed(silu * widened(ups[f]), out_F)


@parallel
def add_and_norm(states_MD, delta_MD, weight_D, eps, out_MD):
    """Adds a change to the residual stream where there is one, and norms the stream."""
    for m in prange(len(states_MD)):
        if len(delta_MD):
            add(states_MD[m], delta_MD[m])
        norm(states_MD[m], weight_D, eps, out_MD[m])


@parallel
def silu_times(gate_up_MF, out_MF):
    """silu(gate) x up, each rounded."""
    for m in prange(len(out_MF)):
        gate(gate_up_MF[m], out_MF[m])


@inlined
def multiply(left_MK, packed, bias_N, num_rows, out_MN):
    """left x packed + bias of the first rows, in whole tiles."""
    for p in range(len(packed)):
        for m in range(0, num_rows, TILE_ROWS):
            multiply_tile(left_MK, m, packed[p], bias_N, out_MN, p * TILE_COLUMNS)


@parallel
def multiply_rows(left_MK, packed, bias_N, out_MN, threads):
    """left x packed + bias, of rows in whole tiles."""
    tiles = len(left_MK) // TILE_ROWS
    share = (tiles + threads - 1) // threads
    for thread in prange(threads):
        for p in range(len(packed)):
            for tile in range(thread * share, min(tiles, (thread + 1) * share)):
                m, n = tile * TILE_ROWS, p * TILE_COLUMNS
                multiply_tile(left_MK, m, packed[p], bias_N, out_MN, n)


@parallel
def run_layer(
    states_RD,
    attention_norm_D,
    wqkv,
    bias_C,
    wo,
    mlp_norm_D,
    w_gate_up,
    w_down,
    no_bias,
    eps,
    cos_RE,
    sin_RE,
    q_norm_E,
    k_norm_E,
    head_eps,
    positions_R,
    keys_RKWEU,
    values_RKSE,
    threads,
):
    """A layer, with its matmuls, of rows that need nothing of each other: no thread waits for one.

    Weights in bf16, packed; the residual stream is changed in place.
    """
    num_rows, width = states_RD.shape
    num_kv_heads, num_positions, head_dim = values_RKSE.shape[1:]
    row = num_positions * head_dim
    keys, values, block = keys_RKWEU.reshape(-1), values_RKSE.reshape(-1), keys_RKWEU.shape[4]
    share = (num_rows + threads - 1) // threads
    for thread in prange(threads):
        room = np.empty(2 * head_dim + num_positions, np.float32)
        # The rows of the last tile that there are not stay 0.
        normed, delta = np.zeros((CHUNK, width), np.uint16), np.empty((CHUNK, width), np.uint16)
        qkv = np.empty((CHUNK, len(wqkv) * TILE_COLUMNS), np.uint16)
        mixed = np.zeros((CHUNK, wo.shape[1] * 2), np.uint16)
        gate_up = np.empty((CHUNK, len(w_gate_up) * TILE_COLUMNS), np.uint16)
        inner = np.zeros((CHUNK, w_down.shape[1] * 2), np.uint16)
        end = min(num_rows, (thread + 1) * share)
        for first in range(thread * share, end, CHUNK):
            count = min(CHUNK, end - first)
            for i in range(count):
                norm(states_RD[first + i], attention_norm_D, eps, normed[i])
            multiply(normed, wqkv, bias_C, count, qkv)
            for lane in range(first * num_kv_heads, (first + count) * num_kv_heads):
                r, k = lane // num_kv_heads, lane % num_kv_heads
                attend_lane(
                    qkv[r - first],
                    k,
                    positions_R[r],
                    q_norm_E,
                    k_norm_E,
                    head_eps,
                    cos_RE[r],
                    sin_RE[r],
                    keys,
                    lane * row,
                    values,
                    lane * row,
                    (lane + 1) * row,
                    block,
                    mixed[r - first],
                    room,
                )
            multiply(mixed, wo, no_bias, count, delta)
            for i in range(count):
                add(states_RD[first + i], delta[i])
                norm(states_RD[first + i], mlp_norm_D, eps, normed[i])
            multiply(normed, w_gate_up, no_bias, count, gate_up)
            for i in range(count):
                gate(gate_up[i], inner[i])
            multiply(inner, w_down, no_bias, count, delta)
            for i in range(count):
                add(states_RD[first + i], delta[i])


@parallel
def draw_column(logits_RV, uniforms_N, scale, temperature, tokens_N, statistics_4N, threads):
    """Guidance, softmax, draw and statistics; of 2 N rows the second half is unconditional.

    Statistics: log-probability, that of the distribution that is drawn from, entropy, that of the
    guided distribution.
    """
    num_images, width = len(uniforms_N), logits_RV.shape[1]
    share = (num_images + threads - 1) // threads
    for thread in prange(threads):
        logits, weights = np.empty(width, np.float32), np.empty(width, np.float32)
        for n in range(thread * share, min(num_images, (thread + 1) * share)):
            cond, statistics = logits_RV[n], statistics_4N[:, n]
            logits[:] = cond
            top, cond_weights, entropy = distribution(weights, logits)
            all_weights, guided_entropy = cond_weights, entropy
            if len(logits_RV) > num_images:
                uncond = logits_RV[num_images + n]
                for v in range(width):
                    logits[v] = fma(scale, cond[v] - uncond[v], uncond[v])
                _, all_weights, guided_entropy = distribution(weights, logits)
            if temperature != float32(1):
                for v in range(width):
                    logits[v] /= temperature
                _, all_weights, _ = distribution(weights, logits)
            token = first_above(weights, uniforms_N[n], all_weights)
            tokens_N[n] = token
            statistics[0] = cond[token] - top - math.log(cond_weights)
            statistics[1] = logits[token] - math.log(all_weights)
            statistics[2], statistics[3] = entropy, guided_entropy
