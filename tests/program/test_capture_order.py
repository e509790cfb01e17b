"""Graphs of one model are equal, in whatever order its independent operators ran."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from whalepy.runtime.arguments import leaf_shapes
from whalepy.runtime.build import Recipe, analysed, captured_program, fingerprint


class Unordered(nn.Module):
    """Runs its branches in an order that is given, and adds them up in one that is not."""

    def __init__(self, order: tuple[str, ...]) -> None:
        super().__init__()
        self.order = order
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        results = {name: getattr(self, name)(x * torch.tensor([1.0 + len(name)])) for name in self.order}
        self.steps += 1
        return (results["first"].relu() - results["second"]).square().mean()


def lines(order: tuple[str, ...]) -> tuple[str, ...]:
    example = (torch.randn(6, 4),)
    captured = captured_program(Recipe(Unordered(order)), example, {}, training=True, wants="loss")
    return fingerprint(analysed(captured, leaf_shapes((example, {}))))


def test_the_order_of_independent_operators_does_not_matter() -> None:
    assert lines(("first", "second")) == lines(("second", "first"))


def test_placeholders_are_named_as_in_the_graph() -> None:
    example = (torch.randn(6, 4),)
    captured = captured_program(Recipe(Unordered(("second", "first"))), example, {}, training=True, wants="loss")
    nodes = captured.graph.graph.find_nodes(op="placeholder")
    assert [node.name for node in nodes] == [place.node for place in captured.placeholders]
    kinds = [place.kind for place in captured.placeholders]
    assert kinds == [*["parameter"] * 4, "buffer", "input", *["constant"] * kinds.count("constant")]
    assert kinds.count("constant") == 2


@pytest.mark.parametrize("order", [("first", "second"), ("second", "first")])
def test_the_reordered_graph_computes_the_same(order: tuple[str, ...]) -> None:
    model, x = Unordered(order), torch.randn(6, 4)
    captured = captured_program(Recipe(model), (x,), {}, training=True, wants="loss")
    given = [x if place.kind == "input" else place.value.detach().clone() for place in captured.placeholders]  # type: ignore[union-attr]
    loss, steps = captured.graph(*given)
    torch.testing.assert_close(loss, model(x))
    assert float(steps) == 1.0
