"""`stage runs` and `stage watch`: a line for each run, and one that is followed."""

import fcntl
import json

from run_files import write_run


def test_the_list_has_a_line_for_each_run(tmp_path, stage):
    status = {"recipe": "shapes", "overrides": ["seed=2"], "state": "failed", "why": "NaN"}
    write_run(tmp_path / "one", [0.5], status=status)
    write_run(tmp_path / "two", [0.25] * 10, scores=(0.25, 0.375, 0.0625, 0.1875))
    head, *lines = stage("runs", tmp_path).stdout.splitlines()
    assert head.split() == ["run", "steps", "reward", "kl", "score", "time", "state", "recipe"]
    one, two = sorted(lines)
    assert one.split() == ["one", "1/10", "0.500", "0m02s", "failed", "shapes", "seed=2", "(NaN)"]
    assert two.split() == ["two", "10/10", "0.250", "gold", "0.375", "0m20s", "finished", "tiny"]


def test_a_folder_that_cannot_be_read_is_a_line_of_the_list(tmp_path, stage):
    write_run(tmp_path / "good", [0.5])
    for name, text in {"bad": "[]", "deep": "[" * 100_000}.items():
        (write_run(tmp_path / name, [0.5]) / "status.json").write_text(text)
    (write_run(tmp_path / "part", [0.5]) / "evaluation.json").write_text('{"trained": {}}')
    lines = {line.split()[0]: line for line in stage("runs", tmp_path).stdout.splitlines()[1:]}
    assert "stopped" in lines.pop("good")
    assert set(lines) == {"bad", "deep", "part"}
    assert all("cannot be read" in line for line in lines.values())


def test_a_run_is_watched_until_it_ends(tmp_path, stage, monkeypatch):
    folder = write_run(tmp_path / "one", [0.5, 0.25], status={"state": "running"})
    handle = (folder / ".lock").open("w")
    fcntl.flock(handle, fcntl.LOCK_EX)

    def goes_on(seconds):
        line = {"step": 2, "reward/mean": 0.125, "time/step_s": 2.0}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(f"\n{json.dumps(line)}\n")
        (folder / "status.json").write_text('{"state": "stopped", "why": "after step 3"}')
        handle.close()

    monkeypatch.setattr("stage_rl.cli.runs.time.sleep", goes_on)
    lines = stage("watch", folder).stdout.splitlines()
    assert [line.split("  ")[:2] for line in lines[:2]] == [
        ["step 2/10", "reward/mean 0.250"],
        ["step 3/10", "reward/mean 0.125"],
    ]
    assert lines[2:] == [f"{folder}: stopped after 3 steps: after step 3"]
