import json

import pytest

from benchmarks.fidelity import errors, rank_correlation
from benchmarks.published.rows import TABLES, Row, cluster_of, config_of, shapes, table
from whalepy.dryrun.targets import bundled
from whalepy.hardware.cluster import ClusterSpec

ROWS = [row for name in TABLES for row in table(name)]


def test_names_are_unique() -> None:
    for name in TABLES:
        names = [row.row for row in table(name)]
        assert len(set(names)) == len(names), name


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.row)
def test_a_row_states_a_configuration(row: Row) -> None:
    assert row.source and row.framework
    assert row.published is not None or row.memory_gib is not None or row.outcome in ("ran", "oom")
    assert (row.memory_gib is None) == (row.memory_kind == "")
    if row.left:
        return
    assert row.replicate * row.split * row.stages == row.devices
    assert row.batch % (row.replicate * row.microbatches) == 0
    assert row.published is None or row.outcome == "ran"
    spec = ClusterSpec.load(cluster_of(row))
    assert len(spec.devices) == row.devices
    config = config_of(shapes()[row.model], row.tokens)
    assert row.model in bundled() if config is None else json.dumps(config)


def test_units() -> None:
    row = next(row for row in ROWS if row.unit == "tokens/s/GPU")
    assert row.published is not None
    step_s = row.step_s(row.published)
    assert row.in_unit(step_s) == pytest.approx(row.published)
    assert step_s == pytest.approx(row.batch * (row.tokens or 0) / row.devices / row.published)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((1, 2, 3), (10, 20, 30), 1.0),
        ((1, 2, 3), (3, 2, 1), -1.0),
        ((1, 1, 2, 3), (5, 5, 6, 7), 1.0),  # ties share a rank
        ((1, 2, 3, 4), (1, 3, 2, 4), 0.8),
    ],
)
def test_rank_correlation(first: tuple[float, ...], second: tuple[float, ...], expected: float) -> None:
    assert rank_correlation(first, second) == pytest.approx(expected)


def test_errors_of_ratios() -> None:
    assert errors([1.1, 0.8, None]) == {"rows": 2, "mean": 0.15, "worst": 0.2, "median_ratio": 0.95}
    assert errors([None]) == {"rows": 0}
