"""The benchmark of the shapes world with few prompts."""

import pytest

from stage_rl.evaluation.suites import PromptSet
from stage_rl.shapes.suite import SHAPES_GENEVAL, benchmark_prompts


@pytest.fixture(scope="module")
def few():
    """Only the first two prompts of each set, so that a test takes a second."""
    by_task = {}
    for prompt in benchmark_prompts():
        by_task.setdefault(SHAPES_GENEVAL.task_of(prompt), []).append(prompt)
    prompts = [prompt for some in by_task.values() for prompt in some[:2]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PromptSet, "prompts", lambda *_args, **_options: prompts)
        yield
