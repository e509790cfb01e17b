"""Random pairs of a model and a cluster: a few hundred of them, and that the checks find what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from benchmarks import drawn, verified
from benchmarks.random_pairs import one
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.form import Limits
from whalepy.planner.search import Choice, Search
from whalepy.planner.stage_cost import StageCosts

LIMITS = Limits(filled=0.84)


@pytest.mark.parametrize(("kind", "first"), [("search", 0), ("search", 150), ("layers", 0), ("layers", 30)])
def test_pairs_have_a_plan_or_a_reason(tmp_path: Path, kind: str, first: int) -> None:
    results = [one(kind, first + k, 20, tmp_path) for k in range(150 if kind == "search" else 30)]
    assert [fault for result in results for fault in result.faults] == []
    assert len({result.outcome for result in results}) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_models_have_a_plan_or_a_reason(tmp_path: Path, number: int) -> None:
    assert one("models", number, 20, tmp_path).faults == ()


def found() -> tuple[Choice, drawn.Blocks, ClusterSpec]:
    """A choice with several stages."""
    for seed in range(100):
        draw = Random(seed)
        spec = ClusterSpec.load(drawn.cluster(draw, 4))
        table = drawn.blocks(draw, spec)
        for choice in Search(StageCosts(table, spec), LIMITS).found():
            if len(choice.sizes) > 1 and choice.copies > 1:
                return choice, table, spec
    raise AssertionError("none of a hundred has stages and copies")


def wrong(choice: Choice) -> dict[str, Choice]:
    """The same with one thing wrong each."""
    first, *rest = choice.sizes
    return {
        "are used twice": replace(choice, groups=(choice.groups[0],) * len(choice.groups)),
        "stages of": replace(choice, sizes=(first + 1, *rest)),
        "copies have rows": replace(choice, rows=(choice.rows[0] + 1, *choice.rows[1:])),
        "microbatches of rows": replace(choice, microbatches=min(choice.rows) + 1),
        "may be in use": replace(choice, filled=0.9),
        "all products alone": replace(choice, step_s=1e-12),
    }


def test_a_wrong_choice_is_noticed() -> None:
    choice, table, spec = found()
    assert list(verified.of_choices([choice], table, spec, LIMITS)) == []
    for fault, other in wrong(choice).items():
        assert any(fault in said for said in verified.of_choices([other], table, spec, LIMITS)), fault


def test_a_choice_beyond_its_memory_is_noticed() -> None:
    choice, table, spec = found()
    full = ClusterSpec.load(_with_memory(spec.to_dict(), choice.filled * 0.5))
    assert any("has room for" in said for said in verified.of_choices([choice], table, full, LIMITS))


def _with_memory(cluster: dict[str, Any], part: float) -> dict[str, Any]:
    spec = ClusterSpec.load(cluster)
    sizes = iter(device.memory_bytes for node in spec.nodes for device in node.devices)
    nodes = [
        {**node, "count": 1, "devices": [
            {**entry, "count": 1, "memory_bytes": int(next(sizes) * part)}
            for entry in node["devices"] for _ in range(entry["count"])]}
        for node in cluster["nodes"] for _ in range(node["count"])
    ]  # fmt: skip
    return {**cluster, "nodes": nodes}
