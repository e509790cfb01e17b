"""How many collectives one transformer block costs under split, read off the rewritten program."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx

import whalepy
from tests import models
from whalepy.program.layout import communicates, gradient_kind
from whalepy.rewrite.rewrite import Rewritten
from whalepy.runtime.arguments import as_arguments, leaf_shapes
from whalepy.runtime.build import Recipe, analysed, built, captured_program

# Attention and MLP in turn: each ends in a sum over ranks and begins with one of gradients. GPT-J has them side by
# side on one residual: their sums wait for each other, and so do their gradients. Its biases must not add any.
# For Llama the solver cuts the residual too (an all-gather and a reduce-scatter for each all-reduce), so that heads and
# hidden units are asked for.
LLAMA = ("model.layers.*.mlp.gate_proj.weight:0", "model.layers.*.self_attn.q_proj.weight:0")
BLOCKS = {
    "gpt2": (models.gpt2, "transformer.h.*", None, (2, 2)),
    "llama": (models.llama, "model.layers.*", LLAMA, (2, 2)),
    "gptj": (models.gptj, "transformer.h.*", None, (1, 1)),
}


def program_under_split(make: Any, pattern: str, classes: Any, shares: tuple[int, ...], layers: int) -> Rewritten:
    model, batches = make(layers=layers)
    whalepy.annotate(model, {pattern: whalepy.split(len(shares), shares=shares)})
    example = as_arguments(batches[0])
    captured = captured_program(Recipe(model), *example, training=True, wants="loss")
    program = analysed(captured, leaf_shapes(example))
    made, _ = built(program, (1.0,) * len(shares), classes and {(0, 0): classes})
    return made.rewritten


def carry_gradient(program: Rewritten) -> set[fx.Node]:
    """Values between a parameter and the loss."""
    found: set[fx.Node] = set()
    for node in program.graph.graph.nodes:
        is_float = isinstance(val := node.meta.get("val"), torch.Tensor) and val.is_floating_point()
        is_parameter = node.op == "placeholder" and is_float and val.requires_grad
        if is_parameter or (is_float and not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def collectives(program: Rewritten) -> tuple[list[str], list[str]]:
    """Bridges that communicate: in the forward, and in the backward, where a gradient goes the way back."""
    forward: list[str] = []
    backward: list[str] = []
    carrying = carry_gradient(program)
    for node in program.graph.graph.nodes:
        move = node.meta.get("move")
        if move is None:
            continue
        if communicates(move.source, move.target):
            forward.append(f"{move.source}->{move.target}")
        if node in carrying and communicates(gradient_kind(move.target), gradient_kind(move.source)):
            backward.append(f"{move.source}->{move.target}")
    return forward, backward


@pytest.mark.parametrize(("make", "pattern", "classes", "expected"), BLOCKS.values(), ids=BLOCKS)
def test_one_block_has_the_fewest_collectives(make: Any, pattern: str, classes: Any, expected: tuple[int, int]) -> None:
    one, two = (collectives(program_under_split(make, pattern, classes, (3, 1), layers)) for layers in (1, 2))
    forward, backward = (Counter(after) - Counter(before) for before, after in zip(one, two, strict=True))
    assert forward == {"P->R": expected[0]}, two
    assert backward == {"R->B": expected[1]}, two
