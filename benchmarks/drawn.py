"""Random clusters, models as lists of layers, tables of blocks and options: what a planner may be asked, drawn by seed.

Sizes are drawn by their logarithms, and those of memory in proportion to the memory of the cluster, so that about as
many models fit as do not, and many nearly do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.devices import GIB, DeviceProfile, known_profiles
from whalepy.planner.block_table import BlockWork, Lent, Way
from whalepy.planner.form import Limits, Width
from whalepy.planner.work import Event, Holdings

MIB = 2**20
STATE = 16
"""Bytes per parameter in float32 with AdamW: itself, its gradient, two of state."""


def between(draw: Random, low: float, high: float) -> float:
    """A figure drawn by its logarithm."""
    return math.exp(draw.uniform(math.log(low), math.log(high)))


def sometimes(draw: Random, part: float, value: Any) -> Any:
    """The value in this part of all draws, otherwise None."""
    return value if draw.random() < part else None


# -- clusters


def cluster(draw: Random, most: int = 16) -> dict[str, Any]:
    """A cluster as a file of it would say: up to three types, up to four kinds of node, `most` devices."""
    vendor = draw.choices(("NVIDIA", "AMD", "CPU"), (85, 10, 5))[0]
    known = [one for one in known_profiles() if one.vendor == vendor]
    types = draw.sample(known, min(draw.choice((1, 1, 2, 2, 3)), len(known)))
    nodes: list[dict[str, Any]] = []
    left = most
    for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
        entries = [_devices(draw, draw.choice(types), left) for _ in range(draw.choice((1, 1, 2)))]
        own = sum(entry["count"] for entry in entries)
        if own <= left:
            count = draw.randint(1, max(min(3, left // own), 1))
            nodes.append({"devices": entries, "count": count} | _link(draw, 0.2, 1e9, 6e11))
            left -= own * count
    found: dict[str, Any] = {"nodes": nodes or [{"devices": [_devices(draw, types[0], most)]}]}
    several = sum(node.get("count", 1) for node in found["nodes"]) > 1
    return found | (_link(draw, 1.0, 1e7, 5e10) if several else {})


def _devices(draw: Random, of: DeviceProfile, most: int) -> dict[str, Any]:
    """Like devices, some of another speed or memory than their type."""
    entry: dict[str, Any] = {"type": of.name, "count": draw.randint(1, max(min(4, most), 1))}
    if draw.random() < 0.25:
        entry["speed"] = round(between(draw, 0.05, 3), 3)
    if draw.random() < 0.3:
        entry["memory_gib"] = round(of.memory_bytes / GIB * between(draw, 0.1, 1.5), 2)
    return entry


def _link(draw: Random, part: float, low: float, high: float) -> dict[str, Any]:
    if draw.random() >= part:
        return {}
    latency = sometimes(draw, 0.3, between(draw, 1e-6, 1e-3))
    return {"link": {"bandwidth": between(draw, low, high)} | ({"latency_s": latency} if latency else {})}


def memory_of(spec: ClusterSpec) -> int:
    """Bytes of all devices, without what a process keeps on each."""
    return sum(max(device.memory_bytes - device.profile.runtime_memory, MIB) for device in spec.devices)


# -- models as layers


def layer_file(draw: Random, spec: ClusterSpec, rows: int) -> dict[str, Any]:
    """A list of layers as `layers:FILE` reads it, that takes a hundredth to three times of the cluster's memory."""
    count = draw.randint(1, 5)
    repeats = [draw.choice((1, 1, 2, 3, 5, 12, 40)) for _ in range(count)]
    blocks = sum(repeats)
    state = memory_of(spec) * between(draw, 0.003, 1.5) / STATE / blocks
    saved = memory_of(spec) * between(draw, 0.003, 1.5) / rows / blocks
    compute = between(draw, 1e6, 1e14) / blocks
    layers = [_layer(draw, spec, f"layer {k}", own, state, saved, compute) for k, own in enumerate(repeats)]
    found: dict[str, Any] = {"name": "drawn", "layers": layers, "rows": rows}
    found["dtype"] = draw.choices(("float32", "float16", "bfloat16", "float64", "float8"), (60, 20, 15, 3, 2))[0]
    return found | ({"master": True} if draw.random() < 0.2 else {}) | ({"tokens": 512} if draw.random() < 0.5 else {})


def _layer(
    draw: Random, spec: ClusterSpec, name: str, repeat: int, state: float, saved: float, compute: float
) -> dict[str, Any]:
    """One line: sizes near those of an even model, costs as FLOPs and bytes, as seconds, or as both."""
    kept, size = saved * between(draw, 0.1, 4), round(state * between(draw, 0.05, 4))
    layer: dict[str, Any] = {
        "name": name,
        "repeat": repeat,
        "parameters": _by_degree(draw, float(size)),
        "saved_bytes": _by_degree(draw, kept),
        "output_bytes": kept * draw.uniform(0, 1),
    }
    if draw.random() < 0.3:
        layer["working_bytes"] = kept * between(draw, 0.01, 3)
    if draw.random() < 0.85:
        layer |= _operators(draw, kept, compute)
    if "bytes" not in layer or draw.random() < 0.1:
        layer["seconds"] = _seconds(draw, spec)
    return layer | {"split": draw.choices(("parts", "whole", "rows"), (70, 15, 15))[0]}


def _by_degree(draw: Random, whole: float) -> Any:
    """A figure alone, seldom one for some degrees of split."""
    return whole if draw.random() < 0.9 else {degree: whole / degree * draw.uniform(1, 1.3) for degree in (1, 2, 4)}


def _operators(draw: Random, kept: float, compute: float) -> dict[str, Any]:
    found: dict[str, Any] = {"bytes": kept * between(draw, 0.5, 8), "operators": draw.randint(1, 4)}
    if draw.random() < 0.9:
        found |= {"flops": compute * between(draw, 0.1, 4), "products": draw.randint(1, 3)}
    kinds = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all")
    found["exchanges"] = [
        {"kind": draw.choice(kinds), "bytes": kept * draw.uniform(0, 1)} for _ in range(draw.choice((0, 0, 1, 2)))
    ]
    return found


def _seconds(draw: Random, spec: ClusterSpec) -> dict[str, Any]:
    """Measured on most of the types that there are, for a few degrees and rows."""
    types = [name for name in dict.fromkeys(device.type for device in spec.devices) if draw.random() < 0.9]
    return {name: {degree: _measured(draw) for degree in (1, 2, 4) if degree == 1 or draw.random() < 0.6}
            for name in types or [spec.devices[0].type]}  # fmt: skip


def _measured(draw: Random) -> dict[str, Any]:
    rows = sorted(draw.sample((1, 2, 4, 8, 16, 64), draw.randint(1, 4)))
    pace = between(draw, 1e-6, 1e-2)
    forward = [pace * n**0.8 * draw.uniform(0.8, 1.2) for n in rows]
    update = sometimes(draw, 0.4, pace * draw.uniform(0, 1))
    backward = [2 * seconds for seconds in forward]
    found = {"rows": rows, "forward_s": forward, "backward_s": backward}
    return found if update is None else found | {"update_s": update}


def batch(draw: Random) -> int:
    """Rows of a global batch, seldom many."""
    return round(between(draw, 1, 1000 if draw.random() < 0.02 else 32))


# -- options of `whalepy plan`


def layer_options(draw: Random, spec: ClusterSpec, rows: int) -> dict[str, Any]:
    """Options as the arguments of the command, most of them left out; some cannot be met."""
    count = len(spec.devices)
    degrees = [d for d in range(1, count + 1) if count % d == 0]
    found = {
        "batch_size": sometimes(draw, 0.7, rows if draw.random() < 0.5 else batch(draw)),
        "replicate": sometimes(draw, 0.15, draw.choice((*degrees, draw.randint(1, 2 * count)))),
        "split": sometimes(draw, 0.2, draw.choice((*degrees, draw.randint(1, 8)))),
        "microbatches": sometimes(draw, 0.25, draw.choice((1, 2, 3, 4, 7, 16, rows))),
        "zero": sometimes(draw, 0.2, draw.randint(0, 3)),
        "recompute": sometimes(draw, 0.2, draw.choices(("none", "full", "selective", "attention"), (4, 4, 1, 1))[0]),
        "precision": sometimes(draw, 0.05, draw.choice(("fp32", "bf16", "fp16"))),
        "optimizer": sometimes(draw, 0.3, draw.choice(("adam", "sgd", "sgd-momentum", "adagrad", "rmsprop"))),
        "stages": sometimes(draw, 0.02, draw.randint(1, 4)),
        "schedule": sometimes(draw, 0.02, draw.choice(SCHEDULES)),
    }
    return {name: value for name, value in (found | _sharing(draw, count)).items() if value is not None}


SCHEDULES = ("1f1b", "gpipe", "zero-bubble", "interleaved:2", "interleaved:3")


def model_options(draw: Random, spec: ClusterSpec, rows: int) -> dict[str, Any]:
    """The same for a model with code, most often with stages."""
    found = layer_options(draw, spec, rows)
    stages = sometimes(draw, 0.6, draw.randint(1, min(len(spec.devices) + 1, 6)))
    schedule = sometimes(draw, 0.5 if stages else 0.0, draw.choice(SCHEDULES))
    found = {name: value for name, value in found.items() if name not in ("stages", "schedule")}
    own = {"stages": stages, "schedule": schedule, "batch_size": rows}
    return found | {name: value for name, value in own.items() if value is not None}


def _sharing(draw: Random, devices: int) -> dict[str, Any]:
    """How rows are shared out, where that is forced."""
    if draw.random() >= 0.25:
        return {}
    if draw.random() < 0.5:
        return {"balance": draw.choice(("exact", "whale", "equal"))}
    if draw.random() < 0.4:
        return {"shares": "equal"}
    number = draw.choice((devices, devices, max(devices // 2, 1), 2))
    return {"shares": ":".join(str(draw.choice((0, 1, 1, 2, 3, 7, 0.5))) for _ in range(number))}


# -- tables of blocks


@dataclass(frozen=True)
class Block:
    """What one block takes, per row and over the whole of it."""

    flops: int
    bytes: int
    operators: int
    parameters: int
    saved: int
    working: int
    sends: int
    launches: int
    """Products."""


@dataclass(frozen=True)
class Blocks:
    """A table of blocks, as a search reads it, that can be split and recomputed."""

    blocks: Sequence[Block]
    order: Sequence[int]
    rows: int
    splits: Sequence[int]
    lent: Sequence[Lent]
    dtype: str

    def works(self, way: Way, rows: int) -> list[BlockWork]:
        """Each block; recomputed ones keep what they are sent, and run forward again."""
        return [self._work(way, rows, block) for block in self.blocks]

    def _work(self, way: Way, rows: int, block: Block) -> BlockWork:
        saved, working = (rows * size // way.split for size in (block.saved, block.working))
        kept = {"full": min(rows * block.sends, saved), "selective": saved // 3}.get(way.recompute, saved)
        forward = self._pass(way, rows, block, "forward", 1)
        again = forward if way.recompute != "none" else ()
        size = block.parameters // way.split
        added = (Event("backward", "", 0, 12 * size, self.dtype, 0, 0),) if way.adds else ()
        back = (*again, *self._pass(way, rows, block, "backward", 2), *added)
        holdings = Holdings(4 * size, 0, 4 * size, 4 * size, 8 * size)
        return BlockWork(forward, back, kept, saved - kept + working, rows * block.sends, holdings)

    def _pass(self, way: Way, rows: int, block: Block, phase: Any, times: int) -> tuple[Event, ...]:
        flops, size = (times * rows * own // way.split for own in (block.flops, block.bytes))
        products = Event(phase, "", flops // block.launches, 0, self.dtype, 0, 0)
        others = Event(phase, "", 0, size // block.operators, self.dtype, 0, 0)
        sum_ = Event(phase, "", 0, rows * block.sends, self.dtype, 0, 0, "all-reduce", 0)
        between = (sum_,) if way.split > 1 else ()
        return (*[products] * block.launches, *[others] * block.operators, *between)

    def update(self, way: Way) -> list[Event]:
        """One operator over all parameters."""
        size = sum(block.parameters for block in self.blocks)
        return [Event("optimizer", "", 0, 28 * size // way.split, self.dtype, 0, 0)]

    @property
    def flops(self) -> int:
        """Of a step, without what is computed again."""
        return 3 * self.rows * sum(self.blocks[k].flops for k in self.order)


def blocks(draw: Random, spec: ClusterSpec) -> Blocks:
    """A table of up to 20 blocks of up to 5 kinds, for a batch."""
    kinds, rows = draw.randint(1, 5), batch(draw)
    order = [k for k in range(kinds) for _ in range(draw.choice((1, 1, 1, 2, 4)))]
    order = list(dict.fromkeys(order)) + order if draw.random() < 0.1 else order
    used = sorted(set(order))
    order = [used.index(k) for k in order]
    state = memory_of(spec) * between(draw, 0.003, 1.5) / STATE / len(order)
    saved = memory_of(spec) * between(draw, 0.003, 1.5) / rows / len(order)
    compute = between(draw, 1e5, 1e14) / len(order)
    made = [_block(draw, state, saved, compute) for _ in used]
    lent = [Lent(0, len(order) - 1, 4 * made[0].parameters)] if draw.random() < 0.3 and len(order) > 1 else []
    splits = tuple(degree for degree in (1, 2, 4) if degree == 1 or draw.random() < 0.7)
    return Blocks(made, order, rows, splits, lent, draw.choice(("float32", "float32", "float16", "bfloat16")))


def _block(draw: Random, state: float, saved: float, compute: float) -> Block:
    kept = round(saved * between(draw, 0.1, 4))
    return Block(
        flops=round(compute * between(draw, 0.1, 4)),
        bytes=round(kept * between(draw, 0.5, 8)),
        operators=draw.randint(1, 4),
        parameters=round(state * between(draw, 0.05, 4)),
        saved=kept,
        working=round(kept * draw.uniform(0, 1)),
        sends=round(kept * draw.uniform(0, 0.5)),
        launches=draw.randint(1, 3),
    )


def limits(draw: Random, spec: ClusterSpec, table: Blocks) -> Limits:
    """What a search may choose from; half of them anything."""
    if draw.random() < 0.5:
        return Limits(filled=draw.choice((0.84, 1.0)))
    if draw.random() < 0.1:
        wide = [Width(draw.randint(1, 3), draw.choice((1, 1, 2))) for _ in range(draw.randint(2, 4))]
        return Limits(widths=tuple(wide), filled=draw.choice((0.84, 1.0)))
    copies = sometimes(draw, 0.25, draw.randint(1, len(spec.devices)))
    chunks = draw.choice((1, 1, 1, 2, 3))
    shares = sometimes(draw, 0.15, tuple(draw.choice((1.0, 2.0, 0.5, 7.0)) for _ in range(copies or 2)))
    return Limits(
        stages=sometimes(draw, 0.4, draw.randint(1, min(len(table.order), 2 * len(spec.devices)))),
        chunks=chunks,
        replicate=copies,
        split=sometimes(draw, 0.25, draw.choice((1, 2, 4))),
        microbatches=sometimes(draw, 0.3, draw.randint(1, min(table.rows, 40))),
        equal=draw.random() < 0.2,
        shares=shares,
        savings=draw.choice((((0, "none"),), ((1, "none"),), ((0, "full"),), ((0, "none"), (0, "selective")))),
        filled=draw.choice((0.84, 1.0)),
        in_time=draw.random() < 0.85,
    )
