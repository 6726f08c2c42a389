import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from stage_rl.rollout import attention
from stage_rl.rollout.attention import CacheShape, KeyValueCache, decode_attention, length_mask

CPU = torch.device("cpu")
ROWS, HEADS, QUERIES, SLOTS, HEAD_DIM = 3, 2, 2, 75, 8


@pytest.mark.parametrize("block", [1, 8, 32])
def test_each_row_attends_to_its_own_slots_across_blocks(block, monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", block)
    torch.manual_seed(0)
    keys, values = torch.randn(2, ROWS, HEADS, SLOTS, HEAD_DIM)
    cache = KeyValueCache.empty(CacheShape(1, HEADS, HEAD_DIM), ROWS, SLOTS, CPU)
    # Garbage of an earlier call, everywhere.
    cache.keys[0].fill_(100)
    cache.values[0].fill_(100)
    last_R = torch.tensor([4, 40, 74])
    for position in range(SLOTS):
        # A row that has reached its last slot goes on writing there.
        slot_R = last_R.clamp(max=position)
        rows_R = torch.arange(ROWS)
        new = keys[rows_R, :, slot_R], values[rows_R, :, slot_R]
        cache.append(0, *new, cache.slot_index(slot_R))
    query = torch.randn(ROWS, HEADS, QUERIES, HEAD_DIM)
    ours = decode_attention(query, cache.keys[0], cache.values[0], length_mask(last_R, SLOTS))
    for row, last in enumerate(last_R.tolist()):
        live = slice(0, last + 1)
        theirs = scaled_dot_product_attention(query[row], keys[row, :, live], values[row, :, live])
        assert_close(ours[row], theirs, atol=1e-6, rtol=1e-5)


def test_a_prefill_fills_the_rows_of_its_group(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK", 4)
    keys, values = torch.randn(2, 2, 1, 6, 3)
    cache = KeyValueCache.empty(CacheShape(1, 1, 3), 4, 9, CPU)
    cache.fill(0, keys, values, 2)
    # Blocks WRKUE side by side: 3 blocks of 4 slots for 9 slots.
    slots_RKSE = torch.cat(list(cache.keys[0]), dim=2)
    assert slots_RKSE.shape == (4, 1, 12, 3)
    assert torch.equal(slots_RKSE[:, :, :6], keys[[0, 0, 1, 1]])
    assert slots_RKSE[:, :, 6:].eq(0).all()
    assert torch.equal(cache.values[0][1, 2, :, :2], values[1, :, 4:6])
