"""What a plan would do on a cluster: time, memory and traffic of one step, as data that reports are made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Verdict = Literal["fits", "tight", "no"]
SpanKind = Literal["forward", "backward", "bridge", "gradient", "optimizer"]

REPORT = "this is a mistake in whalepy's planner: please report it with the command that you ran"
"""The fix of an error that no user can cause."""


@dataclass(frozen=True)
class Held:
    """What holds memory on one device at its peak."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Span:
    """Something that a device does within a step; between spans it waits."""

    start_s: float
    end_s: float
    kind: SpanKind
    name: str
    """A module path, the name of a bridge, or of a group of gradients."""


@dataclass(frozen=True)
class DeviceForecast:
    """One device over one step."""

    rank: int
    type: str
    node: int
    stage: int
    coordinates: tuple[int, ...]
    """Position on each level, outermost first."""
    batch_share: int
    """Rows of the global batch."""
    peak_memory_bytes: int
    memory_capacity_bytes: int
    busy_s: float
    """Seconds of the step in which it computes."""
    held: tuple[Held, ...]
    """At the peak, largest first; sums to the peak."""
    memory: tuple[tuple[float, int], ...]
    """Bytes from each moment (seconds) on; starts at 0."""
    spans: tuple[Span, ...]
    """In order of their start; those of kind "gradient" and "bridge" may overlap others."""
    adds: float | None = None
    """Part of the throughput that would be lost without this device (0.1: a tenth); None where it was not tried."""


@dataclass(frozen=True)
class LinkForecast:
    """Traffic of one step over one link: inside a node, or between one node and the others."""

    name: str
    bandwidth_bytes_per_s: float
    bytes: int
    busy_s: float


@dataclass(frozen=True)
class StageForecast:
    """The devices of one stage and what of the model it holds."""

    index: int
    ranks: tuple[int, ...]
    modules: tuple[str, ...]
    parameters: int
    flops: float
    """Of one forward over the global batch."""
    devices: tuple[str, ...] = ()
    """The types of its devices, by rank as in `ranks`."""
    forward_s: float = 0.0
    """Of one microbatch on the slowest of its ranks; 0 where there is one stage."""
    backward_s: float = 0.0
    sends_bytes: int = 0
    """Over a step, forward and backward, to other ranks."""
    peak_memory_bytes: int = 0
    """Of its tightest rank."""


@dataclass(frozen=True)
class Breakdown:
    """Where the step of the bottleneck device goes; the parts sum to the step time."""

    compute_s: float
    bubble_s: float
    """Waiting for other devices."""
    bridge_s: float
    """Waiting for bridges."""
    gradient_s: float
    """Gradient collectives that no computation hides."""
    gradient_total_s: float = 0.0
    """Gradient collectives, hidden or not."""


@dataclass(frozen=True)
class Alternative:
    """Another plan that was tried."""

    strategy: str
    step_time_s: float
    verdict: Verdict
    tightest: int
    """The rank with the least room."""
    peak_memory_bytes: int
    """Of that rank."""
    memory_capacity_bytes: int
    missing_bytes: Mapping[int, int]
    """Per rank that runs out of memory: by how much."""
    not_runnable: tuple[str, ...] = ()
    """Options that the runtime does not execute yet."""
    flags: str = ""
    """Options of `whalepy plan` that force it."""


@dataclass(frozen=True)
class ModulePart:
    """One module of the model in the tree of the report: what the plan does with it."""

    path: str
    repeats: int
    """How many modules of the same form it stands for."""
    parameters: int
    """With the modules inside it, and of all repeats together; `flops` as well."""
    flops: float
    split: tuple[tuple[str, int, tuple[float, ...]], ...] = ()
    """Per cut axis of its parameters: parameter and dim, size, shares."""


@dataclass(frozen=True)
class Subject:
    """What was asked: the model, the batch and the cluster."""

    model: str
    parameters: int
    trainable: int
    optimizer: str
    precision: str
    rows: int
    tokens: int | None
    """Per row; None where no input is a sequence of ids."""
    cluster: str
    nodes: int
    devices: tuple[tuple[int, str, int], ...]
    """(count, type, memory in bytes), in order."""
    link: str
    figures: Literal["data sheet", "measured", "mixed"]


@dataclass(frozen=True)
class Forecast:
    """The answer of a dry run."""

    subject: Subject
    strategy: str
    verdict: Verdict
    step_time_s: float
    mfu: float
    """Model FLOPs per second over the peak of all devices in this precision."""
    equal_shares_step_time_s: float
    bound: float
    """How many times faster than equal shares these devices could be at most: perfect balance, nothing to wait for."""
    microbatches: int
    schedule: str
    bottleneck: int
    """The rank that computes longest."""
    tightest: int
    """The rank with the least room."""
    devices: tuple[DeviceForecast, ...]
    links: tuple[LinkForecast, ...]
    stages: tuple[StageForecast, ...]
    breakdown: Breakdown
    alternatives: tuple[Alternative, ...]
    """Best first; the plan itself is the first."""
    assumptions: tuple[str, ...]
    modules: tuple[ModulePart, ...] = ()
    annotations: str = ""
    """Python that forces this plan."""
    not_runnable: tuple[str, ...] = ()
    largest_batch: int | None = None
    """Largest global batch that fits with this strategy; None where it was not tried."""
    longest_sequence: int | None = None
    ways_out: tuple[str, ...] = ()
    """Where nothing fits: flags that make it fit, cheapest first."""
    fidelity: str = ""
    """How far predictions are from published runs, as measured."""
    equal_shares_missing_bytes: Mapping[int, int] = field(default_factory=dict[int, int])
    """Per rank that would run out of memory with equal shares: by how much."""
    plan_file: str = ""
    """Where the plan is saved, as `compile(..., plan=)` takes it; "" where it is not."""

    @property
    def fits(self) -> bool:
        """Whether it can be tried at all."""
        return self.verdict != "no"

    @property
    def throughput_samples_per_s(self) -> float:
        """Rows of the global batch per second."""
        return self.subject.rows / self.step_time_s

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second; None without sequences."""
        return None if self.subject.tokens is None else self.throughput_samples_per_s * self.subject.tokens

    @property
    def gain_over_equal(self) -> float:
        """How many times faster than equal shares."""
        return self.equal_shares_step_time_s / self.step_time_s
