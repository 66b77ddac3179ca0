"""What is installed, cited and packed: one version, one list of dependencies, no file forgotten."""

from __future__ import annotations

import fnmatch
import subprocess
import sys
import tomllib

import pytest
import yaml

import cryo_svae
from tests.conftest import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
IN_CONDA = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def wanted() -> set[str]:
    """What the program needs, in conda's words."""
    found = set()
    for text in ["python" + PROJECT["project"]["requires-python"], *PROJECT["project"]["dependencies"]]:
        name, bounds = text.split(">=")
        found.add(f"{IN_CONDA.get(name, name)} >={bounds}")
    return found


def test_the_conda_recipe_and_environment_need_what_the_package_needs():
    recipe = yaml.safe_load((REPOSITORY / "packaging" / "conda" / "recipe.yaml").read_text())
    assert set(recipe["requirements"]["run"]) == wanted()
    environment = yaml.safe_load((REPOSITORY / "environment.yml").read_text())["dependencies"]
    assert {line for line in environment if isinstance(line, str) and line != "pip"} == wanted()


def test_every_file_of_the_package_is_packed():
    package = REPOSITORY / "cryo_svae"
    packed = PROJECT["tool"]["setuptools"]["package-data"]
    for path in package.rglob("*"):
        if path.is_dir() or path.suffix in (".py", ".pyc"):
            continue
        wing = ".".join(path.parent.relative_to(REPOSITORY).parts)
        assert any(fnmatch.fnmatch(path.name, form) for form in packed.get(wing, [])), path
    for folder in {path.parent for path in package.rglob("*.py")}:
        assert (folder / "__init__.py").is_file(), folder


def test_the_version_stands_in_one_place():
    text = f'"{cryo_svae.__version__}"'
    holders = [
        path
        for pattern in ("cryo_svae/**/*.py", "pyproject.toml", "CITATION.cff", "packaging/**/*.*")
        for path in REPOSITORY.glob(pattern)
        if text in path.read_text() or f": {cryo_svae.__version__}\n" in path.read_text()
    ]
    assert holders == [REPOSITORY / "cryo_svae" / "__init__.py"]


REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_ran"/>
<testcase classname="tests.a" name="test_gpu"><skipped message="no CUDA device"/></testcase>{more}
</testsuite></testsuites>"""
UNLISTED = '<testcase classname="tests.b" name="test_seen"><skipped message="no Chromium (…)"/></testcase>'


@pytest.mark.parametrize(("more", "code"), [("", 0), (UNLISTED, 1)])
def test_a_skipped_test_without_an_allowed_reason_fails_the_ci(tmp_path, more, code):
    (tmp_path / "tests.xml").write_text(REPORT.format(more=more))
    (tmp_path / "allowed.txt").write_text("# reasons\nno CUDA device   # of GPUs\n")
    command = [sys.executable, REPOSITORY / ".ci" / "skips.py", "tests.xml", "allowed.txt"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert ("tests.b::test_seen was skipped: no Chromium" in done.stdout) == bool(code)
