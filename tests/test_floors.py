"""Imports go down only: the floors of the package, bottom up."""

import ast
from pathlib import Path

import pytest

import stage_rl

ROOT = Path(stage_rl.__file__).parent
FLOORS = {
    "algorithm config errors health objective pictures recipe_errors": 0,
    "registry schema settings types": 0,
    "policies prompts": 1,
    "rollout rewards shapes": 2,
    "training evaluation serving": 3,
    "report bench shapes.pretrain shapes.show": 4,
    "cli __main__": 5,
}
FLOOR_OF = {part: floor for parts, floor in FLOORS.items() for part in parts.split()}


def floor(module: str) -> int:
    """The floor of the longest listed name that a dotted name below stage_rl begins with."""
    return FLOOR_OF[max((part for part in FLOOR_OF if module.startswith(part)), key=len)]


def runtime_imports(node: ast.AST) -> set[str]:
    """Dotted names below stage_rl that a file imports, wherever; those only for types left out.

    A relative import is refused: its name does not tell the floor.
    """
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return set()
    names = set()
    if isinstance(node, ast.Import):
        names = {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
        assert not node.level, f"line {node.lineno}: write the import from stage_rl on"
        names = {f"{node.module}.{alias.name}" for alias in node.names}
    below = {name.removeprefix("stage_rl.") for name in names if name.startswith("stage_rl.")}
    return below.union(*(runtime_imports(child) for child in ast.iter_child_nodes(node)))


def all_imports() -> list[tuple[str, str]]:
    files = [file for file in ROOT.rglob("*.py") if file != ROOT / "__init__.py"]
    modules = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    return [
        (module, name)
        for file, module in modules.items()
        for name in runtime_imports(ast.parse(file.read_text(encoding="utf-8")))
    ]


def test_a_relative_import_does_not_escape():
    with pytest.raises(AssertionError, match="write the import from stage_rl on"):
        runtime_imports(ast.parse("def f():\n    from ..training import loop"))


def test_no_import_points_up():
    imports = all_imports()
    assert len(imports) > 10
    assert [pair for pair in imports if floor(pair[1]) > floor(pair[0])] == []


def test_rewards_know_neither_rollout_nor_policies():
    bad = ("rollout", "policies")
    assert [p for p in all_imports() if p[0].startswith("rewards") and p[1].startswith(bad)] == []


def test_a_module_has_at_most_300_lines():
    sizes = {str(f): len(f.read_text(encoding="utf-8").splitlines()) for f in ROOT.rglob("*.py")}
    assert [file for file, lines in sizes.items() if lines > 300] == []
