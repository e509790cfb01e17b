"""Bridges that are started early and finished late, and weight gradients that wait for them, on the graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whalepy
from tests import models
from tests.programs import built_for, exchanges_of
from whalepy.errors import VerificationError
from whalepy.rewrite import kernels
from whalepy.rewrite.deferring import Deferred
from whalepy.rewrite.naming import MOVES
from whalepy.rewrite.overlap import asynchronous, waits_used
from whalepy.rewrite.verify import verify
from whalepy.runtime.build import Analysed


class Towers(nn.Module):
    """What two towers make of an image and of a text, compared; one tower is done long before it is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 16), nn.Linear(16, 8))
            for _ in range(2)
        )

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        first, second = self.towers[0](image), self.towers[1](text)
        return (first * second).sum(1).square().mean()


def towers() -> models.Made:
    torch.manual_seed(0)
    return Towers(), [(torch.randn(6, 12), torch.randn(6, 12))]


def made_of(make: Any, scopes: dict[str, Any]) -> Analysed:
    model, batches = make()
    return built_for(model, batches[0], scopes)


def started(made: Analysed, *, trains: bool = False) -> Analysed:
    graph = asynchronous(made.rewritten, made.program, made.decisions.mesh, trains=trains)
    return Analysed(made.program, made.decisions, graph, made.chains)


def nodes(made: Analysed) -> list[Any]:
    return list(made.rewritten.graph.graph.nodes)


def test_a_bridge_is_under_way_while_the_other_tower_computes() -> None:
    plain = made_of(towers, {"": whalepy.split(2)})
    made = started(plain)
    made.rewritten.graph.graph.lint()
    order = nodes(made)
    (start,) = (node for node in order if node.target is kernels.start_bridge)
    (finish,) = start.users
    assert finish.target is kernels.finish_bridge and start.args[0].next is start
    products = [node for node in order[order.index(start) : order.index(finish)] if "linear" in str(node.target)]
    assert len(products) == 4
    assert finish.next in finish.users


def test_what_it_issues_is_what_the_plain_program_issues_in_another_order() -> None:
    plain = made_of(towers, {"": whalepy.split(2)})
    before, after = exchanges_of(plain), exchanges_of(started(plain))
    verify(after)
    for rank, issued in after.items():
        assert issued != before[rank]
        told = [
            sorted((e.level, e.group, e.kind, e.sends, e.receives, e.backward, e.at) for e in each)
            for each in (issued, before[rank])
        ]
        assert told[0] == told[1]


def test_ranks_that_do_not_start_alike_are_found() -> None:
    plain = made_of(towers, {"": whalepy.split(2)})
    before, after = exchanges_of(plain), exchanges_of(started(plain))
    with pytest.raises(VerificationError):
        verify({0: after[0], 1: before[1]})


def test_backward_the_gradient_sets_out_where_the_bridge_is_finished() -> None:
    made = started(made_of(towers, {"": whalepy.split(2)}))
    order = [node.name for node in nodes(made)]
    (start,) = (node for node in nodes(made) if node.target is kernels.start_bridge)
    (finish,) = start.users
    issued = exchanges_of(made)[0]
    at = {(e.position, e.backward) for e in issued}
    assert (order.index(start.name), False) in at and (order.index(start.name), True) not in at
    assert (order.index(finish.name), False) not in at and (order.index(finish.name), True) in at


def test_where_nothing_lies_between_the_graph_stays() -> None:
    made = made_of(models.gpt2, {"": whalepy.split(2)})
    assert asynchronous(made.rewritten, made.program, made.decisions.mesh) is made.rewritten
    alone = made_of(towers, {"": whalepy.split(2)})
    assert asynchronous(alone.rewritten, alone.program, (1,)) is alone.rewritten


def rows_cut() -> Analysed:
    return made_of(models.llama, {"": whalepy.replicate(2)})


def test_the_count_of_targets_sets_out_behind_the_first_product() -> None:
    plain = rows_cut()
    made = started(plain)
    made.rewritten.graph.graph.lint()
    order = nodes(made)
    calls = [node for node in order if node.op == "call_function"]
    (start,) = (node for node in calls if node.target is kernels.start_bridge)
    (finish,) = start.users
    products = [node for node in calls if "linear" in str(node.target)]
    assert calls.index(products[0]) < calls.index(start) < calls.index(products[1])
    assert calls.index(products[-1]) < calls.index(finish)
    ahead = set(calls[calls.index(products[0]) + 1 : calls.index(start)])
    assert ahead and all(not ahead.isdisjoint(node.users) or start in node.users for node in ahead)
    assert not any(n.name in {p.node for p in made.program.captured.placeholders if p.kind == "parameter"}
                   for node in ahead for n in node.all_input_nodes)  # fmt: skip
    verify(exchanges_of(made))


def test_what_comes_over_the_bridge_of_the_loss_is_left_to_who_trains() -> None:
    def first(made: Analysed) -> Any:
        return nodes(made)[-1].args[0][0].target

    plain = rows_cut()
    assert first(plain) is kernels.bridge and first(started(plain)) is kernels.bridge
    made = started(plain, trains=True)
    assert first(made) is kernels.start_bridge
    before, after = exchanges_of(plain), exchanges_of(made)
    verify(after)
    told = [[(e.kind, e.sends, e.backward) for e in each] for each in (*before.values(), *after.values())]
    assert told[:2] == told[2:]


def test_what_a_stage_gives_to_others_is_not_left() -> None:
    """The first output of a stage that is not the last is no loss."""
    made = rows_cut()
    graph = asynchronous(replace(made.rewritten, results=0), made.program, made.decisions.mesh, trains=True).graph
    (end,) = graph.graph.find_nodes(op="output")
    assert end.args[0][0].target is kernels.bridge


def waiting(made: Analysed, mesh: tuple[int, ...] | None = None) -> set[str]:
    """The parameters whose gradients may wait for a bridge."""
    places = {p.node: p.name for p in made.program.captured.placeholders}
    after = waits_used(made.rewritten, made.program, mesh or made.decisions.mesh)
    found: set[str] = set()
    for node in after.graph.graph.nodes:
        if isinstance(node.target, Deferred):
            weight = node.args[node.target.form.weight]
            while weight.op != "placeholder":
                weight = weight.args[0]
            found.add(places[weight.name])
    return found


def test_products_behind_a_bridge_may_wait_for_it() -> None:
    made = made_of(models.llama, {"": whalepy.split(2)})
    layer = "model.layers.0"
    columns = {f"{layer}.self_attn.{one}_proj.weight" for one in "qkv"}
    columns |= {f"{layer}.mlp.{one}_proj.weight" for one in ("gate", "up")}
    assert waiting(made) == columns | {"lm_head.weight"}


def test_nothing_waits_without_bridges() -> None:
    assert waiting(made_of(models.llama, {"": whalepy.replicate(2)})) == set()
    assert waiting(made_of(models.llama, {"": whalepy.split(2)}), (1,)) == set()


def test_a_weight_that_is_read_twice_does_not_wait() -> None:
    assert "transformer.wte.weight" not in waiting(made_of(models.gpt2, {"": whalepy.split(2)}))


class BiasReadTwice(nn.Module):
    """The bias of a product that could wait is read elsewhere too, where nothing waits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return (x + self.down(self.up(x).tanh() * self.up.bias.sigmoid())).square().mean()


def bias_read_twice() -> models.Made:
    torch.manual_seed(0)
    return BiasReadTwice(), [(torch.randn(8, 16),)]


def test_a_bias_that_is_read_twice_does_not_wait() -> None:
    found = waiting(made_of(bias_read_twice, {"": whalepy.split(2)}))
    assert "up.weight" not in found


def test_all_bridges_stay_bridges_where_they_are_not_cut_in_halves() -> None:
    plain = made_of(towers, {"": whalepy.split(2)})
    before = sum(node.target in MOVES for node in nodes(plain))
    made = started(plain)
    after = [node.target for node in nodes(made)]
    halves = [after.count(half) for half in (kernels.start_bridge, kernels.finish_bridge)]
    assert halves[0] == halves[1] and sum(target in MOVES for target in after) == before - halves[0]
