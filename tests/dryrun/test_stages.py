"""Stages that are forced: blocks in groups as even as they can be cut, and the text that does the same."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import whalepy
from tests.dryrun.studies import WIDTH, Chain, chain, ids
from tests.dryrun.studies import Block as OneBlock
from tests.runtime.test_unannotated import LINK
from whalepy.dryrun import run as answering
from whalepy.dryrun.blocks import folded
from whalepy.dryrun.chosen import Surveyed, Ways, forced, surveyed
from whalepy.dryrun.forced import Forced
from whalepy.dryrun.run import Request, run
from whalepy.dryrun.staged import Staged
from whalepy.dryrun.stages import check_degrees
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Balance, Options
from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.form import parse_widths
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
    "2 stages of 2 and 1 devices": (Options(stages=2, widths=parse_widths("2,1")), "3xT4"),
    "3 stages of 1 (2 times) and 2x2 devices": (Options(stages=3, widths=parse_widths("2*1,2x2")), "6xT4"),
    "2 stages of 2 (2 times) devices": (Options(stages=2, widths=parse_widths("2,2")), "4xT4"),
    "4 stages": (Options(stages=4, replicate=1, schedule="interleaved:2"), "2xT4"),
}


def staged(options: Options, cluster: str, count: int = 8, rows: int = 16) -> Staged:
    model = chain(count)
    with folded(model) as found:
        study = Study.of(Recipe(model), ids(rows), "adamw", found)
        ways = forced(study, ClusterSpec.load(cluster), options)
        return ways.staged(ways.choices[0])[0]


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
    found = [scope.placement.value for scope in made.scopes.get("", ()) if scope.placement is not None]
    lists = found[0] if found else ((0,), (1,))
    assert isinstance(lists, tuple)
    return [d for own in lists for d in own]


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
        (
            Options(stages=3, widths=parse_widths("2,1x2,1")),
            4,
            "--widths 2,1x2,1 needs 5 devices, 4 are there",
        ),
        (Options(stages=2, shares=(1.0, 2.0, 3.0)), 4, "3 shares for 2 replicas"),
    ],
)
def test_degrees_that_cannot_be_met(options: Options, devices: int, message: str) -> None:
    with pytest.raises(PlanError) as caught:
        check_degrees(options, devices)
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


class TwoLists(nn.Module):
    """Lists of which the second one runs first, or that take turns."""

    def __init__(self, *, turns: bool) -> None:
        super().__init__()
        self.late = nn.ModuleList(OneBlock(hidden=WIDTH) for _ in range(6))
        self.early = nn.ModuleList(OneBlock() for _ in range(6))
        self.turns = turns

    def forward(self, x: Tensor) -> Tensor:
        pairs = list(zip(self.early, self.late, strict=True))
        for block in (b for pair in pairs for b in pair) if self.turns else (*self.early, *self.late):
            x = block(x)
        return x.pow(2).mean()


@pytest.mark.parametrize("turns", [False, True])
def test_blocks_are_cut_in_the_order_in_which_they_run(turns: bool) -> None:
    with torch.device("meta"):
        model = TwoLists(turns=turns)
    batch = (torch.empty(8, 4, WIDTH, device="meta"),)
    cluster = ClusterSpec.load("2xT4")
    with folded(model) as found:
        study = Study.of(Recipe(model), batch, "adamw", found)
        assert len(found.folds) == 2
        paths = surveyed(study, cluster).paths
    early, late = ([f"{name}.{k}" for k in range(6)] for name in ("early", "late"))
    assert list(paths) == ([p for pair in zip(early, late, strict=True) for p in pair] if turns else early + late)


def test_stages_of_a_model_that_is_studied_whole_are_cut_anew() -> None:
    """Where it counts its blocks, none may be left out."""
    model = chain(5)
    with folded(model, fold=False) as found:
        base = Study.of(Recipe(model), ids(), "adamw", found)
    tried = Forced(base, Options(stages=2)).on(ClusterSpec.load("1xT4 + 1xV100-SXM2-16GB"), 2)
    assert tried is not None and tried.verdict == "fits"


def ways_of(sizes: Sequence[tuple[int, ...]]) -> tuple[Forced, Ways]:
    """A chain in two stages on a fast and a slow card, cut in each of these ways, expected to take as long."""
    model, cluster = chain(8), ClusterSpec.load("1xT4 + 1xT4*0.25")
    with folded(model) as found:
        base = Study.of(Recipe(model), ids(512), "adamw", found)
        ways = forced(base, cluster, Options(stages=2, microbatches=8, schedule="1f1b"))
    (first, *_) = ways.choices
    return Forced(base, ways.options), replace(ways, choices=tuple(replace(first, sizes=own) for own in sizes))


@pytest.mark.parametrize(
    ("sizes", "best", "end"),
    [
        ([(2, 6), (6, 2)], 0, (2, 6)),  # none is better
        ([(5, 3), (4, 4)], 1, (2, 6)),  # two blocks away from the slowest stage, the first
        ([(6, 2), (1, 7)], 1, (2, 6)),  # one, of the last
    ],
)
def test_ways_that_are_expected_to_take_as_long_are_played(
    sizes: list[tuple[int, ...]], best: int, end: tuple[int, ...]
) -> None:
    """What is faster when played is taken, in whatever order they come; blocks of its slowest stage are moved."""
    again, ways = ways_of(sizes)
    played = [again.played(ways, choice) for choice in ways.choices]
    _, taken, others = again.fastest(ways, lambda _: None)
    seconds = [one.step_s for one in played if one is not None]
    assert len(seconds) == 2 and min(seconds) == seconds[best] and [one.step_s for one in others] == [seconds[1 - best]]
    assert taken.sizes == end
    _, backwards, _ = again.fastest(replace(ways, choices=ways.choices[::-1]), lambda _: None)
    assert backwards == taken


def test_one_way_that_is_expected_to_be_fastest_is_not_played_twice() -> None:
    again, ways = ways_of([(2, 6)])
    assert again.fastest(ways, lambda _: None) == (ways, ways.choices[0], ())


def test_flags_force_the_shares_that_were_forced() -> None:
    """Of five cards four make two copies, and one is left."""
    made = staged(Options(stages=2, shares=(3.0, 1.0)), "5xT4")
    assert made.flags == "--stages 2 --replicate 2 --split 1 --shares 3:1"
    assert staged(Options(stages=2, shares="equal"), "2xT4").flags.endswith("--shares equal")


def test_stages_are_left_out_where_zero_has_none() -> None:
    """On so slow a link stages would be faster, but parameters in parts go without."""
    request = Request("gpt2", "2x1xT4 @ 10Mbit/s", 4, 16, zero=3, keeps_plan=False)
    forecast, _ = run(request, lambda _: None)
    assert len(forecast.stages) == 1 and "zero 3" in forecast.strategy


def test_estimates_beside_a_plan_tell_of_every_other_one() -> None:
    """Those of the very plan are left out, those whose names begin alike are not; they say what is saved."""
    forecast, _ = run(Request("gpt2", "2x2xT4 @ 10Mbit/s", 8, 16, zero=1, keeps_plan=False), lambda _: None)
    names = [one.strategy.split(",")[0] for one in forecast.alternatives]
    estimates = [one for one in forecast.alternatives if one.strategy.endswith("estimated")]
    assert len(forecast.stages) > 1 and estimates
    assert names[0] not in [one.strategy.split(",")[0] for one in estimates]
    assert [one.flags for one in forecast.alternatives if "zero-bubble" in one.strategy]
    assert all("zero 1" in one.strategy and "--zero 1" in one.flags for one in estimates)


def test_the_schedule_of_stages_is_chosen_where_it_gains() -> None:
    """With few microbatches there is a bubble that weight gradients fill; where 1F1B is asked for, it stays."""
    asked = Request("gpt2", "2xV100-SXM2-32GB", 8, 256, stages=2, microbatches=4)
    forecast, plan = run(asked, lambda _: None)
    forced, _ = run(replace(asked, schedule="1f1b"), lambda _: None)
    assert forecast.schedule == "zero-bubble" and plan is not None and plan.schedule == "zero-bubble"
    assert "--schedule zero-bubble" in forecast.alternatives[0].flags
    assert forced.schedule == "1f1b" and forecast.step_time_s < 0.97 * forced.step_time_s
    assert [one.step_time_s for one in forecast.alternatives if "1f1b" in one.strategy] == [forced.step_time_s]


def frozen(width: int = WIDTH) -> Chain:
    """A chain of which only the ends are trained: no weight gradients fill the bubble of its stages."""
    with torch.device("meta"):
        model = Chain([OneBlock(width, hidden=2 * width) for _ in range(16)], width=width)
    model.blocks.requires_grad_(False)
    return model


SMALL = {"link": "100Gbit/s", "nodes": [{"devices": [{"type": "T4", "memory_gib": 3.2}]} for _ in range(4)]}


def test_stages_take_turns_where_that_gains() -> None:
    """In `whalepy.compile` as in a dry run; where the number of stages is forced, it stays."""
    plan = whalepy.plan(frozen(4096), SMALL, ids(64), microbatches=4)
    assert (plan.schedule, len(plan.stages), plan.microbatches) == ("interleaved:2", 8, 4)
    assert plan.explain().startswith("8 stages: chosen for a model without annotations")
    model, cluster = frozen(), ClusterSpec.load("4x1xT4 @ 100Gbit/s")
    with folded(model) as found:
        base = Study.of(Recipe(model), ids(512), "adamw", found)
        ways = forced(base, cluster, Options(stages=4, microbatches=4))
    for options, schedule in ((Options(microbatches=4), "interleaved:2"), (ways.options, None)):
        taken, choice, others = Forced(base, options).fastest(replace(ways, options=options), lambda _: None)
        assert taken.options.schedule == schedule and len(choice.sizes) == (8 if schedule else 4)
        assert {one.candidate.plan.schedule for one in others} == {"zero-bubble"} | ({"1f1b"} if schedule else set())
        assert set(choice.sizes) == {16 // len(choice.sizes)}
        played = Forced(base, taken.options).played(taken, choice)
        assert played is not None and choice.step_s == pytest.approx(played.step_s, rel=0.1)


OWN = """
import whalepy
from tests.dryrun.studies import chain, ids


def make():
    model = chain(8)
    first, second = whalepy.stage(), whalepy.stage()
    whalepy.annotate(model, {f'blocks.{k}': first if k < 4 else second for k in range(8)})
    return model, ids(ROWS)
"""


@pytest.mark.parametrize(
    ("rows", "count", "schedule"), [(16, None, None), (64, None, None), (64, None, "gpipe"), (64, 4, None)]
)
def test_what_the_users_own_stages_leave_open_is_chosen(
    tmp_path: Path, rows: int, count: int | None, schedule: str | None
) -> None:
    """Microbatches and schedule: what is taken is what compile takes, and none that was played is much faster."""
    text, cluster = OWN.replace("ROWS", str(rows)), "2xV100-SXM2-32GB"
    (tmp_path / "own.py").write_text(text)
    asked = Request(f"{tmp_path}/own.py:make", cluster, microbatches=count, schedule=schedule)
    forecast, plan = run(asked, lambda _: None)
    found: dict[str, Any] = {}
    exec(text, found)
    model, batch = found["make"]()
    compiled = whalepy.plan(model, cluster, batch, microbatches=count, schedule=schedule)
    own = compiled.microbatches, compiled.schedule
    assert plan is not None and own == (plan.microbatches, plan.schedule) == (forecast.microbatches, forecast.schedule)
    assert count in (None, own[0]) and schedule in (None, own[1])
    first, *others = forecast.alternatives
    played = [one for one in others if one.strategy.startswith("as annotated") and one.verdict != "no"]
    assert played or schedule
    assert all(one.step_time_s > 0.95 * first.step_time_s for one in played)
    told = "chosen as none are asked for, expected to take" in compiled.explain()
    assert told == (own != (count or 8, schedule or "1f1b"))


TRAINED = "from tests.dryrun.studies import chain, ids\n\n\ndef make():\n    return chain(8), ids(16)\n"


def test_stages_that_turn_out_not_to_fit_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search estimates; what it finds is then rehearsed."""
    (tmp_path / "train.py").write_text(TRAINED)
    (tmp_path / "slow.json").write_text(json.dumps(LINK))
    request = Request(f"{tmp_path}/train.py:make", str(tmp_path / "slow.json"), keeps_plan=False)
    chosen, _ = run(request, lambda _: None)
    assert len(chosen.stages) == 2 and chosen.fits
    answer = answering.answer_in_stages

    def without_room(*args: Any) -> Any:
        forecast, best = answer(*args)
        return replace(forecast, verdict="no"), best

    monkeypatch.setattr(answering, "answer_in_stages", without_room)
    other, _ = run(request, lambda _: None)
    assert len(other.stages) <= 1 and other.fits


def test_more_microbatches_of_the_same_rows_keep_no_more_memory(tmp_path: Path) -> None:
    """Activations are those of the microbatches under way, and what was sent goes once it has arrived."""
    (tmp_path / "train.py").write_text(TRAINED)

    def peaks(count: int) -> list[int]:
        made = Request(f"{tmp_path}/train.py:make", "3xT4", 2 * count, stages=3, microbatches=count, beyond=False)
        found = run(replace(made, keeps_plan=False), lambda _: None)[0].devices
        return [each.peak_memory_bytes - sum(h.bytes for h in each.held if h.name == "inputs") for each in found]

    few, many = peaks(16), peaks(64)
    assert many == pytest.approx(few, rel=0, abs=4 * (64 - 16))  # the losses
