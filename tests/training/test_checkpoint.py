"""Which checkpoints are kept, that they reach the disk, and that nothing of them is run."""

import errno
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import stat
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from stage_rl import api
from stage_rl.errors import CheckpointError
from stage_rl.files import replace_text
from stage_rl.training import checkpoint
from stage_rl.training.checkpoint import checkpoints, damage, latest_checkpoint
from stage_rl.training.loop import train


def test_checkpoints_are_told_by_their_whole_name_and_ordered_by_number(tmp_path):
    for name in ("step_000009", "step_1000000", "step_000010", "step_old", "step_000009.bak"):
        (tmp_path / name).mkdir()
    found = [path.name for path in checkpoints(tmp_path)]
    assert found == ["step_1000000", "step_000010", "step_000009"]


def test_a_manifest_that_lists_nothing_is_damage(tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    assert damage(tmp_path) == "manifest.json lists no state.json"


def test_a_name_in_the_manifest_that_is_damaged_is_damage_and_nothing_is_to_be_removed(tmp_path):
    for name in ("state.json", "policy.safetensors"):
        (tmp_path / name).touch()
    empty = hashlib.sha256(b"").hexdigest()
    sums = {"state.json": empty, "polizy.safetensors": empty}
    (tmp_path / "manifest.json").write_text(json.dumps(sums))
    assert damage(tmp_path) == "polizy.safetensors is missing"


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(recipe, caplog):
    every = ("run.save_every=1", "run.keep_checkpoints=2", "optimizer.schedule=constant")
    run = train(recipe("steps=3", *every))
    root = run / "checkpoints"
    (root / "step_000003" / "policy.safetensors").write_bytes(b"")
    (root / "step_000009").mkdir()  # as a run that went further would leave it
    with caplog.at_level(logging.WARNING):
        train(recipe("steps=3", *every))
    assert [path.name for path in checkpoints(root)] == ["step_000003", "step_000002"]
    assert all(damage(path) is None for path in checkpoints(root))


class Proof:
    """Unpickled as torch's own reader does it, it writes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (Path(self.file),)


def manifest(folder):
    """A manifest that lists whatever lies in a folder, as a stranger would write it."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    sums = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    (folder / "manifest.json").write_text(json.dumps(sums))


def save_shards(folder, tensors):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(tensors, storage_writer=FileSystemWriter(folder / "shards"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_janus_folder):
    """A run of two steps with a checkpoint of each; tests copy it."""
    from stage_rl.config import load_recipe

    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(f"""
steps: 2
policy: {{kind: janus, path: {tiny_janus_folder}}}
prompts: {{kind: "loop_parts:Texts"}}
rewards: [{{kind: "loop_parts:Brightness"}}]
rollout: {{prompts_per_step: 2, group_size: 2, guidance_scale: 2.0}}
probe: {{every: 0}}
run: {{dir: {folder}/run, save_every: 1}}
""")
    return train(load_recipe(folder / "tiny.yaml"))


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("call", [lambda run, out: api.sample(run, "a red circle"), api.export])
def test_the_index_of_shards_is_not_run(run, tmp_path, call, listed):
    saved = run / "checkpoints" / "step_000002"
    (saved / "shards").mkdir()
    (saved / "shards" / ".metadata").write_bytes(pickle.dumps(Proof(tmp_path / "executed")))
    if listed:
        manifest(saved)
    message = "not run" if listed else r"metadata: manifest\.json lists no such file; remove"
    with pytest.raises(CheckpointError, match=message):
        call(str(run), tmp_path / "out")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("paths", [b"pathlib", b"pathlib._local"])
def test_shards_that_were_written_by_torch_are_read(run, paths):
    saved = run / "checkpoints" / "step_000002"
    tensors = load_file(saved / "policy.safetensors")
    named = {f"policy.{name}": tensor for name, tensor in tensors.items()}
    save_shards(saved, named)
    # Python 3.13 names the module of a path otherwise.
    index = saved / "shards" / ".metadata"
    plain = pickle.dumps(pickle.loads(index.read_bytes()), protocol=2)
    renamed = re.sub(rb"cpathlib(\._local)?\nPosixPath\n", b"c" + paths + b"\nPosixPath\n", plain)
    assert paths + b"\n" in renamed
    index.write_bytes(renamed)
    (saved / "policy.safetensors").unlink()
    manifest(saved)
    policy = api.load(run, "cpu")
    parameters = dict(policy.module.named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in tensors.items())


def test_an_index_that_names_a_file_elsewhere_is_refused(run):
    saved = run / "checkpoints" / "step_000002"
    tensors = {f"policy.{n}": t for n, t in load_file(saved / "policy.safetensors").items()}
    save_shards(saved, tensors)
    index = saved / "shards" / ".metadata"
    # Of the same length, as the index is a pickle.
    index.write_bytes(index.read_bytes().replace(b"__0_0.distcp", b"../../../x.y"))
    manifest(saved)
    with pytest.raises(CheckpointError, match=r"'\.\./\.\./\.\./x\.y' lies elsewhere"):
        api.load(run, "cpu")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_read_is_not_called_damaged_and_nothing_is_rolled_back(
    run, monkeypatch, caplog, number
):
    def fail(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(checkpoint, "_sum", fail)
    with pytest.raises(CheckpointError, match=rf"cannot be read \({os.strerror(number)}\); put"):
        latest_checkpoint(run / "checkpoints")
    assert not caplog.records


def test_files_have_the_mode_that_the_umask_gives(run):
    modes = {stat.S_IMODE(p.stat().st_mode) for p in run.rglob("*") if p.is_file()}
    umask = os.umask(0)
    os.umask(umask)
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_checkpoint_that_is_no_folder_is_named(run, kind):
    newest = run / "checkpoints" / "step_000002"
    if kind == "link":
        newest.rename(run / "elsewhere")
        newest.symlink_to(run / "elsewhere")
    else:
        shutil.rmtree(newest)
        newest.write_text("")
    with pytest.raises(CheckpointError, match=r"step_000002: is not a folder but a file or link"):
        checkpoints(run / "checkpoints")


def test_a_manifest_reads_nothing_outside_of_its_folder(run):
    saved = run / "checkpoints" / "step_000002"
    sums = json.loads((saved / "manifest.json").read_text())
    (saved / "manifest.json").write_text(json.dumps({**sums, "/dev/zero": ""}))
    assert damage(saved) == "/dev/zero is missing"
    (saved / "manifest.json").write_text("[" * 100_000)
    assert "manifest.json cannot be read" in str(damage(saved))


@pytest.mark.parametrize("state", ["{}", "[]", '{"step": "two", "counters": {}}', "[" * 100_000])
def test_a_state_that_no_training_wrote_is_named(run, state):
    saved = run / "checkpoints" / "step_000002"
    (saved / "state.json").write_text(state)
    manifest(saved)
    with pytest.raises(CheckpointError, match=r"state\.json is not that of a training"):
        latest_checkpoint(run / "checkpoints")


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x02K\x01.", pickle.dumps(Proof("/tmp/no"), protocol=2)]
)
def test_moments_that_no_training_wrote_are_named(run, tiny_janus, content):
    saved = run / "checkpoints" / "step_000002"
    (saved / "optimizer.pt").write_bytes(content)
    manifest(saved)
    found = latest_checkpoint(run / "checkpoints")
    assert found is not None
    optimizer = torch.optim.AdamW(tiny_janus.module.parameters())
    with pytest.raises(CheckpointError, match="its optimizer cannot be loaded"):
        found.load_optimizer(optimizer, tiny_janus.module)


def test_a_file_is_not_written_through_a_link(run, tmp_path):
    (tmp_path / "precious").write_text("kept")
    (run / ".recipe.tmp.yaml").symlink_to(tmp_path / "precious")
    replace_text(run / "recipe.yaml", "new")
    assert (tmp_path / "precious").read_text() == "kept"
    assert (run / "recipe.yaml").read_text() == "new"


def test_every_file_is_on_the_disk_before_its_name_and_the_old_checkpoint_goes_last(
    recipe, monkeypatch
):
    events = []
    kept_sync, kept_rename, kept_remove = checkpoint.sync, Path.rename, shutil.rmtree

    def sync(path):
        events.append(f"sync {path.name}")
        kept_sync(path)

    def rename(path, target):
        events.append(f"rename {target.name}")
        return kept_rename(path, target)

    def remove(path, **options):
        if Path(path).exists():
            events.append(f"remove {Path(path).name}")
        kept_remove(path, **options)

    monkeypatch.setattr(checkpoint, "sync", sync)
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", remove)
    train(recipe("steps=2", "run.save_every=1", "run.keep_checkpoints=1"))
    second = events[events.index("rename step_000001") + 2 :]
    assert sorted(second[:3]) == ["sync optimizer.pt", "sync policy.safetensors", "sync state.json"]
    assert second[3:] == [
        *("sync .step_000002.tmp", "sync manifest.json", "sync .step_000002.tmp"),
        *("rename step_000002", "sync checkpoints", "remove step_000001"),
    ]
