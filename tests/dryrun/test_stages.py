"""Stages that are forced: blocks in groups as even as they can be cut, and the text that does the same."""

from __future__ import annotations

import pytest
from torch import nn

import whalepy
from tests.dryrun.studies import Block as OneBlock
from tests.dryrun.studies import Chain, chain, ids
from whalepy.dryrun.blocks import folded
from whalepy.dryrun.chosen import Surveyed, forced, surveyed
from whalepy.dryrun.staged import Staged
from whalepy.dryrun.stages import degrees_of
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Balance, Options
from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.primitives import scopes_on
from whalepy.runtime.build import Recipe


def survey(model: nn.Module, cluster: str, *, rows: int = 16, fold: bool = True) -> Surveyed:
    with folded(model, fold=fold) as found:
        study = Study.of(Recipe(model), ids(rows), "adamw", found)
        return surveyed(study, ClusterSpec.load(cluster))


def test_blocks_weigh_as_much_folded_as_whole() -> None:
    """What runs after the last block counts for it: the head; what runs before the first one for that."""
    model = chain(7)
    found = survey(model, "2xT4")
    assert found.paths == tuple(f"blocks.{k}" for k in range(7))
    assert found.flops == survey(model, "2xT4", fold=False).flops
    assert len(set(found.flops[1:-1])) == 1 and found.flops[-1] > found.flops[1]


def test_a_model_without_lists_is_cut_between_its_children() -> None:
    assert survey(Chain([OneBlock()]), "2xT4").paths == ("embed", "blocks", "head")


CASES = {
    "2 stages": (Options(stages=2, replicate=1), "2xT4"),
    "replicate 2 > 2 stages": (Options(stages=2, replicate=2), "4xT4"),
    "replicate 2 > 2 stages > split 2": (Options(stages=2, replicate=2, split=2), "8xT4"),
    "2 stages > split 4": (Options(stages=2, replicate=1, split=4), "8xT4"),
    "4 stages": (Options(stages=4, replicate=1, schedule="interleaved:2"), "2xT4"),
}


def staged(options: Options, cluster: str, count: int = 8, rows: int = 16) -> Staged:
    model = chain(count)
    with folded(model) as found:
        study = Study.of(Recipe(model), ids(rows), "adamw", found)
        return forced(study, ClusterSpec.load(cluster), options)[0]


@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES)
def test_the_text_does_what_was_done(name: str, case: tuple[Options, str]) -> None:
    options, cluster = case
    made = staged(options, cluster)
    assert made.name == name
    models = [chain(8), chain(8)]
    whalepy.annotate(models[0], made.scopes)
    exec(made.annotations, {"model": models[1], "whalepy": whalepy})
    forms = [{path: [repr(p) for p in chain] for path, chain in scopes_on(model).items()} for model in models]
    assert forms[0] == forms[1]
    shared = [[chain[0].id for path, chain in scopes_on(model).items() if path] for model in models]
    assert [len(set(one)) for one in shared] == [options.stages] * 2


def sizes_of(made: Staged) -> list[int]:
    stages = [chain[0] for path, chain in made.scopes.items() if path.startswith("blocks.")]
    return [stages.count(one) for one in dict.fromkeys(stages)]


def order_of(made: Staged) -> list[int]:
    """The devices of the stages in turn, one each."""
    placed = [scope.placement for scope in made.scopes.get("", ()) if scope.kind == "cluster"]
    return [d for own in placed[0] for d in own] if placed else [0, 1]


def test_faster_devices_get_more_blocks() -> None:
    made = staged(Options(stages=2), "1xT4 + 1xT4*0.33")
    assert dict(zip(order_of(made), sizes_of(made), strict=True)) == {0: 6, 1: 2}


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
        ("whale", {6, 2}, "2 stages by Whale's cut"),
        ("equal", {4}, "2 stages by number of blocks"),
    ],
)
def test_stages_by_the_baselines(balance: Balance, sizes: set[int], name: str) -> None:
    made = staged(Options(stages=2, balance=balance), "1xT4 + 1xT4*0.25")
    assert set(sizes_of(made)) == sizes and made.name == name
    assert made.flags == f"--stages 2 --replicate 1 --split 1 --balance {balance}"


def test_stages_by_time() -> None:
    """With many rows time follows products: the head, which is no block, takes its part of them."""
    made = staged(Options(stages=2), "1xT4 + 1xT4*0.25", rows=4096)
    assert dict(zip(order_of(made), sizes_of(made), strict=True)) == {0: 7, 1: 1} and made.name == "2 stages"
