"""How memory of a GPU is taken is set before it is used first, unless the user has said it."""

import pytest

from stage_rl.allocator import let_segments_grow


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_grow_unless_the_user_has_said_how(name):
    environment = {}
    let_segments_grow(environment)
    assert environment == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    environment = {name: "max_split_size_mb:64"}
    let_segments_grow(environment)
    assert environment == {name: "max_split_size_mb:64"}
