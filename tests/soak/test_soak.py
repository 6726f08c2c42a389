"""A tiny training that is killed, loses files and runs out of disk, again and again, and still ends
bit by bit as one that nothing happened to.

`python -m pytest -s -m slow tests/soak` prints the counts; SOAK_KILLS says how often it is killed,
SOAK_FULL_DISKS how often its disk, of a few megabytes in a mount namespace, is full.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from run_files import parameters_of, steps_of, untimed

import stage_rl

STEPS = 24
LONGEST_S = 1800
NURSERY = """
import os, signal, sys
import stage_rl.api, stage_rl.cli.train, stage_rl.policies.janus
from stage_rl.cli import main

while line := sys.stdin.readline():
    recipe, output = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["stage", "train", recipe]
        main()
    print(child, flush=True)
    if sys.stdin.readline() == "kill\\n":
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Has loaded what a training needs, which takes far longer than a tiny one, and makes a process for
each of the trainings that it is told of."""

ROOM = 400_000
"""Bytes that are left at most where a disk is full; a run takes more."""
RECIPE = """
steps: {steps}
policy: {{kind: janus, path: {weights}}}
prompts: {{kind: "loop_parts:Texts"}}
rewards: [{{kind: "loop_parts:Brightness"}}]
rollout: {{prompts_per_step: 2, group_size: 3, guidance_scale: 2.0}}
optimizer: {{lr: 1.0e-3}}
probe: {{every: 4, num_prompts: 2, images_per_prompt: 1}}
run: {{dir: {folder}, save_every: 2, keep_checkpoints: 3, log_images_every: 4}}
"""


class SmallDisk:
    """A file system of 16 MB that processes see which are started behind `enter`."""

    SIZE = 16 * 2**20

    def __init__(self, mount_point):
        mount_point.mkdir()
        mount = f"mount -t tmpfs -o size={self.SIZE} none '{mount_point}' && echo mounted && cat"
        self._holder = subprocess.Popen(
            ["unshare", "--map-root-user", "--mount", "sh", "-c", mount],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._holder.stdout is not None
        self.message = self._holder.stdout.readline().strip()
        target = ["--target", str(self._holder.pid)]
        self.enter = ["nsenter", *target, "--user", "--preserve-credentials", "--mount"]
        self.seen_as = mount_point
        self.folder = Path(f"/proc/{self._holder.pid}/root{mount_point}")

    def leave_room(self, num_bytes):
        """Fills the disk but for so many bytes; 0 bytes of filling where None."""
        filling = self.folder / "filling"
        filling.unlink(missing_ok=True)
        if num_bytes is not None:
            free = shutil.disk_usage(self.folder).free
            with filling.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, free - num_bytes))

    def close(self):
        """The file system goes with its last process."""
        self._holder.communicate()


class Soak:
    """Trains in processes of its own, and does harm between and during them.

    `folder` holds the runs; what a process says goes to `output`.
    """

    def __init__(self, folder, weights, output, *, kills=0, disk=None, full_disks=0):
        self.folder, self.counts, self._rng = folder, Counter(), random.Random(0)
        self._file, self._weights = folder / "soak.yaml", weights
        self._wanted = {"kills": kills, "full disks": full_disks}
        self._disk = disk
        self._seen_as = disk.seen_as if disk else folder
        self._run = folder
        self._output = output
        folders = (Path(stage_rl.__file__).parents[1], Path(__file__).parents[1])
        self._nursery = subprocess.Popen(
            [*(disk.enter if disk else ()), sys.executable, "-c", NURSERY],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def is_over(self):
        return all(self.counts[what] >= number for what, number in self._wanted.items())

    def begin(self, name):
        """Makes a run the one that is trained from now on; its folder."""
        self._run = self.folder / name
        folder = self._seen_as / name
        self._file.write_text(RECIPE.format(steps=STEPS, weights=self._weights, folder=folder))
        return self._run

    def train(self, *, kill_after=None):
        """A process's exit code; it is killed so many seconds after it has begun."""
        self._output.write_text("")
        pid = self._ask(f"{self._seen_as / self._file.name}\t{self._output}")
        if kill_after is not None:
            self._wait_for_begin(pid)
            time.sleep(kill_after)
        code = int(self._ask("wait" if kill_after is None else "kill"))
        said = self._output.read_text()
        assert "Traceback" not in said, said
        if code == 1:
            self._was_full(said)
        return code

    def _wait_for_begin(self, pid):
        """Returns when a process trains, or has ended."""
        begun = ("begins", "goes on")
        while not any(word in self._output.read_text() for word in begun):
            if ") Z " in Path(f"/proc/{pid}/stat").read_text():
                return
            time.sleep(0.02)

    def _ask(self, line):
        """The nursery's answer to a line."""
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.write(f"{line}\n")
        self._nursery.stdin.flush()
        return self._nursery.stdout.readline().strip()

    def _was_full(self, said):
        """Nothing but a full disk fails, in one line that says so."""
        assert self._disk, said
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert "No space left on device" in line, said
        self.counts["full disks"] += 1

    def harm(self):
        """Damages the newest of several checkpoints: a byte, the end, or a whole file."""
        saved = sorted((self._run / "checkpoints").glob("step_*"))
        if len(saved) < 2:
            return
        file = self._rng.choice([path for path in sorted(saved[-1].rglob("*")) if path.is_file()])
        data = bytearray(file.read_bytes())
        how = self._rng.choice(["byte", "end", "file"])
        if how == "byte":
            data[self._rng.randrange(len(data))] ^= 1 + self._rng.randrange(255)
        file.write_bytes(data if how == "byte" else data[: len(data) // 2])
        if how == "file":
            file.unlink()
        self.counts[f"damaged: {how}"] += 1

    def run_through(self):
        """Trains to the end through kills, damage and full disks."""
        code = -1
        while code:
            if self._disk and self.counts["full disks"] < self._wanted["full disks"]:
                self._disk.leave_room(self._rng.randrange(1000, ROOM))
                code = self.train()
                self._disk.leave_room(None)
            elif self.counts["kills"] < self._wanted["kills"]:
                code = self.train(kill_after=self._rng.uniform(0, 3))
                self.counts["kills"] += code == -signal.SIGKILL
            else:
                code = self.train()
                assert code == 0
            if code and self._rng.random() < 0.4:
                self.harm()

    def compare(self):
        """Run after run until enough has happened; each must be the one that was left alone."""
        started = time.monotonic()
        whole = self.begin("whole")
        assert self.train() == 0
        wanted, lines = parameters_of(whole, STEPS), untimed(steps_of(whole))
        while not self.is_over():
            self.counts["runs"] += 1
            run = self.begin(f"run{self.counts['runs']}")
            self.run_through()
            found = parameters_of(run, STEPS)
            assert all(found[name].equal(wanted[name]) for name in wanted)
            assert untimed(steps_of(run)) == lines
            shutil.rmtree(run)
        self._nursery.communicate()
        counts = ", ".join(f"{name} {number}" for name, number in sorted(self.counts.items()))
        seconds = time.monotonic() - started
        print(f"\n{counts}; all equal bit by bit; {seconds:.0f} s")
        return seconds


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_if_nothing_had_happened(tmp_path, tiny_janus_folder):
    kills = int(os.environ.get("SOAK_KILLS", "50"))
    soak = Soak(tmp_path, tiny_janus_folder, tmp_path / "output", kills=kills)
    assert soak.compare() < LONGEST_S * kills / 50


@pytest.fixture
def small_disk(tmp_path):
    disk = SmallDisk(tmp_path / "disk")
    if disk.message != "mounted":
        disk.close()
        pytest.skip(f"no file system can be mounted here: {disk.message}")
    yield disk
    disk.close()


@pytest.mark.slow
def test_a_run_whose_disk_is_full_ends_as_if_nothing_had_happened(
    small_disk, tiny_janus_folder, tmp_path
):
    number = int(os.environ.get("SOAK_FULL_DISKS", "10"))
    place = (small_disk.folder, tiny_janus_folder, tmp_path / "output")
    Soak(*place, disk=small_disk, full_disks=number).compare()
