"""The suite can fail: each patch in tests/mutants/ plants one bug in a copy of the package, and its test must fail.

A patch begins with two lines, `bug:` what it plants, and `test:` which test must notice.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MUTANTS = sorted((ROOT / "tests" / "mutants").glob("*.patch"))
TESTS_FAILED, PASSED = 1, 0  # pytest's exit codes; 2 and above: the tests did not run

# whalepy may be installed as an editable package: the copy must come first, in worker processes too.
ORIGIN = """
import os
from pathlib import Path

import pytest

import whalepy

COPY = Path(__file__).parent
if COPY not in Path(whalepy.__file__).parents or os.environ.get("PYTHONPATH") != str(COPY):
    pytest.exit(f"whalepy is imported from {whalepy.__file__}", returncode=9)
"""
CONTROL = """
from pathlib import Path


def origin():
    import whalepy

    return whalepy.__file__


def test_workers_import_the_copy(workers):
    expected = str(Path(__file__).parents[1] / "whalepy" / "__init__.py")
    assert workers.run(2, origin) == [expected, expected]
"""


def copied(directory: Path) -> Path:
    """The package and its tests, to be changed."""
    for name in ("whalepy", "tests"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__", "mutants"))
    shutil.copy(ROOT / "pyproject.toml", directory)
    (directory / "conftest.py").write_text(ORIGIN)
    return directory


def run_in(directory: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """pytest on the copy, up to the first failure."""
    environment = {**os.environ, "PYTHONPATH": str(directory), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=line", "-p", "no:cacheprovider", *tests]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def header(patch: Path) -> dict[str, str]:
    """What the first lines of a patch say."""
    return dict(line.split(": ", 1) for line in patch.read_text().splitlines()[:2])  # pyright: ignore[reportReturnType]


@pytest.mark.slow
def test_the_copy_is_what_runs(tmp_path: Path) -> None:
    """The control: without a patch the tests pass, and main process and workers import the copy."""
    directory = copied(tmp_path)
    (directory / "tests" / "test_origin.py").write_text(CONTROL)
    tests = ("tests/test_origin.py", "tests/planner/test_shares.py::test_cases", "tests/rewrite/test_kernels.py")
    done = run_in(directory, *tests)
    assert done.returncode == PASSED, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("patch", MUTANTS, ids=lambda patch: patch.stem)
def test_the_planted_bug_is_noticed(tmp_path: Path, patch: Path) -> None:
    directory = copied(tmp_path)
    subprocess.run(["git", "apply", "-C1", "--unsafe-paths", str(patch)], cwd=directory, check=True)
    done = run_in(directory, header(patch)["test"])
    assert done.returncode == TESTS_FAILED, done.stdout + done.stderr


def test_there_are_twenty_bugs_and_each_names_its_test() -> None:
    assert len(MUTANTS) >= 20
    for patch in MUTANTS:
        told = header(patch)
        assert set(told) == {"bug", "test"}, patch.name
        file, _, name = told["test"].partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / file).read_text(), patch.name
