"""Loading of reward models: what is refused, and what is not."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer

from stage_rl.errors import WeightsError
from stage_rl.rewards.pretrained import load_model, load_tokenizer

SMALL = BertConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    intermediate_size=8,
    max_position_embeddings=8,
)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    BertModel(SMALL).save_pretrained(tmp_path)
    return tmp_path


def change(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_model_is_loaded_whole_frozen_and_in_eval_mode(folder):
    module = load_model(BertModel, str(folder))
    wanted = load_file(folder / "model.safetensors")
    assert all(torch.equal(p, wanted[name]) for name, p in module.named_parameters())
    assert not any(p.requires_grad for p in module.parameters())
    assert not module.training


def test_a_missing_tensor_is_named(folder):
    change(folder, lambda tensors: tensors.pop("encoder.layer.0.output.dense.bias"))
    with pytest.raises(WeightsError, match=r"missing: encoder.layer.0.output.dense.bias; write"):
        load_model(BertModel, str(folder))


def test_a_tensor_of_another_shape_is_named(folder):
    change(folder, lambda tensors: tensors.update({"pooler.dense.bias": torch.zeros(9)}))
    with pytest.raises(WeightsError, match=r"of another shape: pooler.dense.bias"):
        load_model(BertModel, str(folder))


def test_a_tensor_too_many_is_named(folder):
    change(folder, lambda tensors: tensors.update({"more.weight": torch.zeros(2)}))
    with pytest.raises(WeightsError, match=r"unexpected: more\.weight; write"):
        load_model(BertModel, str(folder))


def test_tables_that_old_checkpoints_keep_are_no_fault(folder):
    change(folder, lambda tensors: tensors.update({"rotary.inv_freq": torch.zeros(2)}))
    load_model(BertModel, str(folder))


def test_only_what_is_said_to_be_unread_may_be_missing_or_over(folder):
    def edit(tensors):
        tensors.pop("pooler.dense.bias")
        tensors["pooler.more"] = torch.zeros(2)

    change(folder, edit)
    load_model(BertModel, str(folder), unread=r"^pooler\.")
    with pytest.raises(WeightsError, match=r"missing: pooler.dense.bias; unexpected: pooler.more"):
        load_model(BertModel, str(folder), unread=r"^encoder\.")


@pytest.mark.parametrize("path", ["no/such/folder", "./nothing"])
def test_a_path_that_is_nothing_is_one_line(path):
    with pytest.raises(WeightsError, match="no such folder; write a folder with weights"):
        load_model(BertModel, path)


def test_a_folder_without_a_tokenizer_says_so(folder):
    with pytest.raises(WeightsError, match="no tokenizer there"):
        load_tokenizer(str(folder))


def test_a_tokenizer_is_loaded_with_its_words(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    assert load_tokenizer(str(folder))("Cat")["input_ids"] == [2, 5, 3]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(WeightsError, match="is a file"):
        load_model(BertModel, str(tmp_path / "weights.pt"))
