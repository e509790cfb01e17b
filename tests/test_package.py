"""The package as a user installs it: importing it is cheap, its names are there, the wheel holds its data."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import whalepy

ROOT = Path(__file__).parent.parent
PRIMITIVES = ("replicate", "split", "stage", "cluster", "annotate")
NAMES = (*PRIMITIVES, "compile", "plan", "ParallelModel", "Plan", "ClusterSpec", "WhaleError")


@pytest.mark.parametrize("name", NAMES)
def test_public_names(name: str) -> None:
    assert getattr(whalepy, name).__name__ == name
    assert name in dir(whalepy)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match=r"^module 'whalepy' has no attribute 'paralell'$"):
        whalepy.paralell  # noqa: B018


def test_importing_whalepy_imports_no_torch() -> None:
    code = "import sys, whalepy; print('torch' in sys.modules, 'whalepy.api' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert shown.stdout == "False False\n"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy: a build folder left in the repository would end up in the next wheel."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True)
    for name in files.stdout.decode().splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    subprocess.run(pip, check=True, capture_output=True)
    return zipfile.ZipFile(next(out.glob("whalepy-*.whl")))


@pytest.mark.slow
def test_the_wheel(wheel: zipfile.ZipFile) -> None:
    """Every module and data file of the package, the licence, and nothing else."""
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "whalepy").rglob("*") if p.is_file()}
    expected = {name for name in package if "__pycache__" not in name}
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert "whalepy/hardware/devices.csv" in held
    info = f"whalepy-{whalepy_version(wheel)}.dist-info"
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "whalepy = whalepy.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def whalepy_version(wheel: zipfile.ZipFile) -> str:
    return Path(str(wheel.filename)).name.split("-")[1]
