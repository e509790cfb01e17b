"""Programs for tests, built in this process for any number of devices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

from torch import Tensor, nn

import whalepy
from tests import models
from whalepy.planner.decide import Orders
from whalepy.program.analysis import Program
from whalepy.rewrite.exchanges import Exchange, collect
from whalepy.rewrite.printing import program_text as text_of
from whalepy.runtime.arguments import as_arguments, leaf_shapes
from whalepy.runtime.build import Analysed, Recipe, analysed, built, captured_program
from whalepy.runtime.programs import Ranks, example_sizes


def program_of(model: nn.Module, example: Any, scopes: Mapping[str, Any] | None = None) -> Program:
    """The analysed training program of a model, annotated first."""
    whalepy.annotate(model, scopes or {})
    arguments = as_arguments(example)
    captured = captured_program(Recipe(model), *arguments, training=True, wants="loss")
    return analysed(captured, leaf_shapes(arguments))


def built_for(
    model: nn.Module,
    example: Any,
    scopes: Mapping[str, Any] | None = None,
    speeds: Sequence[float] = (1.0, 1.0),
    microbatches: int = 1,
    orders: Orders | None = None,
) -> Analysed:
    """The rewritten training program for devices of these speeds; `orders` instead of a search for them."""
    return built(program_of(model, example, scopes), speeds, orders, microbatches=microbatches)[0]


def exchanges_of(made: Analysed) -> dict[int, tuple[Exchange, ...]]:
    """What each rank issues in one step."""
    mesh = made.decisions.mesh
    return collect(made.rewritten, made.program, mesh, range(prod(mesh)), example_sizes(made.program, made.decisions))


def text_for(made: Analysed, rank: int) -> str:
    """The program of a rank as text."""
    ranks = Ranks(made.chains, tuple(range(prod(made.decisions.mesh))))
    sizes = example_sizes(made.program, made.decisions)
    return text_of(made.rewritten, made.program, made.decisions, ranks, rank, sizes)


class ResidualWithLoss(nn.Module):
    """Convolutions and an MLP, cut by channels where asked."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = models.Residual()

    def forward(self, image: Tensor, side: Tensor, target: Tensor) -> Tensor:
        return models.classes_loss(self.inner(image, side), target)


CASES: dict[str, tuple[Callable[[], models.Made], Callable[[], dict[str, Any]], tuple[float, ...]]] = {
    "gpt2, rows": (lambda: models.gpt2(layers=1), lambda: {"": whalepy.replicate(3)}, (1, 1, 0.5)),
    "gpt2, everything": (lambda: models.gpt2(layers=1), lambda: {"": whalepy.split(2, shares=[3, 1])}, (1, 1)),
    "gpt2, rows and blocks": (
        lambda: models.gpt2(layers=2),
        lambda: {"": whalepy.replicate(2), "transformer.h.*": whalepy.split(2, shares=[3, 1])},
        (1, 1, 0.5, 0.5),
    ),
    "bert, siblings": (
        lambda: models.bert(layers=1),
        lambda: {"bert": whalepy.replicate(3), "cls": whalepy.split(3, shares=[5, 2, 1])},
        (1, 1, 1),
    ),
    "channels": (lambda: (ResidualWithLoss(), models.residual()[1]), lambda: {"": whalepy.split(3)}, (1, 1, 1)),
}
"""Model, scopes, speeds."""


@cache
def made_case(name: str) -> Analysed:
    """One of the cases, rewritten."""
    make, scopes, speeds = CASES[name]
    model, batches = make()
    return built_for(model, batches[0], scopes(), speeds)
