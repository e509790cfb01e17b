"""Stages that are forced: blocks in groups as even as they can be cut, and the text that does the same."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import whalepy
from tests.dryrun.studies import Block as OneBlock
from tests.dryrun.studies import Chain, chain, ids
from whalepy.dryrun.blocks import folded
from whalepy.dryrun.stages import Block, cut_evenly, degrees_of, flops_of_blocks, staging, unfolded
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Balance, Options
from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.primitives import scopes_on
from whalepy.runtime.build import Recipe

NUMBERS = st.lists(st.integers(1, 20).map(float), min_size=1, max_size=7)


def slowest(weights: Sequence[float], paces: Sequence[float], sizes: Sequence[int]) -> float:
    bounds = [0, *itertools.accumulate(sizes)]
    return max(sum(weights[a:b]) / pace for (a, b), pace in zip(itertools.pairwise(bounds), paces, strict=True))


@given(weights=NUMBERS, paces=NUMBERS)
def test_no_other_cut_ends_earlier(weights: list[float], paces: list[float]) -> None:
    paces = paces[: len(weights)]
    sizes = cut_evenly(weights, paces)
    assert sum(sizes) == len(weights) and min(sizes) >= 1 and len(sizes) == len(paces)
    cuts = itertools.combinations(range(1, len(weights)), len(paces) - 1)
    ways = [[b - a for a, b in itertools.pairwise((0, *cut, len(weights)))] for cut in cuts]
    assert slowest(weights, paces, sizes) == min(slowest(weights, paces, way) for way in ways)


def blocks_of(model: nn.Module, *, fold: bool) -> list[Block]:
    with folded(model, fold=fold) as found:
        weighed = flops_of_blocks(model, Study.of(Recipe(model), ids(), "adamw", found), found)
    return unfolded(weighed)


def test_blocks_weigh_as_much_folded_as_whole() -> None:
    """What runs after the last block counts for it: the head; what runs before the first one for that."""
    model = chain(7)
    found = blocks_of(model, fold=True)
    assert [block.path for block in found] == [f"blocks.{k}" for k in range(7)]
    assert found == blocks_of(model, fold=False)
    assert len({block.flops for block in found[1:-1]}) == 1 and found[-1].flops > found[1].flops


def test_a_model_without_lists_is_cut_between_its_children() -> None:
    model = nn.Module()
    assert [b.path for b in blocks_of(Chain([OneBlock()]), fold=True)] == ["embed", "blocks", "head"]
    assert not list(model.children())


FOUR = [Block(f"h.{k}", 1.0) for k in range(4)]
CASES = {
    "2 stages": (Options(stages=2), "2xT4"),
    "replicate 2 > 2 stages": (Options(stages=2), "4xT4"),
    "replicate 2 > 2 stages > split 2": (Options(stages=2, split=2), "8xT4"),
    "2 stages > split 4": (Options(stages=2, split=4), "8xT4"),
    "4 stages": (Options(stages=4, schedule="interleaved:2"), "2xT4"),
}


@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES)
def test_the_text_does_what_was_done(name: str, case: tuple[Options, str]) -> None:
    options, cluster = case
    made = staging(options, FOUR, ClusterSpec.load(cluster), "Model")
    assert made.name == name
    models = [nn.ModuleDict({"h": nn.ModuleList(nn.Linear(2, 2) for _ in range(4))}) for _ in range(2)]
    for model in models:
        model.forward = model.__call__  # it is annotated as a whole too
    whalepy.annotate(models[0], made.scopes)
    exec(made.text, {"model": models[1], "whalepy": whalepy})
    forms = [{path: [repr(p) for p in chain] for path, chain in scopes_on(model).items()} for model in models]
    assert forms[0] == forms[1]
    shared = [[chain[0].id for path, chain in scopes_on(model).items() if path] for model in models]
    assert [len(set(one)) for one in shared] == [options.stages] * 2


def test_faster_devices_get_more_blocks() -> None:
    blocks = [Block(f"h.{k}", 1.0) for k in range(8)]
    made = staging(Options(stages=2), blocks, ClusterSpec.load("1xcpu + 1xcpu*0.33"), "Model")
    assert len({chain[0] for chain in made.scopes.values()}) == 2
    first = next(iter(made.scopes.values()))[0]
    assert sum(chain[0] is first for chain in made.scopes.values()) == 6


@pytest.mark.parametrize(
    ("options", "devices", "message"),
    [
        (Options(stages=3, replicate=2), 4, "stages and degrees 3 x 2 cannot be met on 4 devices"),
        (Options(stages=8), 4, "stages and degrees 8 cannot be met on 4 devices"),
        (
            Options(stages=3, schedule="interleaved:2"),
            4,
            "--schedule interleaved:2 wants a multiple of 2 stages, not 3",
        ),
        (Options(stages=2, shares=(1.0, 2.0, 3.0)), 4, "3 shares for 2 replicas"),
    ],
)
def test_degrees_that_cannot_be_met(options: Options, devices: int, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        degrees_of(options, devices)
    assert caught.value.what == message


@pytest.mark.parametrize(
    ("balance", "sizes", "name"),
    [
        ("exact", [7, 1], "2 stages"),  # ends after 7: six and two would take 6 and 8
        ("whale", [6, 2], "2 stages by Whale's cut"),  # four fifths of eight blocks are 6.4
        ("equal", [4, 4], "2 stages by number of blocks"),
    ],
)
def test_stages_by_each_balance(balance: Balance, sizes: list[int], name: str) -> None:
    blocks = [Block(f"h.{k}", 1.0) for k in range(8)]
    made = staging(Options(stages=2, balance=balance), blocks, ClusterSpec.load("1xcpu + 1xcpu*0.25"), "Model")
    stages = [chain[0] for chain in made.scopes.values()]
    assert [stages.count(one) for one in dict.fromkeys(stages)] == sizes and made.name == name
    assert made.flags == "--stages 2" + ("" if balance == "exact" else f" --balance {balance}")
