"""Programs cut into stages: which stage comes first, and where operators outside every stage belong."""

from __future__ import annotations

from typing import Any

from torch import nn

import whalepy
from tests import pipelines
from whalepy.primitives import Primitive
from whalepy.program.analysis import Program
from whalepy.program.taskgraphs import stages_in, taskgraphs
from whalepy.runtime.arguments import leaf_shapes
from whalepy.runtime.build import Recipe, analysed, captured_program


def program_of(model: nn.Module, batch: Any, scopes: dict[str, Any]) -> Program:
    captured = captured_program(Recipe(whalepy.annotate(model, scopes)), batch, {}, training=True, wants="loss")
    return analysed(captured, leaf_shapes((batch, {})))


def parameters_of(program: Program, stages: tuple[Primitive, ...]) -> list[list[str]]:
    """What each stage reads."""
    graphs = taskgraphs(program, stages, lambda scope: scope).stages
    return [[p.name for p in graph.program.captured.placeholders if p.kind == "parameter"] for graph in graphs]


def test_a_stage_follows_those_that_it_reads_whichever_is_entered_first() -> None:
    model, (batch,) = pipelines.towers()
    scopes = pipelines.towers_from_behind()
    program = program_of(model, batch, scopes)
    stages = stages_in(program)
    assert stages == (scopes["read"], scopes["seen"])
    read, seen = parameters_of(program, stages)
    assert read == ["words.weight", "read.weight", "read.bias"]  # the embedding runs outside, after the other stage
    assert seen == ["seen.weight", "seen.bias", "both.weight", "both.bias"]


def test_stages_that_read_nothing_of_each_other_stand_as_they_are_entered() -> None:
    model, (batch,) = pipelines.towers()
    scopes = pipelines.staged([["read"], ["seen"]])
    assert stages_in(program_of(model, batch, scopes)) == (scopes["seen"], scopes["read"])
