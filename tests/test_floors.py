"""Imports point down: floor by floor between the parts of the package, and file by file within one.

Late imports and those for types alone count as well.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import stage_rl

ROOT = Path(stage_rl.__file__).parent

FLOORS = (
    (
        *("algorithm", "types", "errors", "settings", "files", "pictures", "openmp"),
        *("allocator", "vector_math", "run_records"),
        *("recipes", "studies"),
    ),
    ("distributed", "console"),
    ("policies", "prompts"),
    ("rollout", "rewards"),
    ("algorithm_config", "recipe", "config"),
    ("evaluation",),
    ("objective",),
    ("training",),
    ("shapes", "report", "serving", "study", "bench", "api"),
    ("cli", "__main__"),
)
"""Files and folders of the package, bottom up."""


def imports_of(root: Path) -> dict[str, set[str]]:
    """The modules of the package in `root` that each of its files imports, by dotted name."""
    package = root.name
    files = {
        ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file
        for file in root.rglob("*.py")
        if file != root / "__init__.py"  # the table of public names
    }
    imports = {}
    for module, file in files.items():
        named = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{file}:{node.lineno}: write the import from {package} on"
                named |= {f"{node.module}.{alias.name}" for alias in node.names}
        below = [n.removeprefix(f"{package}.") for n in named if n.startswith(f"{package}.")]
        # Of `module.Name` the name is no file.
        imports[module] = {n if n in files else n.rpartition(".")[0] for n in below}
    return imports


def upward(imports: dict[str, set[str]]) -> set[tuple[str, str]]:
    """The imports of a higher floor."""
    floor = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    return {
        (module, name)
        for module, names in imports.items()
        for name in names
        if floor[name.split(".")[0]] > floor[module.split(".")[0]]
    }


def circle(imports: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports; none where there is none."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_import_points_up_and_none_runs_in_a_circle():
    imports = imports_of(ROOT)
    assert len(imports) > 50
    assert upward(imports) == set()
    assert circle(imports) == []


def test_what_these_tests_look_for_is_found(tmp_path):
    files = {
        "rewards/base": "import stage_rl.training.loop",
        "rewards/judge": "from stage_rl.training import loop",
        "rewards/ocr": "def f():\n    from stage_rl.training.loop import train",
        "rewards/vqa": "if TYPE_CHECKING:\n    from stage_rl.training.loop import train",
        "training/loop": "from stage_rl.training.run import open_run",
        "training/run": "def f():\n    from stage_rl.training.loop import train",
    }
    root = tmp_path / "stage_rl"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.py").write_text(text)
    imports = imports_of(root)
    rewards = ("base", "judge", "ocr", "vqa")
    assert upward(imports) == {(f"rewards.{name}", "training.loop") for name in rewards}
    assert set(circle(imports)) == {"training.loop", "training.run"}
    (root / "rewards" / "clip.py").write_text("from ..training import loop")
    with pytest.raises(AssertionError, match="write the import from stage_rl on"):
        imports_of(root)


def test_rewards_know_neither_rollout_nor_policies_but_for_the_loading_of_weights():
    imports = imports_of(ROOT)
    below = {n for m, names in imports.items() if m.startswith("rewards.") for n in names}
    known = {name for name in below if name.startswith(("rollout", "policies"))}
    assert known <= {"policies.loading"}
