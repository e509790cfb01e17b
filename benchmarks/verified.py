"""What has to be true of a plan, whatever was asked: memory, rows, devices, time and the order of a schedule."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from benchmarks.drawn import Blocks
from whalepy.errors import WhaleError
from whalepy.hardware.cluster import ClusterSpec, Device
from whalepy.hardware.layer_profile import LayerEntry, LayerFile
from whalepy.planner.block_table import Way
from whalepy.planner.forecast import REPORT
from whalepy.planner.form import Limits, Width
from whalepy.planner.plan import Plan
from whalepy.planner.schedule.actions import SENDS, Action, Crossing, Lending, parse
from whalepy.planner.schedule.kinds import compute_actions
from whalepy.planner.schedule.lowering import lowered
from whalepy.planner.schedule.simulate import in_flight
from whalepy.planner.schedule.verify import verify
from whalepy.planner.search import Choice
from whalepy.planner.stage_cost import StageCosts
from whalepy.planner.unfold import Sharding
from whalepy.planner.units import kind_of

NEAR = 1e-6
"""Sums of floats in another order."""


def of_error(error: WhaleError) -> Iterator[str]:
    """A reason says what to change, and is none that only a mistake in the planner can cause."""
    if not error.fix:
        yield f"no fix: {error}"
    elif error.fix == REPORT:
        yield f"the planner says that it is wrong: {error}"


# -- a forecast, as `--json` writes it


def of_forecast(told: Mapping[str, Any], spec: ClusterSpec, rows: int) -> Iterator[str]:
    """What is wrong with a forecast for a batch of so many rows on a cluster."""
    devices, fits = told["devices"], told["verdict"] != "no"
    yield from _of_memory(told, fits)
    yield from _of_devices(told, spec)
    groups = len({device["stage"] for device in devices})
    given, wanted = sum(device["batch_share"] for device in devices), rows * groups * _split(told["strategy"])
    if given != wanted:
        yield f"devices have {given} rows, not {wanted}: {told['strategy']}"
    step, parts = told["step_time_s"], told["breakdown"]
    if not (math.isfinite(step) and step > 0):
        yield f"a step takes {step} s"
    whole = sum(parts[name] for name in ("compute_s", "bubble_s", "bridge_s", "gradient_s"))
    if not math.isclose(whole, step, rel_tol=NEAR) or min(parts.values()) < 0:
        yield f"the parts of a step of {step} s make {whole} s: {parts}"
    if told["alternatives"][0]["step_time_s"] != step or told["alternatives"][0]["verdict"] != told["verdict"]:
        yield "the first of the alternatives is not the plan"
    if not fits and any(other["verdict"] != "no" for other in told["alternatives"]):
        yield "nothing fits, and an alternative does"
    if fits and told["ways_out"]:
        yield "it fits, and there are ways out"


def _split(strategy: str) -> int:
    found = re.search(r"split (\d+)", strategy)
    return int(found[1]) if found else 1


def _of_memory(told: Mapping[str, Any], fits: bool) -> Iterator[str]:
    over = {d["rank"] for d in told["devices"] if d["peak_memory_bytes"] > d["memory_capacity_bytes"]}
    if fits == bool(over):
        yield f"the verdict is {told['verdict']}, over their memory are {sorted(over)}"
    if {one["rank"] for one in told["missing_bytes"]} != over:
        yield f"memory is missing on {told['missing_bytes']}, over their memory are {sorted(over)}"
    for device in told["devices"]:
        held = sum(one["bytes"] for one in device["held"])
        if held != device["peak_memory_bytes"] or any(one["bytes"] < 0 for one in device["held"]):
            yield f"device {device['rank']} holds {held} bytes in parts and {device['peak_memory_bytes']} in all"


def _of_devices(told: Mapping[str, Any], spec: ClusterSpec) -> Iterator[str]:
    """Each device once, and the idle ones named."""
    ranks = [device["rank"] for device in told["devices"]]
    if len(set(ranks)) != len(ranks) or len(ranks) > len(spec.devices):
        yield f"ranks {ranks} on {len(spec.devices)} devices"
    used = Counter((d["type"], d["memory_capacity_bytes"]) for d in told["devices"])
    if used - Counter((d.type, d.memory_bytes) for d in spec.devices):
        yield f"{used} are used, which the cluster does not have"
    idle = [said for said in told["assumptions"] if said.startswith("idle: ")]
    if (len(ranks) < len(spec.devices)) != bool(idle):
        yield f"{len(ranks)} of {len(spec.devices)} devices are used, but it says {idle}"


def of_layers(told: Mapping[str, Any], file: LayerFile, spec: ClusterSpec) -> Iterator[str]:
    """No step is faster than all products at the peaks of all devices that are used."""
    split, used = _split(told["strategy"]), {(d["type"], d["memory_capacity_bytes"]) for d in told["devices"]}
    flops = sum(_flops(layer, split) for layer in file.layers)
    rates: dict[tuple[str, int], float] = {}
    for device in spec.devices if flops else ():
        if (kind := (device.type, device.memory_bytes)) in used:  # others may have no units for this type
            rates[kind] = max(rates.get(kind, 0.0), device.rate(file.dtype))
    peaks = [rates[d["type"], d["memory_capacity_bytes"]] for d in told["devices"]] if flops else [1.0]
    least = sum(device["batch_share"] for device in told["devices"]) * flops / sum(peaks)
    if told["step_time_s"] < least * (1 - NEAR):
        yield f"a step takes {told['step_time_s']} s, all products alone {least} s"
    if not any(layer.seconds for layer in file.layers) and told["mfu"] > 1 + NEAR:
        yield f"{told['mfu']:.0%} of the peak"


def _flops(layer: LayerEntry, split: int) -> float:
    """Per row, of one device of a split; what was measured may be faster than any peak."""
    if layer.seconds:
        return 0.0
    each = layer.on(layer.flops, split) or 0.0
    return 3 * layer.repeat * each / (split if layer.split == "rows" else 1)


def of_plan(plan: Plan) -> Iterator[str]:
    """The actions of all groups of a plan in stages, as its programs print them, are a schedule that ends."""
    firsts = [min(plan.stages[own[0]].rank_of) for own in plan.hosts]
    ranks = [rank for own in plan.hosts for rank in plan.stages[own[0]].rank_of]
    if len(set(ranks)) != len(ranks) or {*ranks, *plan.idle} != set(range(plan.devices)):
        yield f"groups have ranks {ranks}, idle are {plan.idle}, of {plan.devices}"
    groups = [_actions(str(plan.program(rank))) for rank in firsts]
    yield from _of_schedule(groups, plan.hosts, plan.microbatches)


def _actions(program: str) -> list[Action]:
    found = re.search(r"actions of a step: (.*)", program)
    return [] if found is None else [parse(word) for word in found[1].split()]


def _of_schedule(actions: Sequence[Sequence[Action]], hosts: Sequence[Sequence[int]], count: int) -> Iterator[str]:
    sends = {action for own in actions for action in own if action.op in SENDS and action.peer is not None}
    back = {(a.peer, a.stage) for a in sends if a.op == "SEND_B"}
    forward = {(a.stage, a.peer) for a in sends if a.op == "SEND_F"}
    lent = {(a.stage, a.peer) for a in sends if a.op == "SEND_P"}
    home = {(a.peer, a.stage) for a in sends if a.op == "SEND_G"}
    crossings = [Crossing(a, b or 0, (a, b) in back) for a, b in sorted(forward)]
    lendings = [Lending(a, b or 0, (a, b) in home) for a, b in sorted(lent)]
    try:
        verify(actions, hosts, crossings, lendings, count)
    except WhaleError as error:
        yield f"the schedule of {len(hosts)} groups: {error}"


# -- what a search finds


def of_choices(found: Sequence[Choice], table: Blocks, spec: ClusterSpec, limits: Limits) -> Iterator[str]:
    """What is wrong with the choices of a search."""
    steps = [choice.step_s for choice in found]
    if steps != sorted(steps):
        yield f"choices are not in order: {steps}"
    for choice in found:
        yield from _of_form(choice, table, spec, limits)
        yield from _of_limits(choice, limits)
        least = table.flops / sum(spec.devices[k].rate(table.dtype) for k in _devices(choice))
        if not (math.isfinite(choice.step_s) and choice.step_s >= least * (1 - 1e-3)):
            yield f"a step takes {choice.step_s} s, all products alone {least} s"
        yield from _of_held(choice, table, spec, limits)


def _devices(choice: Choice) -> list[int]:
    return [device for group in choice.groups for unit in group for device in unit.devices]


def _of_form(choice: Choice, table: Blocks, spec: ClusterSpec, limits: Limits) -> Iterator[str]:
    used = _devices(choice)
    if len(set(used)) != len(used) or choice.devices != len(used):
        yield f"devices {used} are used twice, or counted wrongly"
    for unit in (unit for group in choice.groups for unit in group):
        own = [spec.devices[k] for k in unit.devices]
        if len({(kind_of(one), one.node) for one in own}) > 1:
            yield f"unit {unit} is not of like devices of one node"
    if sum(choice.sizes) != len(table.order) or min(choice.sizes) < 1:
        yield f"stages of {choice.sizes} blocks of {len(table.order)}"
    if sum(choice.rows) != table.rows or min(choice.rows) < 1:
        yield f"copies have rows {choice.rows} of {table.rows}"
    units = {len(group) for group in choice.groups}
    alike = units == {len(choice.rows)}
    parts = choice.copies == 1 and all(len({unit.kind for unit in group}) == 1 for group in choice.groups)
    if not (alike or parts) or len(choice.groups) * limits.chunks != len(choice.sizes):
        yield f"{len(choice.groups)} groups of {units} units for {len(choice.sizes)} stages in {choice.copies} copies"
    if any(len({len(unit.devices) for unit in group}) > 1 for group in choice.groups):
        yield f"units of one stage are split over unlike numbers of devices: {choice.groups}"
    most = max(width.replicate for width in choice.widths)
    if len(choice.sizes) > 1 and choice.microbatches * most > min(choice.rows):
        yield f"{choice.microbatches} microbatches of rows {choice.rows}, in {most} parts"


def _of_limits(choice: Choice, limits: Limits) -> Iterator[str]:
    asked = (limits.stages, limits.replicate, limits.split, limits.microbatches)
    got = (len(choice.sizes), choice.copies, choice.split, choice.microbatches)
    if any(want is not None and want != have for want, have in zip(asked, got, strict=True)):
        yield f"{asked} was asked for, {got} is the choice"
    if limits.widths is not None and choice.widths != limits.widths:
        yield f"widths {limits.widths} were asked for, {choice.widths} is the choice"
    if not limits.in_time and limits.microbatches is None and choice.microbatches > 1:
        yield f"{choice.microbatches} microbatches of what cannot be cut into any"
    if (choice.zero, choice.recompute) not in limits.savings:
        yield f"ZeRO {choice.zero}, recompute {choice.recompute} of {limits.savings}"
    if limits.equal and limits.shares is None and max(choice.rows) - min(choice.rows) > 1:
        yield f"equal rows are {choice.rows}"
    if not 0 < choice.filled <= limits.filled * (1 + NEAR):
        yield f"{choice.filled} of a memory of which {limits.filled} may be in use"


def _of_held(choice: Choice, table: Blocks, spec: ClusterSpec, limits: Limits) -> Iterator[str]:
    """Every schedule of the form verifies, and what the one that is run has in flight fits every device."""
    count, groups = len(choice.sizes), len(choice.groups)
    hosts = tuple(tuple(range(g, count, groups)) for g in range(groups))
    kinds = ("1f1b", "gpipe", "zero-bubble") if groups == count else (f"interleaved:{limits.chunks}",)
    flying = [_flying(kind, hosts, _lent(choice, table), choice.microbatches) for kind in kinds]
    for kind, found in zip(kinds, flying, strict=True):
        if isinstance(found, str):
            yield f"{kind} on {hosts}: {found}"
    if not isinstance(flying[0], str):
        yield from _over(choice, table, spec, flying[0], limits)


@lru_cache(maxsize=10_000)
def _flying(
    kind: str, hosts: tuple[tuple[int, ...], ...], lent: tuple[tuple[int, int], ...], count: int
) -> Mapping[int, int] | str:
    """Per stage of a chain the most microbatches in flight; or what is wrong with the schedule."""
    crossings = [Crossing(k, k + 1, True) for k in range(sum(map(len, hosts)) - 1)]
    lendings = [Lending(owner, reader, True) for owner, reader in lent]
    made = lowered(compute_actions(kind, hosts, count), crossings, lendings)
    try:
        verify(made, hosts, crossings, lendings, count)
    except WhaleError as error:
        return str(error)
    return in_flight(made)


def _lent(choice: Choice, table: Blocks) -> tuple[tuple[int, int], ...]:
    """The stages that a parameter is lent between."""
    ends = list(accumulate(choice.sizes))
    pairs = [(bisect_right(ends, lent.owner), bisect_right(ends, lent.reader)) for lent in table.lent]
    return tuple((owner, reader) for owner, reader in pairs if owner != reader)


def _over(choice: Choice, table: Blocks, spec: ClusterSpec, flying: Mapping[int, int], limits: Limits) -> Iterator[str]:
    """Devices whose memory is not enough for their stages, by another sum than that of the search."""
    starts = [0, *accumulate(choice.sizes)]
    for g, (group, width) in enumerate(zip(choice.groups, choice.widths, strict=True)):
        for number, unit in enumerate(group):
            held, most = 0.0, 0.0
            rows = math.ceil(choice.rows[number // width.replicate] / choice.microbatches)
            own = _works(choice, table, width, math.ceil(rows / width.replicate))
            for k in range(g, len(choice.sizes), len(choice.groups)):
                blocks = [own[b] for b in table.order[starts[k] : starts[k + 1]]]
                held += sum(static + flying[k] * saved for static, saved, _ in blocks)
                most = max(most, *(peak for _, _, peak in blocks))
            yield from _too_much(spec.devices[unit.devices[0]], held + most, limits.filled)


def _works(choice: Choice, table: Blocks, width: Width, rows: int) -> list[tuple[float, float, float]]:
    """Per block: bytes all the time, per microbatch in flight, and within it."""
    sharding = Sharding(choice.zero, choice.copies * width.replicate if choice.zero else 1)
    found: list[tuple[float, float, float]] = []
    for work in table.works(Way(width.split, choice.recompute, choice.microbatches > 1), rows):
        kept = sharding.kept(work.holdings)
        static = kept.parameters + kept.copies + max(kept.first_gradients, kept.gradients) + kept.optimizer
        found.append((static, work.saved, work.peak))
    return found


def _too_much(device: Device, held: float, filled: float) -> Iterator[str]:
    room = filled * device.memory_bytes - device.profile.runtime_memory
    if held > room * (1 + 1e-3):
        yield f"device {device.index} holds {held:.4g} bytes beside its process, and has room for {room:.4g}"


def one_device_holds(table: Blocks, spec: ClusterSpec, filled: float) -> bool:
    """Whether some device holds the whole model, and works row by row."""
    costs, way = StageCosts(table, spec), Way(adds=table.rows > 1)
    sums = [(own, costs.sums(way, 1, kind)) for kind, own in enumerate(costs.kinds)]
    static = costs.static(way, 0, 1)[-1]
    return any(
        float(static + own.saved[-1] + own.peak) <= filled * kind.memory_bytes - kind.profile.runtime_memory
        for kind, own in sums
    )
