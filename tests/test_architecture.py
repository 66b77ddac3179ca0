"""Imports point one way through the house; angles and lengths cross in geometry alone."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "cryo_svae"

# Each wing, or module beside them, may import those before it in this list, and its own kind.
ORDER = [
    "errors",
    "config",
    "computing",
    "imaging",
    "formats",
    "simulate",
    "particles",
    "models",
    "learning",
    "results",
    "report",
    "jobs",
    "api",
    "cli",
    "relion_job",
    "__main__",
]
RANK = {name: rank for rank, name in enumerate(ORDER)}
# The engine's search is written in a module of its own, and names the engine for its types alone.
FOR_TYPES_ALONE = {("models.posterior_search", "models.steerable")}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_along_the_arrows(path):
    mine = part(path)
    if mine == "__init__":
        return
    theirs = {name.split(".")[1] for name in imports(path) if name.startswith("cryo_svae.")} & RANK.keys()
    assert mine in RANK, f"{mine} has no place in ORDER"
    assert {name for name in theirs if RANK[name] > RANK[mine]} == set()


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def test_no_circle_of_modules():
    names = {name_of(path) for path in modules()}
    arrows = {}
    for path in modules():
        mine = name_of(path)
        if mine == "__init__":
            continue
        theirs = {name.removeprefix("cryo_svae.") for name in imports(path)} & names
        arrows[mine] = {other for other in theirs - {part(path)} if (mine, other) not in FOR_TYPES_ALONE}
    TopologicalSorter(arrows).prepare()  # raises CycleError


def test_the_tests_stand_in_the_same_wings():
    wings = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert wings == {path.parent.name for path in Path(__file__).parent.glob("*/__init__.py")}


def test_formats_know_no_torch():
    for path in (PACKAGE / "formats").rglob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] == "torch"}, path


def test_degrees_and_radians_cross_in_geometry_alone():
    crossing = re.compile(r"deg2rad|rad2deg|math\.radians|math\.degrees|/ ?180|180\.0? ?/")
    for path in modules():
        if path.name != "geometry.py":
            assert not crossing.search(path.read_text()), path


def test_models_touch_no_files_and_print_nothing():
    for path in (PACKAGE / "models").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"\bprint\(|\bopen\(|pathlib", text), path


def test_no_unsafe_loading_and_no_eval():
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in {"eval", "exec", "pickle.load", "pickle.loads", "yaml.load"}, path
                if name == "torch.load":
                    assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords)
