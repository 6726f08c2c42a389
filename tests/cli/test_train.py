"""`stage train` after the last step: the comparison, its label, and a stop while it is made."""

import os
import signal

import pytest

from stage_rl.cli import train as train_verb
from stage_rl.errors import Stopped


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_during_the_evaluation_says_how_to_evaluate(number, code):
    before = signal.getsignal(number)
    with (
        pytest.raises(Stopped, match="same command again to evaluate") as stopped,
        train_verb._stopped_by_signals(),
    ):
        os.kill(os.getpid(), number)
    assert stopped.value.exit_code == code
    assert signal.getsignal(number) is before
