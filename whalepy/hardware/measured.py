"""What one device did when it was measured, and the profile that this makes of its type. Plain data; no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from whalepy.hardware.devices import PCIE_X16, DeviceProfile, profile_table
from whalepy.hardware.efficiency import Curve

MEASURED = "measured"
BY_RANKS = "measured by its ranks"
# For a figure that nobody knows: typical of the table's PCIe cards, 40 float32 FLOPs per byte of memory traffic.
FLOPS_PER_BYTE = 40.0
KIND_OF = {
    "layer_norm": "normalise", "softmax": "normalise", "batch_norm": "batch norm",
    "silu": "exponential", "exp": "exponential", "tanh": "tanh",
}  # fmt: skip
"""Operators bound by memory that stand for a kind of their own: they read what they are given more than once, or take
longer for what they compute."""

_RATE_FIELD = {
    "float32": "fp32",
    "tf32": "tf32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float64": "fp64",
}


@dataclass(frozen=True)
class Point:
    """One kernel: its FLOPs, or the bytes it reads and writes, and the seconds of one call."""

    size: float
    seconds: float

    @property
    def rate(self) -> float:
        """FLOP/s or bytes/s."""
        return self.size / self.seconds


@dataclass(frozen=True)
class Measured:
    """Kernels of one device; every list by ascending size."""

    products: Mapping[str, tuple[Point, ...]]  # by dtype; FLOPs
    memory: Mapping[str, tuple[Point, ...]] = field(default_factory=dict[str, tuple[Point, ...]])  # by operator; bytes
    launch_s: float | None = None
    host_bandwidth: float | None = None  # bytes/s, the slower direction; None where the host has no link to it
    apart: Mapping[str, tuple[Point, ...]] = field(default_factory=dict[str, tuple[Point, ...]])  # by kind; FLOPs
    apart_in: str = "float32"  # the dtype of `apart`

    def rate(self, dtype: str = "float32") -> float:
        """The best FLOP/s seen in `dtype`; 0.0 where it was not measured."""
        return max((point.rate for point in self.products.get(dtype, ())), default=0.0)


def refined(base: DeviceProfile, measured: Measured, source: str = BY_RANKS) -> DeviceProfile:
    """`base` with everything that was measured in place of its figures; each such field is marked so.

    A rate is the best that was seen, an efficiency relative to that. The memory bandwidth is that of the largest
    elementwise operators; smaller ones may exceed it, where caches hold them.
    """
    figures: dict[str, object] = {
        _RATE_FIELD[dtype]: rate
        for dtype in measured.products
        if (rate := measured.rate(dtype)) and dtype in _RATE_FIELD
    }
    rate = measured.rate(measured.apart_in)
    curves = {dtype: _curve(points, measured.rate(dtype)) for dtype, points in measured.products.items() if points}
    if curves:
        figures["product_efficiency"] = tuple(sorted(curves.items()))
    kinds = {kind: _curve(points, rate) for kind, points in measured.apart.items() if points and rate}
    plain = {name: points for name, points in measured.memory.items() if name not in KIND_OF}
    traffic = _traffic(plain or measured.memory)
    if traffic:
        figures["memory_bandwidth"] = traffic[-1].rate
        figures["memory_efficiency"] = _curve(traffic, traffic[-1].rate)
        for kind in sorted(set(KIND_OF.values())):
            apart = _traffic({name: points for name, points in measured.memory.items() if KIND_OF.get(name) == kind})
            kinds |= {kind: _curve(apart, traffic[-1].rate)} if apart and plain else {}
    if kinds:
        figures["kind_efficiency"] = tuple(sorted(kinds.items()))
    for name in ("launch_s", "host_bandwidth"):
        if getattr(measured, name) is not None:
            figures[name] = getattr(measured, name)
    kept = tuple(mark for mark in base.marks if mark[0] not in figures)
    marks = kept + tuple((name, MEASURED) for name in figures)
    known = base.base or (base.name if base.name in profile_table() else "")
    return replace(base, base=known, source=source, notes="", marks=marks, scale=1.0, **figures)


def unknown_profile(kind: str, memory_bytes: int, fp32: float) -> DeviceProfile:
    """A type that the table does not have, of which only its memory and speed are known."""
    guessed = ("memory_bandwidth", "link_bandwidth", "pcie_bandwidth")
    return DeviceProfile(
        name=kind,
        vendor="AMD" if kind.startswith("AMD") else "NVIDIA",
        torch_name=kind,
        memory_bytes=memory_bytes,
        memory_bandwidth=fp32 / FLOPS_PER_BYTE,
        fp32=fp32,
        link="PCIe 3.0 x16",
        link_bandwidth=PCIE_X16["3"],
        pcie_bandwidth=PCIE_X16["3"],
        source=BY_RANKS,
        marks=tuple((name, "assumed") for name in guessed),
    )


def fit_link(points: Iterable[Point], ranks: int) -> tuple[float, float]:
    """Bytes/s and seconds of latency of the link that a ring all-reduce over `ranks` ranks crossed.

    A ring of n ranks takes 2 (n - 1) steps, each a latency and 1/n of the bytes: seconds = a + b x bytes, fitted by
    least squares of the *relative* errors, so that small messages count as much as large ones.
    """
    steps = 2 * (ranks - 1)
    seen = list(points)
    slope, constant = _relative_fit(seen)
    bandwidth = steps / ranks / slope if slope > 0 else max(point.rate for point in seen) * steps / ranks
    return bandwidth, max(constant, 0.0) / steps


def _relative_fit(points: list[Point]) -> tuple[float, float]:
    """Slope and constant of the line that is least wrong, relative to each measured time."""
    weights = [1 / point.seconds**2 for point in points]
    total = sum(weights)
    mean_x = sum(w * p.size for w, p in zip(weights, points, strict=True)) / total
    mean_y = sum(w * p.seconds for w, p in zip(weights, points, strict=True)) / total
    spread = sum(w * (p.size - mean_x) ** 2 for w, p in zip(weights, points, strict=True))
    slope = sum(w * (p.size - mean_x) * (p.seconds - mean_y) for w, p in zip(weights, points, strict=True)) / spread
    return slope, mean_y - slope * mean_x


def _curve(points: Iterable[Point], peak: float) -> Curve:
    """The points as fractions of the peak. Noise aside, more work takes no less time: a dip is levelled."""
    curve: list[tuple[float, float]] = []
    slowest = 0.0
    for point in points:
        slowest = max(slowest, point.seconds)
        curve.append((point.size, point.size / slowest / peak))
    return tuple(curve)


def _traffic(memory: Mapping[str, tuple[Point, ...]]) -> list[Point]:
    """One point per size: the median over operators, as seconds per byte."""
    rows = zip(*memory.values(), strict=False)
    return [_middle(row) for row in rows]


def _middle(row: tuple[Point, ...]) -> Point:
    size = statistics.median(point.size for point in row)
    return Point(size, size * statistics.median(point.seconds / point.size for point in row))
