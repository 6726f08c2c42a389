"""What a training sets up for a GPU, as far as a CPU can see it."""

import gzip
import json
import threading
from contextlib import contextmanager

import pytest
import torch
from loop_parts import Brightness

from stage_rl.errors import InputError
from stage_rl.policies import janus
from stage_rl.rewards.base import RewardConfig
from stage_rl.rewards.judge import RewardFunctions, WeightedReward
from stage_rl.rollout import decoder
from stage_rl.training.loop import train, train_step
from stage_rl.training.metrics import peak_bf16, traced
from stage_rl.training.trainer import build_trainer
from stage_rl.types import Prompt, Rollout


def test_the_trace_of_one_step_is_in_the_run_folder(recipe):
    run = train(recipe("steps=2", "training.profile=1", "probe.every=0"))
    (file,) = (run / "profile").iterdir()
    assert file.name == "000001.json.gz"
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    assert {"aten::mm", "aten::scaled_dot_product_attention"} <= {e["name"] for e in events}


def test_a_step_that_fails_leaves_no_trace(tmp_path):
    with pytest.raises(ZeroDivisionError), traced(tmp_path / "profile" / "000000.json.gz"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA Something Else", None),
    ],
)
def test_the_peak_of_a_gpu_is_known_by_its_name_or_not_at_all(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_bf16(torch.device("cuda")) == peak
    assert peak_bf16(torch.device("cpu")) is None


@pytest.mark.parametrize("dtype", ["mixed", "float32"])
def test_the_samplers_head_alone_takes_tf32_and_with_a_bf16_trunk_alone(recipe, monkeypatch, dtype):
    matmul = torch.backends.cuda.matmul
    seen = {"sampler": set(), "trainer": set()}
    linear, head = decoder.linear, janus.JanusPolicy.head

    def sampling(*args):
        # The trunk's matrices are bf16 in the mix, those of the head are fp32.
        if args[1].dtype == torch.float32:
            seen["sampler"].add(matmul.fp32_precision)
        return linear(*args)

    def scoring(self, hidden):
        seen["trainer"].add(matmul.fp32_precision)
        return head(self, hidden)

    monkeypatch.setattr(decoder, "linear", sampling)
    monkeypatch.setattr(janus.JanusPolicy, "head", scoring)
    before = matmul.fp32_precision
    settings = recipe(f"rollout.dtype={dtype}", f"training.dtype={dtype}", "probe.every=0")
    train_step(build_trainer(settings, settings.prompts.build()), 0)
    assert seen["trainer"] == {before}
    assert seen["sampler"] == {"tf32" if dtype == "mixed" else before}
    assert matmul.fp32_precision == before != "tf32"


def test_rewards_run_on_a_stream_of_their_own_behind_what_made_their_weights(monkeypatch):
    calls, here = [], threading.local()

    @contextmanager
    def stream(chosen):
        before, here.stream = getattr(here, "stream", "default"), chosen
        yield
        here.stream = before

    def bright(images_NHWC, prompts):
        calls.append(f"on {getattr(here, 'stream', 'default')}")
        return Brightness().build(torch.device("cpu"))(images_NHWC, prompts)

    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "its own")
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: getattr(here, "stream", "default"))
    rewards = RewardFunctions([WeightedReward("b", 1.0, bright, timeout_s=60.0)])
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    rollout = Rollout((Prompt("a star", 0),), 2, torch.zeros(2, 1, dtype=torch.long), images)
    for _ in range(2):
        assert rewards.submit(rollout).result().rewards_PG.tolist() == [[0, 0]]
    assert calls == ["wait", "on its own", "on its own"]


class Placed(Brightness):
    def build(self, device):
        self.devices.append(device)
        return super().build(device)


def test_a_reward_is_built_on_the_device_that_it_names(recipe, monkeypatch):
    monkeypatch.setattr(Placed, "devices", [], raising=False)
    kind = f"{__name__}:Placed"
    settings = recipe(f"rewards=[{{kind: '{kind}', device: cuda:1}}, {{kind: '{kind}', name: b}}]")
    monkeypatch.setattr(RewardConfig, "device_or", lambda self, device: self.device or device)
    build_trainer(settings, settings.prompts.build())
    assert Placed.devices == ["cuda:1", torch.device("cpu")]


def test_the_device_of_a_reward_is_looked_for(monkeypatch):
    cpu = torch.device("cpu")
    with pytest.raises(InputError, match="reward 'Brightness': device: unknown 'meta0'"):
        Brightness(device="meta0").device_or(cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Brightness(device="cuda:1").device_or(cpu) == torch.device("cuda:1")
    assert Brightness().device_or(cpu) == cpu
    with pytest.raises(InputError, match="there is no 'cuda:2'; the last GPU here is cuda:1"):
        Brightness(device="cuda:2").device_or(cpu)
