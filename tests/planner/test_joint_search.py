"""The joint search over stages, copies, splits, rows and microbatches, against every way there is on small cases."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.block_table import BlockWork, Lent, Way
from whalepy.planner.form import Limits, parse_widths
from whalepy.planner.search import Choice, Search
from whalepy.planner.stage_cost import StageCosts
from whalepy.planner.units import units_of
from whalepy.planner.work import Event, Holdings

MIB = 2**20


@dataclass
class Blocks:
    """Blocks of given FLOPs a row, of given parameters, that keep given bytes a row."""

    flops: Sequence[int]
    parameters: Sequence[int]
    saved: Sequence[int]
    rows: int
    splits: Sequence[int] = (1, 2)
    lent: Sequence[Lent] = ()
    order: Sequence[int] = field(init=False)

    def __post_init__(self) -> None:
        self.order = range(len(self.flops))

    def works(self, way: Way, rows: int) -> list[BlockWork]:
        return [self._work(way, rows, k) for k in self.order]

    def _work(self, way: Way, rows: int, k: int) -> BlockWork:
        size, kept = self.parameters[k] // way.split, rows * self.saved[k] // way.split
        forward = Event("forward", "", rows * self.flops[k] // way.split, kept, "float32", 0, 0)
        back = Event("backward", "", 2 * forward.flops, 2 * kept, "float32", 0, 0)
        sum_ = Event("forward", "", 0, rows * 4096, "float32", 0, 0, "all-reduce", 0)
        between = (sum_,) if way.split > 1 else ()
        holdings = Holdings(4 * size, 0, 4 * size, 4 * size, 8 * size)
        return BlockWork((forward, *between), (back, *between), kept, kept // 4, rows * 4096, holdings)

    def update(self, way: Way) -> list[Event]:
        return [Event("optimizer", "", 0, 28 * sum(self.parameters) // way.split, "float32", 0, 0)]


def blocks(draw: random.Random, *, rows: int = 8) -> Blocks:
    count = draw.randint(2, 5)
    return Blocks(
        [draw.randint(1, 40) * 10**9 for _ in range(count)],
        [draw.randint(1, 60) * MIB for _ in range(count)],
        [draw.randint(1, 300) * MIB for _ in range(count)],
        rows,
    )


def best_choices(table: Blocks, cluster: ClusterSpec, **limits: Any) -> list[Choice]:
    return Search(StageCosts(table, cluster), Limits(**limits)).found()


CLUSTERS = (
    "2xV100-SXM2-16GB + 1xT4",
    "1xT4 + 1xP100-PCIE-16GB",
    "3xT4",
    "3xV100-SXM2-16GB + 1xT4",
    "2xT4 + 1xP100-PCIE-16GB + 1xV100-SXM2-16GB",
)


def every_choice(table: Blocks, cluster: ClusterSpec) -> Iterator[Choice]:
    """Every split, every number of stages and copies, every order of units, every cut, every number of microbatches."""
    search = Search(StageCosts(table, cluster), Limits())
    for split in table.splits:
        units = [unit for own in units_of(cluster, split) for unit in own]
        for stages in range(1, min(len(units), len(table.flops)) + 1):
            for copies in range(1, len(units) // stages + 1):
                for chosen in itertools.permutations(units, stages * copies):
                    groups = tuple(chosen[k * copies : (k + 1) * copies] for k in range(stages))
                    yield from _of_groups(search, groups)


def every_row(table: Blocks, cluster: ClusterSpec) -> Iterator[Choice]:
    """Every row of stages of whatever width, each on units of one kind that have parts of its rows."""
    search = Search(StageCosts(table, cluster), Limits())
    by_split = {split: [unit for own in units_of(cluster, split) for unit in own] for split in table.splits}
    stages = [
        tuple(chosen)
        for units in by_split.values()
        for size in range(1, len(units) + 1)
        for chosen in itertools.combinations(units, size)
        if len({unit.kind for unit in chosen}) == 1
    ]
    for count in range(2, len(table.flops) + 1):
        for groups in itertools.permutations(stages, count):
            used = [device for group in groups for unit in group for device in unit.devices]
            if len(set(used)) == len(used):
                yield from _of_groups(search, groups, copies=1)


def _of_groups(search: Search, groups: tuple[tuple[object, ...], ...], copies: int | None = None) -> Iterator[Choice]:
    copies = copies or len(groups[0])
    form = search.form_of("none", 0, len(groups), groups, copies)  # type: ignore[arg-type]
    counts = {math.ceil(search.table.rows // copies / (1 << k)) for k in range(4)}
    for microbatches in sorted(count for count in counts if count >= 1):
        for rows in _shares(search.table.rows, copies):
            most = max(map(len, groups)) // copies
            if min(rows) >= (microbatches * most if len(groups) > 1 else 1):
                made = search.with_rows(form, microbatches, rows)
                if made is not None:
                    yield made[0]


def _shares(rows: int, copies: int) -> Iterator[tuple[int, ...]]:
    if copies == 1:
        yield (rows,)
        return
    for first in range(1, rows - copies + 2):
        for rest in _shares(rows - first, copies - 1):
            yield (first, *rest)


@pytest.mark.parametrize("seed", range(64))
def test_within_two_per_cent_of_every_way_there_is(seed: int) -> None:
    draw = random.Random(seed)
    cluster = ClusterSpec.load(CLUSTERS[seed % 4])
    table = blocks(draw)
    every = itertools.chain(every_choice(table, cluster), every_row(table, cluster))
    best = min((choice.step_s for choice in every), default=math.inf)
    found = best_choices(table, cluster)
    assert bool(found) == math.isfinite(best)
    if found:
        assert found[0].step_s <= 1.02 * best


@pytest.mark.parametrize("seed", range(300))
def test_what_is_found_is_legal(seed: int) -> None:
    """Every block and every row once, devices used once, and nothing over its memory; or nothing, and a reason."""
    draw = random.Random(seed)
    cluster = ClusterSpec.load(draw.choice(CLUSTERS))
    table = blocks(draw, rows=draw.randint(1, 40))
    for choice in best_choices(table, cluster, filled=draw.choice((0.84, 1.0))):
        used = [device for group in choice.groups for unit in group for device in unit.devices]
        assert len(set(used)) == len(used) == choice.devices
        assert sum(choice.sizes) == len(table.flops) and min(choice.sizes) >= 1
        assert sum(choice.rows) == table.rows and len(choice.rows) == choice.copies
        assert len(choice.groups) == len(choice.sizes)
        assert choice.unlike or {len(group) for group in choice.groups} == {choice.copies}
        assert all(len({unit.kind for unit in group}) == 1 for group in choice.groups) or not choice.unlike
        assert 0 < choice.filled <= 1.0 and choice.step_s > 0


def test_the_same_every_time() -> None:
    table, cluster = blocks(random.Random(1)), ClusterSpec.load(CLUSTERS[4])
    assert best_choices(table, cluster) == best_choices(blocks(random.Random(1)), cluster)


def test_a_card_that_slows_the_rest_is_left_out() -> None:
    """One row more than the fast card can take in the same time costs the slow one longer than the whole step."""
    table = Blocks([10**12] * 2, [200 * MIB] * 2, [MIB] * 2, rows=4)
    (first, *_) = best_choices(table, ClusterSpec.load("1xH100-SXM + 1xT4"))
    assert first.devices == 1


def test_a_stage_of_two_slow_cards_beside_one_of_a_fast_card() -> None:
    """With two microbatches three stages in a row would be one more to wait for."""
    table = Blocks([10**11] * 12, [8 * MIB] * 12, [300 * MIB] * 12, rows=16, splits=(1,))
    (first, *_) = best_choices(table, ClusterSpec.load("1xV100-SXM2-16GB + 2xT4"), microbatches=2)
    assert first.unlike and sorted(width.replicate for width in first.widths) == [1, 2]
    assert [len({unit.kind for unit in group}) for group in first.groups] == [1, 1]


def test_widths_that_are_asked_for_are_kept() -> None:
    """Also where other ones would be faster, and where a kind has too few devices for one of them."""
    table, cluster = blocks(random.Random(5), rows=12), ClusterSpec.load("3xV100-SXM2-16GB + 2xT4")
    for text in ("3,1", "2,2", "1x2,1x2", "1,1,2"):
        found = best_choices(table, cluster, widths=parse_widths(text))
        assert found and {choice.widths for choice in found} == {parse_widths(text)}
    assert not best_choices(table, cluster, widths=parse_widths("1,4"))


def test_memory_decides_where_speed_does_not() -> None:
    """Two parts of a model that fills a card go to two cards, and the larger memory takes more of it."""
    table = Blocks([10**9] * 8, [300 * MIB] * 8, [MIB] * 8, rows=4, splits=(1,))
    cluster = ClusterSpec.load("1xV100-SXM2-32GB + 1xV100-SXM2-16GB")
    (first, *_) = best_choices(table, cluster, stages=2)
    sizes = dict(zip((group[0].devices[0] for group in first.groups), first.sizes, strict=True))
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize("chunks", [1, 2])
def test_no_form_beats_its_bound(chunks: int) -> None:
    """Where the host is what takes time, four rows take no longer than three."""
    table = Blocks([10**5] * 20, [1024] * 20, [1024] * 20, rows=11, splits=(1,))
    search = Search(StageCosts(table, ClusterSpec.load("2xV100-SXM2-16GB + 1xT4")), Limits(chunks=chunks))
    cuts = [(lead, search.cut(lead)) for lead in search.leads()]
    assert cuts
    assert all(choice is None or lead.bound_s <= choice.step_s for lead, choice in cuts)


def test_a_split_is_timed_where_there_are_devices_for_it() -> None:
    """One card alone in the first node makes no pair."""
    table = blocks(random.Random(3))
    pair, alone = "1x2xV100-SXM2-16GB", "1x1xV100-SXM2-16GB"
    clusters = [ClusterSpec.load(f"{a} + {b} @ 10Gbit/s") for a, b in ((pair, alone), (alone, pair))]
    seconds = [StageCosts(table, cluster).sums(Way(2), 8, 0).both[-1] for cluster in clusters]
    assert seconds[0] == seconds[1]


def test_devices_that_are_all_unlike_are_not_put_together_in_every_way() -> None:
    """Measured speeds are hardly ever the same."""
    cluster = ClusterSpec.load(" + ".join(f"1xT4*0.{90 - k}" for k in range(40)))
    (first, *_) = best_choices(Blocks([10**9] * 40, [40 * MIB] * 40, [MIB] * 40, rows=64, splits=(1,)), cluster)
    assert not first.unlike


def test_stages_that_take_turns_are_a_multiple() -> None:
    """Of interleaved stages each group of devices has as many, and one group has nobody to take turns with."""
    table = Blocks([10**9] * 9, [MIB] * 9, [MIB] * 9, rows=16, splits=(1,))
    found = best_choices(table, ClusterSpec.load("3xT4"), chunks=2)
    assert found and {len(choice.sizes) for choice in found} <= {4, 6}
    assert all(2 * len(choice.groups) == len(choice.sizes) for choice in found)


def test_stages_that_take_turns_wait_less() -> None:
    """Of four groups with 8 microbatches: 8 turns and three to fill and drain it, or half of those three."""
    table = Blocks([10**12] * 8, [MIB] * 8, [0] * 8, rows=8, splits=(1,))
    cluster = ClusterSpec.load("4xT4")
    plain, turns = (
        best_choices(table, cluster, stages=4 * chunks, replicate=1, chunks=chunks, microbatches=8)[0].step_s
        for chunks in (1, 2)
    )
    assert turns / plain == pytest.approx((8 + 1.5) / (8 + 3), rel=0.01)
