"""The kinds of schedule by their names, and the actions of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from whalepy.errors import PlanError
from whalepy.hardware.near import did_you_mean
from whalepy.planner.schedule.actions import Schedule
from whalepy.planner.schedule.generators import gpipe, interleaved, one_f_one_b, zero_bubble

GENERATORS: Mapping[str, Callable[[Sequence[Sequence[int]], int], Schedule]] = {
    "1f1b": one_f_one_b,
    "gpipe": gpipe,
    "interleaved": interleaved,
    "zero-bubble": zero_bubble,
}
DEFAULT = "1f1b"


@dataclass(frozen=True)
class Kind:
    """A kind of schedule: `1f1b`, or `interleaved:2` for two stages on each group of devices."""

    name: str
    chunks: int | None = None
    """Stages per group, where the user said so."""

    def __str__(self) -> str:
        return self.name if self.chunks is None else f"{self.name}:{self.chunks}"


def parse_kind(text: str) -> Kind:
    """The kind that is written so. Raises PlanError for anything else."""
    name, colon, chunks = text.strip().partition(":")
    if name not in GENERATORS:
        raise PlanError(f"there is no schedule {text!r}", fix=did_you_mean(name, list(GENERATORS)))
    if not colon:
        return Kind(name)
    if name != "interleaved":
        raise PlanError(f"schedule {text!r}: only interleaved takes a number of chunks", fix=f"write {name}")
    if not chunks.isdecimal() or int(chunks) < 1:
        raise PlanError(f"schedule {text!r} has no whole number of chunks", fix="write interleaved:2")
    return Kind(name, int(chunks))


def compute_actions(kind: str, hosts: Sequence[Sequence[int]], microbatches: int) -> Schedule:
    """What each group computes, in order. Raises PlanError for an unknown kind, and for hosts that do not fit it."""
    parsed = parse_kind(kind)
    most = max((len(stages) for stages in hosts), default=0)
    if parsed.chunks is not None and parsed.chunks != most:
        fix = f"write interleaved:{most}, or cut the model into {parsed.chunks} stages per group"
        raise PlanError(f"schedule {kind!r}, but a group of devices hosts {most} stages", fix=fix)
    return GENERATORS[parsed.name](hosts, microbatches)


def defers(kind: str) -> bool:
    """Whether a schedule runs the weight gradients apart from those of the inputs."""
    return parse_kind(kind).name == "zero-bubble"
