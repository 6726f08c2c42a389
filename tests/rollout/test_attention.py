from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from stage_rl.rollout import attention
from stage_rl.rollout.attention import (
    LAYOUTS,
    CacheShape,
    KeyValueCache,
    decode_attention,
    length_mask,
)

CPU = torch.device("cpu")
ROWS, HEADS, QUERIES, LENGTH, HEAD_DIM = 3, 2, 2, 75, 8


@pytest.mark.parametrize("block", [1, 8, 32])
def test_each_row_attends_to_its_own_slots_across_blocks(block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    torch.manual_seed(0)
    keys, values = torch.randn(2, ROWS, HEADS, LENGTH, HEAD_DIM)
    cache = KeyValueCache.empty(CacheShape(1, HEADS, HEAD_DIM), ROWS, LENGTH, CPU)
    # Garbage of an earlier call, everywhere.
    cache.keys[0].fill_(100)
    cache.values[0].fill_(100)
    last_R = torch.tensor([4, 40, 74])
    for position in range(LENGTH):
        # A row that has reached its last position goes on writing there.
        position_R = last_R.clamp(max=position)
        rows_R = torch.arange(ROWS)
        new = keys[rows_R, :, position_R], values[rows_R, :, position_R]
        cache.append(0, *new, cache.flat_index(position_R))
    query = torch.randn(ROWS, HEADS, QUERIES, HEAD_DIM)
    ours = decode_attention(query, cache.keys[0], cache.values[0], length_mask(last_R, LENGTH))
    for row, last in enumerate(last_R.tolist()):
        live = slice(0, last + 1)
        theirs = scaled_dot_product_attention(query[row], keys[row, :, live], values[row, :, live])
        assert_close(ours[row], theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prefill_fills_the_rows_of_its_group(monkeypatch, layout):
    monkeypatch.setattr(attention, "BLOCK", 4)
    keys, values = torch.randn(2, 2, 1, 6, 3)
    large = KeyValueCache.empty(CacheShape(1, 1, 3), 7, 9, CPU, layout=layout)
    cache = large.rows(4)
    assert cache.keys[0].data_ptr() == large.keys[0].data_ptr()
    cache.fill(0, keys, values, 2)
    # Blocks WRKUE side by side: 3 blocks of 4 positions for 9 positions.
    positions_RKSE = torch.cat(list(cache.keys[0]), dim=2)
    assert positions_RKSE.shape == (4, 1, 12, 3)
    assert torch.equal(positions_RKSE[:, :, :6], keys[[0, 0, 1, 1]])
    assert positions_RKSE[:, :, 6:].eq(0).all()
    values_RKSE = torch.cat(list(cache.values[0]), dim=2)
    assert torch.equal(values_RKSE[2, :, 4:6], values[1, :, 4:6])
    # Which axis is the innermost: the width, or of transposed keys the positions.
    innermost = 3 if layout == "transposed" else 4
    assert cache.keys[0].stride(innermost) == cache.values[0].stride(4) == 1


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_a_cache_in_one_block_attends_like_one_of_many(dtype, atol):
    torch.manual_seed(0)
    new_2SRKE = torch.randn(2, 40, ROWS, HEADS, HEAD_DIM)
    shape, query = CacheShape(1, HEADS, HEAD_DIM), torch.randn(ROWS, HEADS, QUERIES, HEAD_DIM)
    many = KeyValueCache.empty(shape, ROWS, 40, CPU)
    one = KeyValueCache.empty(replace(shape, dtype=dtype), ROWS, 40, CPU, layout="rows")
    # 40 positions need two blocks of 32.
    assert many.keys[0].shape == (2, ROWS, HEADS, 32, HEAD_DIM)
    assert one.keys[0].shape == (1, ROWS, HEADS, 64, HEAD_DIM)
    for position, (keys, values) in enumerate(zip(*new_2SRKE, strict=True)):
        position_R = torch.full((ROWS,), position)
        for cache in (many, one):
            cache.append(0, keys, values, cache.flat_index(position_R))
    mask = length_mask(position_R, 40)
    theirs = decode_attention(query, many.keys[0], many.values[0], mask)
    ours = decode_attention(query.to(dtype), one.keys[0], one.values[0], mask.to(dtype))
    assert ours.dtype == dtype
    assert_close(ours.float(), theirs, atol=atol, rtol=0)
