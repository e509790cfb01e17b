"""What is kept of a measurement, for whom, and that nothing broken is believed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.pool import Pool
from whalepy.hardware.measured import Measured, Point
from whalepy.runtime import measured_cache
from whalepy.runtime.agreement import gather_objects
from whalepy.runtime.groups import start_process_group

CPU = torch.device("cpu")
FIRST = Measured({"float32": (Point(1e6, 1e-3),)}, {"add": (Point(1e3, 1e-6),)}, launch_s=1e-6)
SECOND = Measured({"float32": (Point(1e6, 2e-3),)})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a device that gives FIRST, then SECOND."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    results = iter([FIRST, SECOND])
    monkeypatch.setattr(measured_cache, "measure_device", lambda device, quick: next(results))
    return tmp_path


def file_in(cache: Path) -> Path:
    (found,) = cache.rglob("*.json")
    return found


def test_the_second_time_is_read(cache: Path) -> None:
    assert measured_cache.measured_here(CPU) == FIRST
    assert measured_cache.measured_here(CPU) == FIRST
    assert [path.suffix for path in cache.rglob("*.*")] == [".json"]  # nothing half-written is left


BROKEN = [
    b"",
    b"{",
    b"[]",
    b"\xff",
    b'{"key": {}, "measured": {"products": {}}}',  # of another machine
]


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_file_is_measured_anew(cache: Path, content: bytes) -> None:
    measured_cache.measured_here(CPU)
    file_in(cache).write_bytes(content)
    assert measured_cache.measured_here(CPU) == SECOND
    assert measured_cache.measured_here(CPU) == SECOND  # and put there


@pytest.mark.parametrize("seconds", ["0.0", "-1.0", "1e300", '"NaN"'])
def test_a_figure_that_cannot_be_is_measured_anew(cache: Path, seconds: str) -> None:
    measured_cache.measured_here(CPU)
    path = file_in(cache)
    path.write_text(path.read_text().replace('"seconds": 0.001', f'"seconds": {seconds}'))
    assert measured_cache.measured_here(CPU) == SECOND


@pytest.mark.parametrize("age_s", [measured_cache.KEPT_S + 60, -3600.0])  # too old; of the future
def test_an_old_file_is_measured_anew(cache: Path, age_s: float) -> None:
    measured_cache.measured_here(CPU)
    then = time.time() - age_s
    os.utime(file_in(cache), (then, then))
    assert measured_cache.measured_here(CPU) == SECOND


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2")])
def test_each_place_on_a_host_has_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    measured_cache.measured_here(CPU)
    monkeypatch.setenv(name, value)
    assert measured_cache.measured_here(CPU) == SECOND


def test_without_a_folder_to_write_it_is_measured_every_time(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    assert [measured_cache.measured_here(CPU), measured_cache.measured_here(CPU)] == [FIRST, SECOND]


def speeds_of_two_compilations(folder: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    import whalepy

    os.environ["XDG_CACHE_HOME"] = folder
    torch.set_num_threads(1)
    found: list[tuple[float, ...]] = []
    for _ in range(2):
        model = whalepy.annotate(torch.nn.Linear(4, 4), {"": whalepy.replicate(2)})
        parallel = whalepy.compile(model, None, (torch.ones(8, 4),), loss_fn=lambda out: out.sum())
        found.append(parallel.plan.speeds)
    return found[0], found[1]


def test_compile_without_a_cluster_measures_each_rank_once(workers: Pool, tmp_path: Path) -> None:
    (first, again), (other, _) = workers.run(2, speeds_of_two_compilations, str(tmp_path))
    assert first == again == other
    assert max(first) == 1.0
    assert len(list(tmp_path.rglob("*.json"))) == 4  # each rank's own figures, and its speed beside the other


def speeds_with_one_file_gone(folders: list[str], broken: str) -> list[float]:
    folder = os.environ["XDG_CACHE_HOME"] = folders[dist.get_rank()]
    results = iter([1e9, 2e9, 3e9])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measured_cache, "speed_together", lambda device, host: next(results))
        host = start_process_group(CPU)
        found = [measured_cache.speed_here(CPU, host), measured_cache.speed_here(CPU, host)]
        if host.position == 0:
            file_in(Path(folder)).write_text(broken)
        gather_objects(host, None)
        found.append(measured_cache.speed_here(CPU, host))
    return found


@pytest.mark.parametrize("broken", ["", '{"key": {}, "measured": 1.0}'])
def test_the_speed_beside_others_is_kept_unless_one_rank_has_none(workers: Pool, tmp_path: Path, broken: str) -> None:
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]  # as of two hosts
    found = workers.run(2, speeds_with_one_file_gone, folders, broken)
    assert found == [[1e9, 1e9, 2e9]] * 2
