"""What is tried for a model and a cluster, in order, and what would fit where nothing does."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod

from whalepy.dryrun.beyond import ways_out
from whalepy.dryrun.ladder import Strategy, fits, in_microbatches, with_savings
from whalepy.dryrun.progress import Progress
from whalepy.dryrun.strategies import fastest_of, levels_of, line_of, only, strategies, times_as_many, types_of
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options, Tried
from whalepy.errors import AnnotationError, PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.shares import round_shares


def tried_in_order(
    study: Study, cluster: ClusterSpec, wanted: Sequence[Strategy], options: Options, progress: Progress
) -> tuple[list[Tried], list[Strategy]]:
    """The strategies in order, and those left out: from where two in a row take over twice the time of one before.

    Where some device is too slow for a row of the batch, or rows are fewer than devices, the others are tried first.
    """
    found = _on_fewer(study, cluster, options, progress) if any(levels for levels, *_ in wanted) else []
    slower = 0
    for k, strategy in enumerate(wanted):
        tried = _without_savings(study, cluster, strategy, options, progress)
        if _is_far_slower(tried, found):
            slower += 1
        elif tried:
            slower = 0
        found += tried
        if slower == 2:
            return found, list(wanted[k + 1 :])
    return found, []


def _on_fewer(study: Study, cluster: ClusterSpec, options: Options, progress: Progress) -> list[Tried]:
    """Of the fastest devices as many as get a row by their speed, without the others; not where degrees are forced."""
    forced = options.replicate or options.split or options.shares or options.balance != "exact"
    fed = sum(rows > 0 for rows in round_shares(study.rows, cluster.speeds()))
    if fed == len(cluster.devices) or forced:
        return []
    devices = fastest_of(cluster, fed)
    part = only(cluster, {device.index for device in devices})
    strategy = levels_of(fed, 1), f"{types_of(devices)} alone", ""
    return _without_savings(study, part, strategy, options, progress)


def _is_far_slower(tried: Sequence[Tried], before: Sequence[Tried]) -> bool:
    fitting = [one.step_s for one in before if one.verdict != "no"]
    return bool(tried and fitting) and min(one.step_s for one in tried) > 2 * min(fitting)


def what_would_fit(
    study: Study,
    cluster: ClusterSpec,
    wanted: Sequence[Strategy],
    options: Options,
    tried: Sequence[Tried],
    progress: Progress,
) -> tuple[str, ...]:
    """Flags that make it fit, cheapest first: other savings and microbatches than those that were forced, then less.

    Where none of that does: plain descent with whatever saves memory, or more of the same nodes.
    """
    free = replace(options, zero=None, recompute=None, microbatches=None)
    saved = [] if free == options else list(_fitting(study, cluster, wanted, free, progress))
    ranked = sorted(tried, key=lambda one: one.order)
    less = ways_out(ranked, shares_forced=options.shares is not None or options.balance != "exact")
    return (*saved, *less) or tuple(_at_last(study, cluster, wanted, free, progress))


_TIMES = (2, 4, 8, 16, 32, 64)
"""How many times the devices are tried."""


def _at_last(
    study: Study, cluster: ClusterSpec, wanted: Sequence[Strategy], free: Options, progress: Progress
) -> Iterator[str]:
    if not wanted:  # a saved plan: it is for these devices
        return
    plain, memory = replace(study, optimizer="sgd", cuts={}), sum(device.memory_bytes for device in cluster.devices)
    if _least_bytes(plain) <= memory:
        yield from (f"{flags} --optimizer sgd" for flags in _fitting(plain, cluster, wanted, free, progress))
    free = replace(free, replicate=None, split=None, shares=None)
    for times in (times for times in _TIMES if _least_bytes(study) <= times * memory):
        more = times_as_many(cluster, times)
        line = line_of(more)
        if line is None:
            return
        progress(line)
        wanted = _inside_nodes(strategies(study.recipe.model, more, free, study.rows), more)
        for flags in _fitting(study, more, wanted, free, progress):
            yield f"--cluster {shlex.quote(line)} {flags}"
            return


def _least_bytes(study: Study) -> int:
    """What parameters, their gradients and the optimizer's state take at least, however they are cut."""
    trained = 4 if study.optimizer in ("adam", "adamw") else 2
    named = study.recipe.model.named_parameters()
    sizes = (p.nbytes * (trained if p.requires_grad else 1) * study.blocks.repeats(name) for name, p in named)
    return round(sum(sizes))


def _inside_nodes(wanted: Sequence[Strategy], cluster: ClusterSpec) -> list[Strategy]:
    """Those that split nothing, and those that split over all devices of a node."""
    inside = min(len(node.devices) for node in cluster.nodes)
    most = max((degree for degree in map(_split_by, wanted) if degree <= inside), default=1)
    return [one for one in wanted if _split_by(one) in (1, most)]


def _split_by(strategy: Strategy) -> int:
    """Over how many devices a strategy splits the model."""
    return prod(level.degree or 1 for level in strategy[0] or () if level.kind == "split")


def _fitting(
    study: Study, cluster: ClusterSpec, wanted: Sequence[Strategy], free: Options, progress: Progress
) -> Iterator[str]:
    """The flags of the best that fits, if anything does: as it is, else with some savings of memory."""
    room, least = min(device.memory_bytes for device in cluster.devices), _least_bytes(study)
    small = [one for one in wanted if least <= room * _split_by(one) or not one[0]]
    found = [one for strategy in small for one in _without_savings(study, cluster, strategy, free, progress)]
    if not fits(found):
        found = next(with_savings(study, cluster, wanted, free, progress))
    own = (one for one in found if one.verdict != "no" and (one.flags or one.candidate.levels is None))
    yield from (_complete(one) for one in sorted(own, key=lambda one: one.order)[:1])


def _complete(tried: Tried) -> str:
    """The flags of a plan with those that undo what was forced."""
    savings, count = tried.candidate.savings, tried.candidate.microbatches
    missing = [f"--zero {savings.zero}"] if not savings.zero else []
    missing += ["--recompute none"] if savings.recompute == "none" else []
    missing += ["--microbatches 1"] if count == 1 else []
    return " ".join([tried.flags, *missing]).strip()


def _without_savings(
    study: Study, cluster: ClusterSpec, strategy: Strategy, options: Options, progress: Progress
) -> list[Tried]:
    progress(strategy[1])
    try:
        return in_microbatches(study, cluster, strategy, options, options.savings)
    except (AnnotationError, PlanError):  # an axis that is too short, or too few rows for devices that are so slow
        if options.split is not None or options.replicate is not None or options.shares is not None:
            raise
        return []
