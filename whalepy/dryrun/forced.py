"""Stages for other devices than those that are asked for, without another capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

from whalepy.dryrun.blocks import LEAST_IN_STAGES, folded
from whalepy.dryrun.chosen import Ways, choices_of, forced, is_wide, name_of
from whalepy.dryrun.grown import grown
from whalepy.dryrun.pipeline import PipelineTried
from whalepy.dryrun.progress import Progress
from whalepy.dryrun.settled import is_worth_it
from whalepy.dryrun.staged import stages_of, tried_in_stages
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options
from whalepy.errors import WhaleError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.schedule.kinds import DEFAULT, parse_kind
from whalepy.planner.search import Choice


@dataclass(frozen=True)
class Forced:
    """A model that is put in stages: the study of the blocks that repeat, and what is asked for."""

    base: Study
    options: Options

    def on(self, cluster: ClusterSpec, stages: int) -> PipelineTried | None:
        """The pipeline on other devices, of as many stages as they allow at most, and as many replicas.

        None where there would not be two stages, or the blocks do not follow each other. Raises PlanError where what is
        asked for cannot be met.
        """
        asked, model = self.options, self.base.recipe.model
        chunks = parse_kind(asked.schedule or DEFAULT).chunks or 1
        count = min(stages, chunks * (len(cluster.devices) // (asked.split or 1)))
        if count < 2:
            return None
        shares = asked.shares if asked.shares == "equal" else None
        others = replace(asked, stages=count, replicate=None, shares=shares, widths=None)
        with folded(model, fold=bool(self.base.blocks.folds), scopes={}):
            ways = forced(self.base, cluster, others)
        return self.played(ways, ways.choices[0])

    def played(self, ways: Ways, choice: Choice) -> PipelineTried | None:
        """One of the ways to put it in stages; None where the blocks do not follow each other."""
        staged, options = ways.staged(choice)
        with folded(self.base.recipe.model, least=LEAST_IN_STAGES, scopes=staged.scopes) as kept:
            paths = {first: path for path, (first, *_) in zip(kept.paths, kept.stand_for, strict=True)}
            own = {path: chain for path, chain in staged.scopes.items() if path in paths or path not in kept.whole}
            study = grown(self.base, kept, {paths.get(path, path): chain for path, chain in own.items()})
            if study is None:
                return None
            tried = tried_in_stages(study, ways.cluster, options, staged)
            return tried if tried.verdict else None  # what it holds is rehearsed here, while the blocks are these

    def fastest(self, ways: Ways, progress: Progress) -> tuple[Ways, Choice, tuple[PipelineTried, ...]]:
        """The way that is fastest when played, and the others that were played.

        Where no schedule is asked for, and on cards alone, others than 1F1B are tried with it.
        """
        best, played, others = self._nearest(ways, progress)
        if not _may_choose(ways):
            return ways, best, others
        played = played or self.played(ways, best)
        for later in _scheduled_otherwise(ways, best) if played is not None else ():
            progress(f"{name_of(later.choices[0])}, {later.options.schedule}")
            with suppress(WhaleError):
                other = self.played(later, later.choices[0])
                if other is None or played is None:
                    continue
                if is_worth_it(other, played):
                    ways, best, played, other = later, later.choices[0], other, played
                others = (*others, other)
        return ways, best, others

    def _nearest(
        self, ways: Ways, progress: Progress
    ) -> tuple[Choice, PipelineTried | None, tuple[PipelineTried, ...]]:
        """Of the ways that are expected to take about as long, the one that is fastest when played, and the others.

        Blocks of its slowest stage are given to a neighbour as long as that helps. Nothing is played where one is left.
        """
        first = ways.choices[0]
        near = [choice for choice in ways.choices[:_MOST_PLAYED] if choice.step_s <= _NEAR * first.step_s]
        if len(near) == 1:
            return first, None, ()
        tried: list[tuple[Choice, PipelineTried]] = []
        for choice in near:
            progress(f"{name_of(choice)}, {choice.microbatches} microbatches")
            played = self.played(ways, choice)
            if played is None:
                return first, None, ()
            tried.append((choice, played))
        best, played = min(tried, key=lambda one: one[1].order)
        others = tuple(other for choice, other in tried if choice is not best)
        for _ in range(_MOST_MOVES):
            moved = _relieved(best, played)
            progress("with a block less on the slowest stage")
            other = None if moved is None else self.played(ways, moved)
            if moved is None or other is None or other.order[:2] >= played.order[:2]:
                break
            best, played = moved, other
        return best, played, others


_MOST_PLAYED = 3
"""Ways that are played in full."""
_NEAR = 1.07
"""Ways that are expected to take up to so many times as long as the best are played: estimates are off by as much."""
_MOST_MOVES = 2
"""Blocks that are moved."""


def _may_choose(ways: Ways) -> bool:
    """Whether another schedule may be chosen: what one costs a CPU beside its schedule is not in the forecast."""
    return ways.cluster.on_gpus and ways.options.beyond and ways.options.schedule is None


def _scheduled_otherwise(ways: Ways, choice: Choice) -> Iterator[Ways]:
    """The same stages with the weight gradients apart; then two stages on each of the same groups, which take turns."""
    yield replace(ways, choices=(choice,), options=replace(ways.options, schedule="zero-bubble"))
    groups = len(choice.groups)
    if ways.options.stages is not None or not 1 < groups <= len(ways.found.paths) // _CHUNKS:
        return
    kept = {"widths": choice.widths} if is_wide(choice) else {"replicate": choice.copies, "split": choice.split}
    options = replace(ways.options, stages=_CHUNKS * groups, schedule=f"interleaved:{_CHUNKS}", **kept)
    found = choices_of(ways.found, ways.cluster, options)
    yield from (replace(ways, choices=(one,), options=options) for one in found[:1])


_CHUNKS = 2
"""Stages that take turns on each group of devices, where that is tried."""


def _relieved(choice: Choice, played: PipelineTried) -> Choice | None:
    """The same with a block of the slowest stage on the faster one of its neighbours; None where it has one block."""
    seconds = [stage.forward_s + stage.backward_s for stage in stages_of(played)]
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    if choice.sizes[slowest] == 1:
        return None
    beside = [k for k in (slowest - 1, slowest + 1) if 0 <= k < len(seconds)]
    faster = min(beside, key=seconds.__getitem__)
    change = {slowest: -1, faster: 1}
    return replace(choice, sizes=tuple(size + change.get(k, 0) for k, size in enumerate(choice.sizes)))
