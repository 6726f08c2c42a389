import os
import subprocess
import sys
import threading

import pytest

from stage_rl import openmp
from stage_rl.openmp import (
    CHOSEN_BY_USER,
    limit_spinning,
    overcommitment,
    sleep_beside_others,
    threads_beside_others,
)


def test_threads_stop_spinning_soon_unless_the_user_has_said_how_they_wait():
    environment = {"OMP_NUM_THREADS": "2"}
    limit_spinning(environment)
    assert environment == {"OMP_NUM_THREADS": "2", "KMP_BLOCKTIME": "1"}
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        set_by_user = {name: "0"}
        limit_spinning(set_by_user)
        assert set_by_user == {name: "0"}


def test_the_command_limits_spinning_before_torch_is_loaded():
    script = (
        "import atexit, os, sys\n"
        "from stage_rl.cli import main\n"
        "sys.argv = ['stage', 'recipes']\n"
        "atexit.register(lambda: print(os.environ['KMP_BLOCKTIME'], 'torch' in sys.modules))\n"
        "main()"
    )
    unset = {name: value for name, value in os.environ.items() if name not in CHOSEN_BY_USER}
    done = subprocess.run(
        [sys.executable, "-c", script], env=unset, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1].split() == ["1", "False"]


@pytest.mark.parametrize(
    ("others", "threads", "expected"),
    [
        (0, 2, None),
        (1, 1, None),
        (1, 2, "1 other threads run beside 2 on 2 cores"),
        (0, 3, "3 threads on 2 cores"),
    ],
)
def test_a_machine_is_overcommitted_where_others_and_threads_exceed_its_cores(
    others, threads, expected, monkeypatch
):
    monkeypatch.setattr(openmp, "num_cores", lambda: 2)
    monkeypatch.setattr(openmp, "busy_others", lambda: others)
    message = overcommitment(threads)
    assert (message is None) == (expected is None)
    assert expected is None or expected in message


def test_a_second_team_waits_while_others_use_the_cores(monkeypatch):
    for name in CHOSEN_BY_USER:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(openmp, "num_cores", lambda: 2)
    load, seen = iter([0, 2, 2, 0]), []
    monkeypatch.setattr(openmp, "busy_others", lambda: next(load))

    def parked():
        return [thread for thread in threading.enumerate() if thread.name == "parked"]

    for _ in range(4):
        crowded = sleep_beside_others(2)
        if not crowded:  # a team that is released ends
            for thread in parked():
                thread.join(timeout=60)
        seen.append((crowded, len(parked()), threads_beside_others(2)))
    assert seen == [(False, 0, 2), (True, 1, 1), (True, 1, 1), (False, 0, 2)]
    # One thread waits for none, and of more than the cores none spins.
    assert not sleep_beside_others(1)
    assert not sleep_beside_others(3)
    monkeypatch.setenv("GOMP_SPINCOUNT", "300000")
    monkeypatch.setattr(openmp, "busy_others", lambda: 2)
    assert not sleep_beside_others(2)


def test_of_many_cores_those_are_left_that_others_do_not_use(monkeypatch):
    monkeypatch.setattr(openmp, "num_cores", lambda: 16)
    for others, left in ((0, 16), (3, 13), (40, 1)):
        monkeypatch.setattr(openmp, "_others", others)
        assert threads_beside_others(16) == left
    monkeypatch.setattr(openmp, "_others", 3)
    assert threads_beside_others(8) == 8


def test_what_runs_beside_is_the_fewest_of_some_looks(monkeypatch, tmp_path):
    file = tmp_path / "loadavg"
    file.write_text("9.00 9.00 9.00 4/312 77\n")
    monkeypatch.setattr(openmp, "LOAD", file)
    looks = iter(["9 9 9 2/312 77", "9 9 9 5/312 77", "9 9 9 4/312 77"])
    monkeypatch.setattr(openmp.time, "sleep", lambda _: file.write_text(next(looks, "0 0 0 3/9 1")))
    # 4, 2, 5 and 4 run, this one among them.
    assert openmp.busy_others() == 1
    file.write_text("9.00 9.00 9.00 1/312 77\n")
    assert openmp.busy_others() == 0
    assert file.read_text().split()[3] == "1/312"  # one look is enough where nothing runs
    monkeypatch.setattr(openmp, "LOAD", tmp_path / "none")
    monkeypatch.setattr(os, "getloadavg", lambda: (1.8, 9.0, 9.0))
    assert openmp.busy_others() == 2
