"""The exactness tests can fail: each fault that the types exist to prevent is injected, and must be reported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest

import whalepy
from tests import models
from tests.exactness import Run, differences
from tests.pool import Pool
from whalepy.runtime import bridge


@contextlib.contextmanager
def gradient_of(kind: str, taken_as: str) -> Iterator[None]:
    """Values of type `kind` hand back a gradient of another kind than they have."""
    with mock.patch.dict(bridge._GRADIENT, {kind: taken_as}):  # type: ignore[dict-item]
        yield


@contextlib.contextmanager
def replicated_use_left_as_it_is() -> Iterator[None]:
    """Where some uses of a parameter give a partial gradient, a use that gives a replicated one is not converted."""
    from whalepy.rewrite import rewrite as rewriting

    original = rewriting.moves

    def moves(program: Any, key: Any, source: Any, target: Any) -> Any:
        if program.operators[key[0]].kind == "parameter":
            target = tuple(
                "B" if now == "B" and want == "R" else want for now, want in zip(source, target, strict=True)
            )
        return original(program, key, source, target)

    with mock.patch.object(rewriting, "moves", moves):
        yield


def split_blocks() -> dict[str, Any]:
    return {"transformer.h.*": whalepy.split(2, shares=(3, 1))}


def replicated() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=(3, 1))}


def split_mlp() -> dict[str, Any]:
    return {"mlp": whalepy.split(2, shares=(3, 1))}


CONTROLS = {
    "B's gradient taken as replicated, split": (models.gpt2, split_blocks, lambda: gradient_of("B", "R")),
    "B's gradient taken as replicated, replicate": (models.gpt2, replicated, lambda: gradient_of("B", "R")),
    "P's gradient taken as partial": (models.gpt2, split_blocks, lambda: gradient_of("P", "P")),
    "an R use of a B parameter left as it is": (models.scaled_twice, split_mlp, replicated_use_left_as_it_is),
}


@pytest.mark.parametrize(("make", "annotations", "inject"), CONTROLS.values(), ids=CONTROLS)
def test_the_fault_is_reported(workers: Pool, make: Any, annotations: Any, inject: Any) -> None:
    run = Run(make, annotations, world=2, steps=1, inject=inject)
    found = differences(workers, run)
    assert any("gradient of" in text for text in found), found


def test_without_a_fault_nothing_is_reported(workers: Pool) -> None:
    """For the placements of GPT-2 the exactness tests say so."""
    assert differences(workers, Run(models.scaled_twice, split_mlp, world=2, steps=1)) == []
