"""What compile runs where annotations say nothing, or leave something open: the best way that is found."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from whalepy.dryrun.annotated import Settled
from whalepy.dryrun.blocks import folded
from whalepy.dryrun.chosen import Ways, choices_of, name_of, scopes_for, surveyed
from whalepy.dryrun.degrees import open_words
from whalepy.dryrun.forced import Forced
from whalepy.dryrun.pipeline import PipelineCandidate
from whalepy.dryrun.progress import Progress
from whalepy.dryrun.rehearse import OPTIMIZERS
from whalepy.dryrun.settled import settled
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options
from whalepy.errors import WhaleError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.annotation import Chosen, written
from whalepy.planner.search import Choice
from whalepy.program.analysis import Program
from whalepy.program.taskgraphs import stages_in
from whalepy.runtime.arguments import Arguments
from whalepy.runtime.build import Recipe
from whalepy.runtime.planning import Choices

_WORTH_IT = 0.8
"""Another way is taken only where it is expected to take less than this part of the time of all devices side by side:
that way is known best, and forecasts are off by more than a few per cent."""


def chosen_for(
    recipe: Recipe,
    program: Program,
    cluster: ClusterSpec,
    example: Arguments,
    choices: Choices,
    optimizer: str,
    progress: Progress = lambda text: None,
) -> Chosen | None:
    """Annotations for a model without any; none where every device with its default share of the rows is as good.

    For a model that has them: what they leave open; none where the rules are as good.
    `program`: as it was captured for the example.
    """
    annotated = any(op.scope for op in program.operators)
    try:
        with _studied(recipe, program, example, optimizer) as study:
            if annotated:
                return _settled(study, cluster, choices, progress)
            progress(f"looking for the best way to use {len(cluster.devices)} devices")
            found = _found(study, cluster, choices)
        return None if found is None else _played(study, *found, progress)  # the model is whole again
    except Exception as error:  # training goes on without: an unusual program is no reason to refuse it
        what = error.what if isinstance(error, WhaleError) else f"{type(error).__name__}: {error}"
        plain = "as the annotations say" if annotated else "all devices side by side"
        return Chosen(f"no other way was looked for than {plain}: {what}")
    finally:
        progress("")


def _settled(study: Study, cluster: ClusterSpec, choices: Choices, progress: Progress) -> Chosen | None:
    """What annotations leave open; none where all devices, microbatches and schedule by rule are as good."""
    free = Options(microbatches=choices.microbatches, schedule=choices.schedule, zero=0, recompute="none")
    found = settled(study, cluster, free, progress)
    notes = [*_on_degrees(found), *_on_time(found)]
    if found.best is None or not notes:
        return None
    best = found.best.candidate
    in_time = (best.microbatches, best.plan.schedule) if found.by_rule is not found.best else (None, None)
    return Chosen("; ".join(notes), (), *in_time, found.study.degrees)


def _on_degrees(found: Settled) -> Iterator[str]:
    first, plain = found.by_rule or found.best, found.plain
    if first is not None and found.study.degrees:
        candidate = first.candidate
        stages = candidate.stages if isinstance(candidate, PipelineCandidate) else (candidate.main,)
        named = ", ".join(open_words(found.study.program, stages))
        gain = "" if plain is None else f", expected to take {first.step_s / plain.step_s:.0%} of the time of all"
        yield f"{named}: chosen for the degrees that annotations leave open{gain}"


def _on_time(found: Settled) -> Iterator[str]:
    best, rule = found.best, found.by_rule
    if best is not None and rule is not None and best is not rule:
        named, before = (f"{one.candidate.plan.schedule} in {one.candidate.microbatches}" for one in (best, rule))
        why = f"expected to take {best.step_s / rule.step_s:.0%} of the time of {before}"
        why = why if rule.verdict != "no" else f"as {before} does not fit"
        yield f"{named} microbatches: chosen as none are asked for, {why}"


@contextmanager
def _studied(recipe: Recipe, program: Program, example: Arguments, optimizer: str) -> Generator[Study]:
    """The study of a model, without most of its blocks where they stand for all."""
    known = optimizer if optimizer in OPTIMIZERS else "adamw"
    with folded(recipe.model) as blocks:
        study = None
        if blocks.folds and not stages_in(program):
            try:
                study = Study.on(recipe, example, known, blocks)
            except Exception:  # a model that counts its blocks
                study = None
        if study is not None and blocks.stand_for_all(study.program.nodes):
            yield study
            return
    with folded(recipe.model, fold=False) as blocks:
        yield Study.captured(recipe, example, program, known, blocks)


def _found(study: Study, cluster: ClusterSpec, choices: Choices) -> tuple[Ways, str] | None:
    """The best ways that are expected, and why they are taken; None where nothing fits."""
    found = surveyed(study, cluster)
    count = len(cluster.devices)
    free = Options(microbatches=choices.microbatches, schedule=choices.schedule, zero=0, recompute="none")
    plain = choices_of(found, cluster, replace(free, stages=1, split=1, replicate=count, schedule=None))
    side_by_side = plain[0] if plain and plain[0].filled <= 1 else None
    best = choices_of(found, cluster, free)
    if side_by_side is not None and (not best or best[0].step_s > _WORTH_IT * side_by_side.step_s):
        return Ways(found, (side_by_side,), cluster, free), "with the rows that each device has time for"
    if not best:
        return None
    in_stages = len(best[0].sizes) > 1
    alike = tuple(choice for choice in best if (len(choice.sizes) > 1) == in_stages)
    return Ways(found, alike, cluster, free), _why(side_by_side, best[0], fewer=study.rows < count)


def _played(study: Study, ways: Ways, why: str, progress: Progress) -> Chosen | None:
    """The best of these ways, of stages what is fastest when played, as in a dry run.

    None where it is what an empty annotation does.
    """
    choice, schedule = ways.choices[0], None
    if len(choice.sizes) > 1 and study.blocks.paths:
        ways, choice, _ = Forced(study, ways.options).fastest(ways, progress)
        schedule = ways.options.schedule
    cluster = ways.cluster
    count, speeds = len(cluster.devices), cluster.speeds()
    own = [sum(speeds[d] for d in unit.devices) for unit in choice.groups[0]]
    whole = len(choice.sizes) == 1 and choice.copies == count
    if whole and choice.microbatches == 1 and _are_default(choice.shares, own):
        return None
    idle = sorted(set(range(count)) - {d for group in choice.groups for unit in group for d in unit.devices})
    named = f"device{'s' if len(idle) > 1 else ''} {', '.join(map(str, idle))}"
    left = f"; without {named}, which would not help the others" if idle else ""
    note = f"{name_of(choice)}: chosen for a model without annotations, {why}{left}"
    return Chosen(note, written(scopes_for(ways.found, choice, count)), choice.microbatches, schedule)


def _are_default(shares: Sequence[float], speeds: Sequence[float]) -> bool:
    """Whether devices get rows by their speeds, as they do where nothing is said."""
    return [share * max(speeds) for share in shares] == [speed * max(shares) for speed in speeds]


def _why(plain: Choice | None, best: Choice, *, fewer: bool) -> str:
    if fewer:
        return "as there are fewer rows than devices"
    if plain is None:
        return "as it does not fit whole on every device"
    return f"expected to take {best.step_s / plain.step_s:.0%} of the time of all devices side by side"
