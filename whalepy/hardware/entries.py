"""What a cluster file may say, field by field.

nodes:
  - count: 4                       # nodes alike; default 1
    devices: 8xA100-SXM4-80GB      # a term, terms joined by +, or a list
  - devices:
      - {type: MyCard, count: 2, speed: 0.9, memory_gib: 20}
      - {type: fast3090.yaml, count: 2}     # a type measured by `whalepy profile --output fast3090.yaml`
    link: 12GB/s                   # between the devices of the node; default: from their profiles
link: {bandwidth: 100Gbit/s, latency_s: 2.0e-5}    # between nodes, per node and direction
profiles:                          # device types of your own, in SI units; from a known type, a file, or from nothing
  MyCard: {base: RTX-3090, fp32: 3.0e+13, memory_gib: 22}
  Other: measured/other.yaml
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from whalepy.errors import ClusterError
from whalepy.hardware.devices import known_dtype
from whalepy.hardware.links import parse_bandwidth
from whalepy.hardware.shorthand import parse_terms


def _read_bandwidth(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_bandwidth(value)
    except ClusterError as error:
        raise ValueError(error.fix) from None


def _read_link(value: Any) -> Any:
    is_figure = isinstance(value, str | int | float) and not isinstance(value, bool)
    return {"bandwidth": value} if is_figure else value


def _read_devices(value: Any) -> Any:
    """Terms and entries, alone or in a list, as a list of entries."""
    items: list[Any] = value if isinstance(value, list) else [value]
    entries: list[Any] = []
    for item in items:
        entries.extend(_read_terms(item) if isinstance(item, str) else [item])
    return entries


def _read_terms(text: str) -> list[dict[str, Any]]:
    terms = parse_terms(text)
    if any(term.nodes is not None for term in terms):
        raise ClusterError(f"devices of one node: {text!r} says nodes too", fix="write how many nodes as `count:`")
    return [term.entry() for term in terms]


def _read_profile(value: Any) -> Any:
    return {"file": value} if isinstance(value, str) else value


def _no_truth(value: Any) -> Any:
    """YAML reads `yes` and `on` as true, which would count as 1."""
    if isinstance(value, bool):
        raise ValueError("write a figure")
    return value


def _ascending(curve: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
    if any(after <= before for (before, _), (after, _) in pairwise(curve)):
        raise ValueError("list the points by ascending size, each size once")
    return curve


def _known_dtypes(curves: Mapping[str, Any]) -> Mapping[str, Any]:
    try:
        for name in curves:
            known_dtype(name)
    except ClusterError as error:
        raise ValueError(f"{error.what}; {error.fix}") from None
    return curves


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# Upper ends are far above any hardware: they keep products of figures finite.
Count = Annotated[int, BeforeValidator(_no_truth), Field(ge=1, le=10**18)]
Positive = Annotated[float, BeforeValidator(_no_truth), Field(gt=0, le=1e30)]
Rate = Annotated[float, BeforeValidator(_no_truth), Field(ge=0, le=1e30)]
Speed = Annotated[float, BeforeValidator(_no_truth), Field(gt=0, le=1e6)]
Gib = Annotated[float, BeforeValidator(_no_truth), Field(gt=0, le=2**30)]
CurveField = Annotated[tuple[tuple[Positive, Positive], ...], Field(min_length=1), AfterValidator(_ascending)]


class LinkEntry(_Entry):
    """A link: bytes/s per direction (or text with its unit) and seconds."""

    bandwidth: Annotated[Positive, BeforeValidator(_read_bandwidth)]
    latency_s: Rate | None = None
    origin: Literal["given", "profile", "assumed", "measured"] = "given"


LinkField = Annotated[LinkEntry | None, BeforeValidator(_read_link)]


class DeviceEntry(_Entry):
    """Devices alike: `speed` is relative to their type; memory, where given, replaces that of the type."""

    type: str
    count: Count = 1
    speed: Speed = 1.0
    memory_bytes: Count | None = None
    memory_gib: Gib | None = None


class NodeEntry(_Entry):
    """Nodes alike and what stands in each."""

    count: Count = 1
    devices: Annotated[list[DeviceEntry], Field(min_length=1), BeforeValidator(_read_devices)]
    link: LinkField = None


class ProfileEntry(_Entry):
    """A device type of the user's own: every field of DeviceProfile, in its units, on top of `base` or of `file`."""

    base: str | None = None
    file: str | None = None
    vendor: Literal["NVIDIA", "AMD", "CPU"] | None = None
    torch_name: str | None = None
    memory_bytes: Count | None = None
    memory_gib: Gib | None = None
    memory_bandwidth: Positive | None = None
    fp32: Positive | None = None
    tf32: Rate | None = None
    fp16: Rate | None = None
    bf16: Rate | None = None
    fp8: Rate | None = None
    fp64: Rate | None = None
    link: str | None = None
    link_bandwidth: Positive | None = None
    pcie_bandwidth: Rate | None = None
    compute_capability: str | None = None
    multiprocessors: Annotated[int, BeforeValidator(_no_truth), Field(ge=0, le=10**6)] | None = None
    source: str | None = None
    notes: str | None = None
    marks: tuple[tuple[str, str], ...] | None = None
    product_efficiency: Annotated[dict[str, CurveField], AfterValidator(_known_dtypes)] | None = None
    memory_efficiency: CurveField | None = None
    kind_efficiency: dict[str, CurveField] | None = None
    launch_s: Rate | None = None
    scale: Positive | None = None
    host_bandwidth: Positive | None = None
    runtime_bytes: Annotated[int, BeforeValidator(_no_truth), Field(ge=0, le=10**18)] | None = None


class SpecFile(_Entry):
    """A whole cluster file; `measured` is what `whalepy profile` saw, for people to read."""

    nodes: Annotated[list[NodeEntry], Field(min_length=1)]
    link: LinkField = None
    profiles: dict[str, Annotated[ProfileEntry, BeforeValidator(_read_profile)]] = Field(
        default_factory=dict[str, ProfileEntry]
    )
    measured: dict[str, Any] | None = None
