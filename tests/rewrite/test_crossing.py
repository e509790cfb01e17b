"""What crosses between stages that are split: in parts, so that every element is sent once each way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

import whalepy
from tests import pipelines
from tests.models import Made
from tests.pipelines import blocks, staged
from whalepy.dryrun.pipeline import PipelineCandidate
from whalepy.dryrun.staged import Staged, tried_in_stages
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options
from whalepy.hardware.cluster import ClusterSpec
from whalepy.program.layout import Sharded, Type
from whalepy.rewrite.naming import MOVES
from whalepy.runtime.build import Recipe


def candidate(make: Callable[[], Made], annotations: Mapping[str, Any], world: int) -> PipelineCandidate:
    """A pipeline on CPUs in one microbatch, planned."""
    model, batches = make()
    whalepy.annotate(model, annotations)
    study = Study.of(Recipe(model), batches[0], "adamw")
    tried = tried_in_stages(study, ClusterSpec.load(f"{world}xcpu"), Options(microbatches=1), Staged())
    assert isinstance(tried.candidate, PipelineCandidate)
    return tried.candidate


def gpt2(*widths: int) -> dict[str, Any]:
    """A stage of so many devices, which split it, per block."""
    groups = blocks("transformer.h.*", range(len(widths) + 1))
    return staged(groups, lambda k: [whalepy.stage(widths[k]), whalepy.split(widths[k])])


@dataclass(frozen=True)
class Once:
    """A pipeline, and the bytes of all values that cross in a step, forward and backward."""

    make: Callable[[], Made]
    annotations: Callable[[], dict[str, Any]]
    world: int
    forward: int
    backward: int


STATES = 8 * 12 * 32 * 4
"""Bytes of what one block of GPT-2 hands to the next: rows, length, width, float32."""

ONCE = {
    "2 feed 2": Once(pipelines.feeding, lambda: pipelines.fed((1, 1), (1, 1)), 4, 8 * 66 * 4, 8 * 66 * 4),
    "3 feed 2, unequal": Once(pipelines.feeding, lambda: pipelines.fed((2, 1, 1), (3, 1)), 5, 8 * 66 * 4, 8 * 66 * 4),
    "gpt2, 1 feeds 2 feeds 4 feeds 1": Once(pipelines.gpt2, lambda: gpt2(1, 2, 4, 1), 8, 3 * STATES, 3 * STATES),
}


@pytest.mark.parametrize("case", ONCE.values(), ids=ONCE)
def test_every_element_crosses_once(case: Once) -> None:
    found = candidate(case.make, case.annotations(), case.world)
    sent = {"SEND_F": 0, "SEND_B": 0}
    for own in found.schedule:
        for action in own:
            if action.op in sent:
                sent[action.op] += sum(found.messages(action).values())
    assert sent == {"SEND_F": case.forward, "SEND_B": case.backward}


def letters(kind: Type) -> str:
    return "S" if isinstance(kind, Sharded) else kind


def bridges(found: PipelineCandidate, stage: int) -> list[str]:
    """The conversions of values in a stage's program, in order."""
    nodes = found.pipeline.stages[stage].rewritten.graph.graph.nodes
    moves = [node.meta["move"] for node in nodes if node.target in MOVES and node.args[0].op != "placeholder"]
    return [f"{letters(move.source)}->{letters(move.target)}" for move in moves]


def arrivals(found: PipelineCandidate, stage: int) -> list[str]:
    """What is done first to what comes from another stage."""
    made = found.pipeline.stages[stage]
    places = {op.name for op in made.program.operators if op.kind == "received"}
    nodes = [node for node in made.rewritten.graph.graph.nodes if node.target in MOVES]
    moves = [node.meta["move"] for node in nodes if node.args[0].name in places]
    return [f"{letters(move.source)}->{letters(move.target)}" for move in moves]


def test_partial_sums_are_scattered_where_they_leave() -> None:
    found = candidate(pipelines.feeding, pipelines.fed((1, 1), (1, 1)), 4)
    assert bridges(found, 0)[-1] == "P->S"  # no all-reduce before


def test_gradients_of_what_arrives_are_summed_into_the_parts_that_go_back() -> None:
    """All readers compute with shards of a weight: read as B, whose gradient is reduced and scattered at once."""
    found = candidate(pipelines.feeding, pipelines.fed((1, 1), (1, 1)), 4)
    assert arrivals(found, 1) == ["S->B"]


def test_shards_arrive_as_they_are_read() -> None:
    found = candidate(pipelines.feeding, pipelines.fed((1, 1), (3, 1), on="second.0.weight:1"), 4)
    assert arrivals(found, 1) == []


def test_what_several_read_is_gathered_once() -> None:
    """Of GPT-2's block both the norm and the residual sum read what arrives."""
    found = candidate(pipelines.gpt2, gpt2(1, 2, 4, 1), 8)
    assert [arrivals(found, k) for k in range(4)] == [[], ["S->R"], ["S->R"], []]
