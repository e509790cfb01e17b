"""A model in stages, tried: with stages of the user's, or with those that are forced; what of it is reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from whalepy.dryrun.degrees import open_words
from whalepy.dryrun.pipeline import PipelineCandidate, PipelineTried
from whalepy.dryrun.room import largest_batch
from whalepy.dryrun.stages import Staging
from whalepy.dryrun.study import Cut, Study
from whalepy.dryrun.tried import Options, Tried
from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.annotation import written
from whalepy.planner.forecast import StageForecast
from whalepy.planner.plan import Plan
from whalepy.planner.schedule.actions import COMPUTES, SENDS, Op
from whalepy.planner.schedule.kinds import DEFAULT
from whalepy.primitives import Primitive
from whalepy.runtime.pipeline import Pipeline
from whalepy.runtime.planning import Choices, planned


@dataclass(frozen=True)
class Staged:
    """How a model came to its stages."""

    name: str = ""
    """`replicate 2 > 2 stages`; empty for stages of the user's own."""
    flags: str = ""
    annotations: str = ""
    given: Plan | None = None
    """A saved plan, to be costed anew."""
    scopes: Mapping[str, Sequence[Primitive]] = field(default_factory=dict[str, Sequence[Primitive]])
    """What puts a model in these stages."""
    baselines: tuple[Tried, ...] | None = None
    """The whole model on every device, where it was tried already; none where that cannot be."""
    others: tuple[Tried, ...] = ()
    """Other stages that were played."""

    @classmethod
    def made(cls, staging: Staging) -> Staged:
        """Stages that are put on a model."""
        return cls(staging.name, staging.flags, staging.text, scopes=staging.scopes)

    @classmethod
    def saved(cls, plan: Plan, file: str) -> Staged:
        """The stages of the plan in a file."""
        return cls(f"saved plan {Path(file).name}: {len(plan.stages)} stages", f"--plan {file}", given=plan)


def tried_in_stages(study: Study, cluster: ClusterSpec, options: Options, staged: Staged) -> PipelineTried:
    """The pipeline that compile would run, played. Raises PlanError where the options cannot be met."""
    if options.zero and options.zero > 1:
        raise PlanError(
            f"--zero {options.zero} with stages is not there yet", fix="choose --zero 1, or leave out the stages"
        )
    choices = Choices(options.microbatches, 0, staged.given, options.schedule, degrees=study.degrees)
    plan, main = _planned(study, cluster, choices)
    plan = replace(plan, annotation=written(staged.scopes))
    cut = Cut(plan, main.stages[0], study.program, cluster)
    candidate = PipelineCandidate(study, cluster, cut, None, plan.microbatches, options.savings, pipeline=main)
    rows = candidate.copies
    name = staged.name or ", ".join(
        (f"as annotated: {len(plan.stages)} stages", *open_words(study.program, main.stages))
    )
    count = f"{plan.microbatches} microbatch{'es' if plan.microbatches > 1 else ''}"
    shares = f"shares {':'.join(map(str, rows))}" if 1 < len(rows) <= _FEW else ""
    parts = [name, shares, plan.schedule, count, *options.savings.words]
    own = [] if staged.given else [f"--schedule {plan.schedule}", f"--microbatches {plan.microbatches}"]
    text = " ".join([staged.flags, *own, *options.savings.flags]) if staged.flags else ""
    return PipelineTried(candidate, rows, ", ".join(filter(None, parts)), text, candidate.played(rows))


def saved_in_stages(best: PipelineTried, study: Study) -> Plan:
    """The plan for the whole model, as `study` has it."""
    candidate = best.candidate
    if study.program is candidate.study.program:
        return candidate.plan
    plan = candidate.plan
    choices = Choices(candidate.microbatches, plan.seed, None, plan.schedule, degrees=plan.degrees)
    return replace(_planned(study, candidate.cluster, choices)[0], annotation=plan.annotation)


def _planned(study: Study, cluster: ClusterSpec, choices: Choices) -> tuple[Plan, Pipeline]:
    """Devices go to stages by what these take in the whole model."""
    speeds = None if choices.plan is not None else tuple(cluster.speeds())
    places = tuple(range(len(cluster.devices)))
    return planned(study.program, cluster, places, choices, speeds=speeds, loads=study.loads)


_FEW = 8
"""Shares that are written out."""


def ways_out_of_stages(
    study: Study, cluster: ClusterSpec, options: Options, staged: Staged, best: PipelineTried
) -> tuple[str, ...]:
    """Options with which a pipeline that does not fit would: more microbatches, fewer in flight, then recomputation.

    Then a smaller batch, and last plain descent.
    """
    return tuple(islice(_ways(study, cluster, options, staged, best), 1))


def _ways(study: Study, cluster: ClusterSpec, options: Options, staged: Staged, best: PipelineTried) -> Iterator[str]:
    count, schedule, most = best.candidate.microbatches, best.candidate.plan.schedule, min(best.rows)
    more = [number for number in (2 * count, most) if count < number <= most]
    tries = [replace(options, microbatches=number) for number in dict.fromkeys(more)]
    if schedule in _MORE_IN_FLIGHT:
        tries += [replace(one, schedule=DEFAULT) for one in (options, *tries)]
    if options.recompute != "full":
        tries += [replace(one, recompute="full") for one in (options, *tries)]
    yield from _fitting(study, cluster, tries, staged, schedule)
    rows = largest_batch(best)
    if rows:
        yield f"{_flags(staged, best, schedule)} --batch-size {rows}".strip()
    plain = replace(study, optimizer="sgd", cuts={})
    yield from (f"{f} --optimizer sgd" for f in _fitting(plain, cluster, [options, *tries], staged, schedule))


def _fitting(
    study: Study, cluster: ClusterSpec, tries: Sequence[Options], staged: Staged, schedule: str
) -> Iterator[str]:
    """The flags of those options with which it fits; `schedule` is what it has without them."""
    for one in tries:
        with suppress(PlanError):
            tried = tried_in_stages(study, cluster, one, staged)
            if tried.verdict != "no":
                yield _flags(staged, tried, schedule)


_MORE_IN_FLIGHT = ("gpipe", "zero-bubble")
"""Schedules that hold more microbatches at a time than 1F1B does."""


def _flags(staged: Staged, tried: PipelineTried, before: str) -> str:
    """What forces a pipeline, in place of one with the schedule `before`."""
    schedule = tried.candidate.plan.schedule
    own = [] if schedule == before else [f"--schedule {schedule}"]
    count = f"--microbatches {tried.candidate.microbatches}"
    return " ".join([*filter(None, [staged.flags]), *own, count, *tried.candidate.savings.flags])


def stages_of(best: PipelineTried) -> tuple[StageForecast, ...]:
    """What each stage holds, how long it takes for a microbatch, and what it sends."""
    candidate = best.candidate
    assert isinstance(candidate, PipelineCandidate)
    return tuple(_stage(best, candidate, k) for k in range(len(candidate.plan.stages)))


def _stage(best: PipelineTried, candidate: PipelineCandidate, k: int) -> StageForecast:
    ranks = tuple(sorted(candidate.plan.stages[k].rank_of))
    computes = [action for action in candidate.actions[ranks[0]] if action.stage == k and action.op in COMPUTES]
    seconds: dict[Op, float] = {"F": 0.0, "B": 0.0, "I": 0.0, "W": 0.0}
    for action in computes:
        seconds[action.op] = max(seconds[action.op], candidate.seconds(action))
    flops = sum(
        event.flops * times
        for rank in ranks
        for action in computes
        if action.op == "F"
        for event, times in candidate.acts_of(rank).acts[candidate.stand_in(action)].weighted
    )
    sends = [action for action in candidate.actions[ranks[0]] if action.stage == k and action.op in SENDS]
    names = [name for name, owner in candidate.owners.items() if owner == k]
    return StageForecast(
        k,
        ranks,
        tuple(candidate.modules_of(k)),
        sum(candidate.sizes[name] for name in names),
        float(flops),
        tuple(candidate.device(rank).type for rank in ranks),
        seconds["F"],
        seconds["B"] + seconds["I"] + seconds["W"],
        sum(sum(candidate.messages(candidate.stand_in(send)).values()) for send in sends),
        max(best.peak(rank) for rank in ranks),
    )
