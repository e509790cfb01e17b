"""The answer of a dry run: the plan chosen for a model and a cluster, what it would do, and what else was tried."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain

from torch import nn

from whalepy.dryrun.annotated import Settled
from whalepy.dryrun.beyond import adds, adds_in_stages, modules_of
from whalepy.dryrun.ladder import AS_ANNOTATED, Strategy, fits, in_microbatches, with_savings, with_shares
from whalepy.dryrun.links import link_text, links_of
from whalepy.dryrun.pipeline import PipelineTried
from whalepy.dryrun.progress import Progress
from whalepy.dryrun.recompute import RECOMPUTE
from whalepy.dryrun.room import largest_batch, longest_sequence
from whalepy.dryrun.search import tried_in_order, what_would_fit
from whalepy.dryrun.settled import is_worth_it, settled
from whalepy.dryrun.shares import equal_rows
from whalepy.dryrun.staged import Staged, stages_of, tried_in_stages, ways_out_of_stages
from whalepy.dryrun.strategies import (
    annotation_text,
    fastest_of,
    is_free,
    kind_named,
    levels_of,
    parts_of,
    strategies,
    types_of,
)
from whalepy.dryrun.study import Candidate, Study
from whalepy.dryrun.tried import Options, Tried
from whalepy.errors import PlanError, WhaleError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.annotation import written
from whalepy.planner.cost import LINK_EFFICIENCY
from whalepy.planner.forecast import (
    Alternative,
    Breakdown,
    DeviceForecast,
    Forecast,
    Held,
    Span,
    StageForecast,
    Subject,
)
from whalepy.planner.plan import Plan
from whalepy.planner.timeline import WAITING, RankTrack


def answer(
    study: Study,
    model: nn.Module,
    cluster: ClusterSpec,
    options: Options,
    subject: Subject,
    progress: Progress,
    given: Tried | None = None,
) -> tuple[Forecast, Tried]:
    """The best plan under the options, or the one that is given, and its forecast.

    Raises PlanError where the options cannot be met.
    """
    wanted = strategies(model, cluster, options, study.rows) if given is None else []
    left_open = settled(study, cluster, options, progress) if AS_ANNOTATED in wanted else Settled(study)
    study = left_open.study
    own, left_out = tried_in_order(study, cluster, wanted, options, progress) if given is None else ([given], [])
    if not own:
        in_microbatches(study, cluster, wanted[0], options, options.savings)  # says why
        raise PlanError("no strategy fits these options", fix="give degrees whose product is the number of devices")
    others: list[Tried] = []
    if options.saves_freely and own[0].verdict == "no" and (options.beyond or not fits(own)):
        saving = chain.from_iterable(with_savings(study, cluster, wanted, options, progress))
        if fits(own):  # told where they would be faster: the runtime does not execute them yet
            fastest = min(one.step_s for one in own if one.verdict != "no")
            others += (one for one in saving if one.verdict != "no" and one.step_s < fastest)
        else:
            own += saving
    best = min(own, key=lambda t: t.order)
    for part, name in parts_of(cluster) if given is None and is_free(model, options) else ():
        progress(f"{name} alone")
        others += _alone(study, part, name, options, best, progress)
    if best.verdict == "no":  # better on some of the devices than not at all
        best = min([best, *others], key=lambda t: t.order)
    ways = what_would_fit(study, cluster, wanted, options, own, progress) if best.verdict == "no" else ()
    baseline = _equal(study, best, [t for t in (*own, *others) if t.candidate.cluster is best.candidate.cluster])
    ranked = [best, *sorted((t for t in (*own, *others, *left_open.others) if t is not best), key=lambda t: t.order)]
    some = any(best is tried for tried in others)
    more = (*_idle(best, cluster, of_types=some), *_not_tried(left_out))
    added = adds(best) if options.beyond else dict.fromkeys(best.ranks)
    return _with_room(forecast_of(study, best, baseline, ranked, subject, ways, more, added), best, options), best


def _with_room(forecast: Forecast, best: Tried, options: Options) -> Forecast:
    """The forecast with how far batch and sequence may grow, where that is wanted."""
    if not options.beyond:
        return forecast
    longest = longest_sequence(best, forecast.subject.tokens)
    return replace(forecast, largest_batch=largest_batch(best), longest_sequence=longest)


def _alone(
    study: Study, part: ClusterSpec, name: str, options: Options, best: Tried, progress: Progress
) -> list[Tried]:
    """Some of the devices without the others: as the best plan for all works, or in any way that fits if none does."""
    strategy, free = (levels_of(len(part.devices), 1), f"{name} alone", ""), replace(options, shares=None)
    try:
        if best.verdict != "no":
            return with_shares(study, part, strategy, free, best.candidate.microbatches, best.candidate.savings)
        found = in_microbatches(study, part, strategy, free, free.savings)
        if free.saves_freely and not fits(found):
            found += chain.from_iterable(with_savings(study, part, [strategy], free, progress))
    except WhaleError:  # fewer rows than devices, or figures that are not there
        return []
    return found


def answer_in_stages(
    study: Study, cluster: ClusterSpec, options: Options, subject: Subject, progress: Progress, staged: Staged
) -> tuple[Forecast, PipelineTried]:
    """The forecast of a model in stages, beside the same devices with the whole model on each.

    Raises PlanError where the options cannot be met.
    """
    progress(staged.name or "stages")
    left_open = Settled(study) if staged.flags else settled(study, cluster, options, progress)
    study = left_open.study
    best = left_open.best or tried_in_stages(study, cluster, options, staged)
    assert isinstance(best, PipelineTried)
    ways: tuple[str, ...] = ()
    if best.verdict == "no":
        ways = ways_out_of_stages(study, cluster, options, staged, best)
    others: list[Tried] = list(left_open.others)
    if "zero-bubble" not in {one.candidate.plan.schedule for one in (best, *others, *staged.others)}:
        for other in _scheduled_otherwise(study, cluster, options, staged, best, progress):
            first = bool(staged.flags) and cluster.on_gpus and is_worth_it(other, best)
            best, left = (other, best) if first else (best, other)
            others.append(left)
    added = dict[int, float | None].fromkeys(best.ranks)
    if options.beyond and not staged.flags:  # stages of the user's own; those that are forced are cut anew
        progress("without a device")
        same = replace(options, microbatches=best.candidate.microbatches, schedule=best.candidate.plan.schedule)
        added = adds_in_stages(best, lambda others: tried_in_stages(study, others, same, staged))
    baselines = staged.baselines
    if baselines is None:
        progress("the whole model on every device")
        baselines = replicated(study, cluster, options)  # last: it takes the stages off the graph
    played = (*others, *staged.others, *baselines)
    ranked = [best, *(other for other in played if other.verdict != "no")]
    more = _without_work(best)
    made = forecast_of(study, best, next(iter(baselines), best), ranked, subject, ways, more, added)
    return _with_room(replace(made, annotations=staged.annotations), best, options), best


def _scheduled_otherwise(
    study: Study, cluster: ClusterSpec, options: Options, staged: Staged, best: PipelineTried, progress: Progress
) -> Iterator[PipelineTried]:
    """The same stages with the weight gradients apart, where no schedule is asked for; it holds more in memory."""
    if not options.beyond or options.schedule is not None or staged.given is not None or best.verdict == "no":
        return
    progress("zero-bubble")
    with suppress(WhaleError):
        count = best.candidate.microbatches
        yield tried_in_stages(study, cluster, replace(options, schedule="zero-bubble", microbatches=count), staged)


def replicated(study: Study, cluster: ClusterSpec, options: Options) -> tuple[Tried, ...]:
    """The whole model on every device with equal rows, as DistributedDataParallel; none where that cannot be."""
    count = len(cluster.devices)
    strategy = levels_of(count, 1), f"replicate {count}", ""
    equal = replace(options, shares="equal", microbatches=None)
    try:
        tried = with_shares(study, cluster, strategy, equal, 1, options.savings)
    except WhaleError:  # fewer rows than devices
        return ()
    return tuple(sorted(tried, key=lambda one: one.order)[:1])


def _without_work(best: PipelineTried) -> tuple[str, ...]:
    idle = best.candidate.plan.idle
    return (f"idle: ranks {', '.join(map(str, idle))}, for which no stage has work",) if idle else ()


def _equal(study: Study, best: Tried, tried: Sequence[Tried]) -> Tried:
    """The same cluster with equal shares and no split, as DistributedDataParallel would use it."""
    rows = equal_rows(study.rows, len(best.candidate.cluster.devices))
    alike = best.candidate.savings, best.candidate.microbatches
    for other in tried:
        if other.rows == rows and (other.candidate.savings, other.candidate.microbatches) == alike:
            return other
    cluster = best.candidate.cluster
    levels = None if best.candidate.levels is None else levels_of(len(cluster.devices), 1)
    count = min(best.candidate.microbatches, max(rows))
    try:
        candidate = study.candidate(levels, cluster, cluster.speeds(), count, best.candidate.savings)
    except PlanError:  # fewer rows than devices
        return best
    rows = equal_rows(study.rows, candidate.replicas)
    return Tried(candidate, rows, "equal shares", "", candidate.played(rows))


def saved(best: Tried, study: Study) -> Plan:
    """The plan for the whole model, as `study` has it, with its rows as the weights of default shares."""
    found = best.candidate
    study = study.settled(found.study.degrees)
    candidate = study.candidate(found.levels, found.cluster, found.cluster.speeds(), found.microbatches)
    levels = written({"": candidate.levels}) if candidate.levels else ()
    weights = _weights(candidate, best.rows)
    if len(best.rows) == 1 or not any(weights):
        return replace(candidate.again(candidate.cluster.speeds()), annotation=levels)
    return replace(candidate.again([weight / max(weights) for weight in weights]), annotation=levels)


def _weights(candidate: Candidate, rows: Sequence[int]) -> list[float]:
    """By device, weights of which the sums over a replica are as its rows, and over replicas as the speeds there."""
    speeds, found = candidate.cluster.speeds(), [0.0] * len(candidate.cluster.devices)
    paces: dict[tuple[int, ...], float] = {}
    for rank, device in candidate.device_of.items():
        paces[candidate.inside(rank)] = paces.get(candidate.inside(rank), 0.0) + speeds[device]
    for rank, device in candidate.device_of.items():
        found[device] = rows[candidate.replica_of(rank)] * paces[candidate.inside(rank)]
    return found


def forecast_of(
    study: Study,
    best: Tried,
    baseline: Tried,
    ranked: Sequence[Tried],
    subject: Subject,
    ways: tuple[str, ...],
    more: Sequence[str],
    added: Mapping[int, float | None],
) -> Forecast:
    """The report of the best of some plans that were tried, `ranked` from best to worst.

    `added`: what each rank adds, where that is known.
    """
    played = best.played
    bottleneck = max(best.ranks, key=lambda rank: played.tracks[rank].busy_s)
    return Forecast(
        subject=subject,
        strategy=best.strategy,
        verdict=best.verdict,
        step_time_s=best.step_s,
        mfu=_mfu(best),
        equal_shares_step_time_s=baseline.step_s,
        bound=_bound(best, baseline),
        microbatches=best.candidate.microbatches,
        schedule=best.candidate.plan.schedule if isinstance(best, PipelineTried) else "none",
        bottleneck=bottleneck,
        tightest=best.tightest,
        devices=_devices(best, added),
        links=links_of(best),
        stages=stages_of(best) if isinstance(best, PipelineTried) else (_stage(best, subject),),
        breakdown=_breakdown(best, bottleneck),
        alternatives=tuple(_alternative(other) for other in ranked),
        assumptions=(*more, *best.candidate.cluster.assumptions, *_assumptions(best)),
        annotations=annotation_text(best.candidate.levels or ()),
        modules=modules_of(best),
        ways_out=ways,
        equal_shares_missing_bytes=baseline.missing,
        not_runnable=best.not_runnable,
        fidelity=FIDELITY if best.candidate.cluster.figures == "data sheet" and best.candidate.cluster.on_gpus else "",
    )


FIDELITY = "step times off by 7.9 % (mean), 61 % (worst) on 242 published runs, as of 2026-11-23"
"""Source: benchmarks/results/2026-11-23-fidelity.json; of devices whose figures are those of data sheets."""


def _assumptions(best: Tried) -> tuple[str, ...]:
    """What the times rest on beside the figures of the devices."""
    found = [f"long messages reach {LINK_EFFICIENCY:.0%} of the bandwidth of a link, unless it was measured"]
    candidate = best.candidate
    if candidate.overlaps and candidate.sharding.replicas > 1:
        found.append("gradients are reduced during the backward pass")
    if candidate.study.sizes_depend_on_values:
        found.append("sizes that depend on values are as large as they can be")
    if candidate.study.master:
        found.append("parameters, their gradients and optimizer state in float32, all else in the given precision")
    if candidate.savings.recompute != "none":
        found.append(f"recompute {candidate.savings.recompute}: {RECOMPUTE[candidate.savings.recompute]}")
    return tuple(found)


def _idle(best: Tried, cluster: ClusterSpec, *, of_types: bool) -> tuple[str, ...]:
    """The devices that a plan leaves out: for want of rows or, `of_types`, of memory, or as no scope takes them."""
    count = len(cluster.devices)
    if len(best.ranks) == count:
        return ()
    if len(best.candidate.cluster.devices) == count:
        used, why = set(best.candidate.device_of.values()), "outside all scopes"
    elif of_types:
        kinds = {kind_named(device) for device in best.candidate.cluster.devices}
        used, why = {d.index for d in cluster.devices if kind_named(d) in kinds}, "with which it does not fit"
    else:
        used, why = {d.index for d in fastest_of(cluster, len(best.ranks))}, "for want of rows in the batch"
    idle = [device for device in cluster.devices if device.index not in used]
    named = f"device {idle[0].index}" if len(idle) == 1 else f"{len(idle)} of {count} devices"
    return (f"idle: {named} ({types_of(idle)}), {why}",)


def _not_tried(left_out: Sequence[Strategy]) -> tuple[str, ...]:
    """What was left out of the search, and why."""
    if not left_out:
        return ()
    names = ", ".join(name for _, name, _ in left_out)
    return (f"not tried: {names}; two that split less already take over twice the time of the best",)


def _mfu(best: Tried) -> float:
    flops = sum(best.candidate.work(rank, best.rows_of(rank)).flops for rank in best.ranks)
    dtype = _dtype(best)
    devices = [best.candidate.cost(rank).device for rank in best.ranks]
    peak = sum(device.profile.sheet_rate(dtype) * device.speed for device in devices)
    return flops / (peak * best.step_s)


def _dtype(best: Tried) -> str:
    events = best.candidate.work(best.ranks[0], max(best.rows)).events
    return max(events, key=lambda event: event.flops).dtype


def _bound(best: Tried, baseline: Tried) -> float:
    """Perfect balance and nothing to wait for, over the step with equal shares."""
    return baseline.step_s / min(_balanced_s(best), _balanced_s(baseline))


def _balanced_s(tried: Tried) -> float:
    """Seconds in which the devices would do the work of all, each at its own pace, and nobody waits.

    Work is what it takes on one of the devices.
    """
    candidate, first = tried.candidate, tried.candidate.cost(tried.ranks[0])
    own = [(candidate.cost(rank), candidate.work(rank, tried.rows_of(rank))) for rank in tried.ranks]
    known: dict[tuple[int, int], tuple[float, float]] = {}
    for cost, work in own:
        if (id(cost), id(work)) not in known:
            known[id(cost), id(work)] = first.busy_s(work), first.busy_s(work) / cost.busy_s(work)
    pairs = [known[id(cost), id(work)] for cost, work in own]
    return sum(work for work, _ in pairs) / sum(pace for _, pace in pairs)


def _devices(best: Tried, added: Mapping[int, float | None]) -> tuple[DeviceForecast, ...]:
    """In rank order; those that do the same have their course over the step in common."""
    known: dict[Hashable, DeviceForecast] = {}
    found: list[DeviceForecast] = []
    for rank in best.ranks:
        device = best.candidate.device(rank)
        key = id(best.played.tracks[rank]), device.profile, device.memory_bytes, best.rows_of(rank)
        if key not in known:
            known[key] = _device(best, rank)
        place = best.candidate.coordinates[rank]
        found.append(replace(known[key], rank=rank, node=device.node, coordinates=place, adds=added[rank]))
    return tuple(found)


def _device(best: Tried, rank: int) -> DeviceForecast:
    candidate, track = best.candidate, best.played.tracks[rank]
    device = candidate.device(rank)
    return DeviceForecast(
        rank=rank,
        type=device.type,
        node=device.node,
        stage=candidate.plan.stages_of(rank)[0],
        coordinates=candidate.coordinates[rank],
        batch_share=best.rows_of(rank),
        peak_memory_bytes=best.peak(rank),
        memory_capacity_bytes=device.memory_bytes,
        busy_s=track.busy_s,
        held=_held(best, rank),
        memory=tuple((at, size + candidate.cost(rank).runtime_bytes) for at, size in _thinned(track.memory)),
        spans=_lane(track),
    )


def _lane(track: RankTrack) -> tuple[Span, ...]:
    """What a device does, with the collectives that run beside its operators."""
    own = [span for span in track.spans if span.name != WAITING] if track.beside else track.spans
    return tuple(sorted([*own, *track.beside], key=lambda span: (span.start_s, span.end_s)))


_POINTS = 200


def _thinned(points: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """At most so many points, the largest of each stretch."""
    step = max(len(points) // _POINTS, 1)
    return [max(points[k : k + step], key=lambda point: point[1]) for k in range(0, len(points), step)]


def _held(best: Tried, rank: int) -> tuple[Held, ...]:
    """What holds memory at the peak: gradients count as far as they exist by then."""
    work = best.candidate.work(rank, best.rows_of(rank))
    peak = work.peak_event
    fixed = {"parameters": work.parameters, "optimizer state": work.optimizer, "buffers": work.buffers}
    fixed["inputs"] = work.inputs
    fixed["runtime"] = best.candidate.cost(rank).runtime_bytes
    rest = work.peak - sum(fixed.values()) + fixed["runtime"]
    if peak.phase in ("gradient", "optimizer"):
        fixed["gradients"] = min(work.gradients, rest)
        fixed["buffers of reductions and updates"] = rest - fixed["gradients"]
    else:
        fixed["activations and gradients"] = rest
    held = [Held(name, size) for name, size in fixed.items() if size > 0]
    return tuple(sorted(held, key=lambda one: -one.bytes))


def _stage(best: Tried, subject: Subject) -> StageForecast:
    flops = sum(
        event.flops * times
        for rank in best.ranks
        for event, times in best.candidate.work(rank, best.rows_of(rank)).weighted
        if event.phase == "forward"
    )
    kinds = tuple(best.candidate.device(rank).type for rank in best.ranks)
    peak = best.peak(best.tightest)
    return StageForecast(0, best.ranks, ("",), subject.parameters, float(flops), kinds, peak_memory_bytes=peak)


def _breakdown(best: Tried, rank: int) -> Breakdown:
    track = best.played.tracks[rank]
    idle = best.step_s - track.busy_s - track.bridge_s - track.gradient_s
    return Breakdown(track.busy_s, max(idle, 0.0), track.bridge_s, track.gradient_s, track.gradient_total_s)


def _alternative(tried: Tried) -> Alternative:
    rank = tried.tightest
    return Alternative(
        strategy=tried.strategy,
        step_time_s=tried.step_s,
        verdict=tried.verdict,
        tightest=rank,
        peak_memory_bytes=tried.peak(rank),
        memory_capacity_bytes=tried.capacity(rank),
        missing_bytes=tried.missing,
        flags=tried.flags,
        not_runnable=tried.not_runnable,
    )


@dataclass(frozen=True)
class Sizes:
    """Elements of the whole model, and its type."""

    parameters: int
    trainable: int
    dtype: str


def sizes_of(model: nn.Module) -> Sizes:
    """Of a model, tied parameters once."""
    sizes = {id(p): p.numel() for p in model.parameters()}
    trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype.is_floating_point}
    return Sizes(sum(sizes.values()), sum(trained.values()), ", ".join(sorted(dtypes)) or "float32")


def subject_of(
    name: str, sizes: Sizes, study: Study, cluster: ClusterSpec, options: Options, sequence: int | None
) -> Subject:
    """What was asked, for the head of the reports."""
    groups: dict[tuple[str, int], int] = {}
    for device in cluster.devices:
        groups[device.type, device.memory_bytes] = groups.get((device.type, device.memory_bytes), 0) + 1
    return Subject(
        model=name,
        parameters=sizes.parameters,
        trainable=sizes.trainable,
        optimizer=options.optimizer,
        precision=options.precision or sizes.dtype,
        rows=study.rows,
        tokens=sequence,
        cluster=str(cluster),
        nodes=len(cluster.nodes),
        devices=tuple((count, kind, memory) for (kind, memory), count in groups.items()),
        link=link_text(cluster),
        figures=cluster.figures,
    )
