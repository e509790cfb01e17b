"""What annotations and options leave open, settled by forecasts: degrees, then microbatches, then the schedule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from whalepy.dryrun.annotated import Settled, with_best_degrees
from whalepy.dryrun.progress import Progress
from whalepy.dryrun.staged import Staged, tried_in_stages
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options, Tried
from whalepy.errors import WhaleError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.program.taskgraphs import stages_in


def settled(study: Study, cluster: ClusterSpec, options: Options, progress: Progress) -> Settled:
    """The model with what is expected to take least, each as the others stand.

    Microbatches and schedule are those of a model in stages: half as many as by rule, or twice, as long as that gains,
    but not fewer than groups of devices, which would wait for each other; then weight gradients apart. On cards alone:
    what a CPU spends on each further microbatch, and on noting down what waits, is more than its forecast has.
    """
    found = with_best_degrees(study, cluster, options, progress)
    if not stages_in(study.program) or not cluster.on_gpus:
        return found
    study = found.study
    by_rule = found.best or tried_in_stages(study, cluster, options, Staged())
    if by_rule.candidate.microbatches == 1:
        return replace(found, best=by_rule, by_rule=by_rule)
    played: list[Tried] = [by_rule]

    def other(now: Tried, number: int, schedule: str) -> Tried:
        """With that, where it is worth it; else as it is now."""
        progress(f"{number} microbatches, {schedule}")
        with suppress(WhaleError):
            choice = replace(options, microbatches=number, schedule=schedule)
            played.append(tried_in_stages(study, cluster, choice, Staged()))
            return played[-1] if is_worth_it(played[-1], now) else now
        return now

    best = by_rule
    if options.microbatches is None:
        best = _in_microbatches(best, other)
    if options.schedule is None:
        best = other(best, best.candidate.microbatches, "zero-bubble")
    best = best if best.verdict != "no" else by_rule
    left = [one for one in played if one is not best]
    return replace(found, best=best, by_rule=by_rule, others=(*left, *found.others))


def _in_microbatches(best: Tried, other: Callable[[Tried, int, str], Tried]) -> Tried:
    """With half as many, or else twice, as long as that gains."""
    first, plan = best, best.candidate.plan
    most = min(rows for rows in best.rows if rows)
    for times in (0.5, 2):
        before = None
        while before is not best and len(plan.hosts) <= best.candidate.microbatches * times <= most:
            before, best = best, other(best, int(best.candidate.microbatches * times), plan.schedule)
        if best is not first:
            break
    return best


_WORTH_IT = 0.95
"""Another number, or schedule, is taken for what it is expected to gain by more than this."""


def is_worth_it(other: Tried, now: Tried) -> bool:
    """Whether to take another number of microbatches, or schedule: what fits is not given up for a tight one."""
    if now.verdict == "no":
        return other.order < now.order
    return other.verdict in {"fits", now.verdict} and other.step_s < _WORTH_IT * now.step_s
