"""Pretraining at toy size: what it writes, and that a stopped one goes on."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from stage_rl.errors import CheckpointError, InputError
from stage_rl.policies.janus import JanusConfig
from stage_rl.shapes import pretrain
from stage_rl.shapes.detector import WEIGHTS, ShapesDetector
from stage_rl.shapes.model import JanusSize
from stage_rl.shapes.pretrain_policy import CHUNK, PolicyTraining, chunks, prompt_rows
from stage_rl.shapes.pretrain_tokenizer import TokenizerTraining

PLAN = pretrain.Plan(
    seed=3,
    size=JanusSize(width=16, layers=1, heads=2, mlp=16, codebook_size=32),
    tokenizer=TokenizerTraining(steps=3, batch=2, quantize_from=1, decoder_steps=1),
    detector_steps=1,
    policy=PolicyTraining(steps=2, batch=4, warmup_steps=1, pool=10, compile=False),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the plan, carried out."""
    out = tmp_path_factory.mktemp("built") / "out"
    pretrain.pretrain(PLAN, out, workers=1)
    return out


def test_the_result_loads_and_tells_how_it_was_made(built):
    cpu = torch.device("cpu")
    policy = JanusConfig(path=str(built / "checkpoint")).build(cpu)
    assert policy.codebook_size == 32
    found = ShapesDetector.load(cpu, built / "detector.safetensors")(
        torch.zeros(2, 48, 48, 3, dtype=torch.uint8)
    )
    assert len(found) == 2
    weights = load_file(built / "checkpoint" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16}
    record = json.loads((built / "checkpoint" / "training.json").read_text())
    assert record["seed"] == 3
    assert record["settings"]["tokenizer.steps"] == 3
    assert list(record["seconds"]) == ["tokenizer", "detector", "pool", "policy"]
    assert "torch" in record["packages"]


def test_every_part_of_the_model_was_trained(built):
    after = load_file(built / "checkpoint" / "model.safetensors")
    model, _ = pretrain.build_janus(PLAN.size, words=pretrain.WORDS, seed=PLAN.seed)
    before = {name: tensor.half() for name, tensor in model.state_dict().items()}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    for part in ("language_model.layers", "generation_head", "vqmodel.decoder", "vqmodel.quantize"):
        assert any(part in name for name in changed), part


def test_a_stopped_pretraining_goes_on_to_the_same_weights(built, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "train_policy", stop)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(PLAN, out, workers=1)
    assert not (out / "checkpoint").exists()
    capsys.readouterr()
    pretrain.pretrain(PLAN, out, workers=1)
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first == "tokenizer: continues at step 3"
    assert last == f"{out / 'checkpoint'}: written"
    name = "checkpoint/model.safetensors"
    assert (out / name).read_bytes() == (built / name).read_bytes()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter: file write failed"),
        SafetensorError("I/O error:\nNo space left"),
    ],
)
def test_a_full_disk_is_one_line(tmp_path, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match="make room and run the same command again") as caught:
        pretrain.pretrain(PLAN, tmp_path / "out", workers=1)
    assert "\n" not in str(caught.value)
    names = sorted(path.name for path in (tmp_path / "out" / "work").iterdir())
    assert names == ["seconds.json", "settings.json"]


def test_a_finished_pretraining_says_so(built, capsys):
    pretrain.pretrain(PLAN, built, workers=1)
    said = capsys.readouterr().out
    assert said == f"{built}: finished; name another --out to start again\n"


def test_a_folder_with_other_settings_is_refused(built, tmp_path):
    other = replace(PLAN, seed=4)
    with pytest.raises(InputError, match=r"other settings \(seed\)"):
        pretrain.pretrain(other, built, workers=1)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match="holds no pretraining"):
        pretrain.pretrain(PLAN, tmp_path, workers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer_steps": 100}, "--tokenizer-steps: 100 is too small; write at least 401"),
        ({"pool": 10}, "--pool: 10 is too small; write at least 64"),
    ],
)
def test_wrong_options_are_refused_before_any_work(tmp_path, options, message):
    with pytest.raises(InputError) as caught:
        pretrain.main(out=str(tmp_path / "out"), no_compile=True, **options)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "out").exists()


def test_without_a_compiler_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match=r"no-such-compiler.* or write --no-compile"):
        pretrain.main(out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_last_chunk_of_a_pool_holds_the_rest(tmp_path):
    for size, parts in ((2 * CHUNK, [CHUNK, CHUNK]), (CHUNK + 5, [CHUNK, 5]), (5, [5])):
        assert list(chunks(tmp_path, size).values()) == parts


def test_a_dropped_caption_becomes_the_unconditional_row_of_its_length():
    _, processor = pretrain.build_janus(PLAN.size, words=pretrain.WORDS, seed=0)
    texts = ["a photo of a red circle", "two stars"]
    ids, lengths = prompt_rows(processor, texts, [False, True])
    # BOS, the words, begin-of-image: 1 + 6 + 1 and 1 + 2 + 1.
    assert lengths.tolist() == [8, 4]
    pad = processor.tokenizer.pad_token_id
    assert ids[1, 0] == ids[0, 0] == processor.tokenizer.bos_token_id
    assert ids[1, 3] == ids[0, 7]
    assert ids[1, 1:3].tolist() == [pad, pad]


def test_it_goes_on_from_the_shipped_weights_with_the_shipped_tokenizer(tmp_path):
    policy = replace(PLAN.policy, steps=1, lr=1e-3, pool=4)
    plan = replace(PLAN, seed=5, policy=policy, start_from="shipped")
    pretrain.pretrain(plan, tmp_path / "out", workers=1)
    shipped = load_file(WEIGHTS.with_name("checkpoint") / "model.safetensors")
    after = load_file(tmp_path / "out" / "checkpoint" / "model.safetensors")
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, shipped[name])}
    assert any("language_model.layers" in name for name in changed)
    assert not any("vqmodel" in name for name in changed)
    moved = max(float((after[name] - shipped[name]).abs().max()) for name in changed)
    assert moved < 0.01  # one step at this rate, from where the shipped weights are
    assert (tmp_path / "out" / "detector.safetensors").read_bytes() == WEIGHTS.read_bytes()
