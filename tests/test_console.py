"""Progress of long work on the error stream, and of a run."""

import os
import re
import signal
import subprocess
import sys

import pytest

from stage_rl import console


def test_progress_is_plain_lines_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(console, "SECONDS_BETWEEN_LINES", 0.0)
    with console.progress("evaluate it", 10) as advance:
        advance(4)
        advance(6)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(",")[0] for line in lines] == [
        "evaluate it: 4/10",
        "evaluate it: 10/10",
    ]


def test_without_a_terminal_each_step_is_a_line_with_the_time_left_by_the_last_steps(capsys):
    with console.live_view(first=0, last=100) as view:
        view.show(1, {"reward/mean": 0.5, "time/step_s": 60.0})
        view.show(2, {"reward/mean": None, "grad/norm": 0.25, "time/step_s": 2.0})
    # (100 - 1) x 60 s; (100 - 2) x 31 s = 3038 s.
    assert capsys.readouterr().out.splitlines() == [
        "step 1/100  reward/mean 0.500  time/step_s 60.000  left 1:39:00",
        "step 2/100  grad/norm 0.250  time/step_s 2.000  left 0:50:38",
    ]


def test_a_terminal_of_80_columns_shows_bar_step_time_left_and_numbers(monkeypatch, capsys):
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "80", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    numbers = {"reward/mean": 0.5, "kl/mean": 0.0625, "time/step_s": 36.0}
    with console.live_view(first=0, last=1000) as view:
        for step in range(889, 901):
            view.show(step, numbers)
    shown = [_plain(line) for line in capsys.readouterr().out.splitlines()]
    # Every tenth step leaves a line above the bar.
    assert [line.split("  ")[0] for line in shown if line.startswith("step")] == [
        "step 890/1000",
        "step 900/1000",
    ]
    bar = [line for line in shown if line.strip()][-1]
    assert bar.strip().endswith("900/1000 1:00:00 reward/mean 0.500  kl/mean 0.062")
    assert len(bar) <= 80


def _plain(line):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line.rpartition("\r")[2])


@pytest.mark.parametrize("reader", ["closed", "full"])
def test_a_run_goes_on_when_nobody_reads_what_it_says(reader):
    code = (
        "import sys, time\n"
        "from stage_rl.console import live_view\n"
        "with live_view(first=0, last=3) as view:\n"
        "    for step in (1, 2, 3):\n"
        "        view.show(step, {})\n"
        "        time.sleep(0.2)\n"
        "print('end')\n"
        "print('done', file=sys.stderr)\n"
    )
    command = f'{sys.executable} -c "$CODE" ' + {"closed": "| true", "full": "> /dev/full"}[reader]
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CODE": code},
    )
    assert (done.returncode, done.stderr) == (0, "done\n")


@pytest.mark.parametrize("reader", ["closed", "full"])
def test_what_goes_to_a_closed_stderr_stops_nothing(reader):
    code = (
        "import time\n"
        "from stage_rl import console\n"
        "console.SECONDS_BETWEEN_LINES = 0\n"
        "with console.progress('draw', 3) as advance:\n"
        "    for _ in range(3):\n"
        "        time.sleep(0.2)\n"
        "        advance(1)\n"
        "console.say_aside('leaks')\n"
        "print('done')\n"
    )
    way = {"closed": "2> >(true)", "full": "2> /dev/full"}[reader]
    done = subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "$CODE" {way}'],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CODE": code},
    )
    assert (done.returncode, done.stdout) == (0, "done\n")


def test_a_signal_that_nohup_ignores_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with console.stop_signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals == []
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with console.stop_signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals == [signal.SIGHUP]
    finally:
        signal.signal(signal.SIGHUP, before)
