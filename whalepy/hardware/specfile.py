"""What a cluster file may say, and how it is read: YAML or JSON, checked field by field.

nodes:
  - count: 4                       # nodes alike; default 1
    devices: 8xA100-SXM4-80GB      # a term, terms joined by +, or a list
  - devices:
      - {type: MyCard, count: 2, speed: 0.9, memory_gib: 20}
    link: 12GB/s                   # between the devices of the node; default: from their profiles
link: {bandwidth: 100Gbit/s, latency_s: 2.0e-5}    # between nodes, per node and direction
profiles:                          # device types of your own, in SI units; from a known type, or from nothing
  MyCard: {base: RTX-3090, fp32: 3.0e+13, memory_gib: 22}
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from whalepy.errors import ClusterError
from whalepy.hardware.links import parse_bandwidth
from whalepy.hardware.near import did_you_mean
from whalepy.hardware.shorthand import parse_shorthand, parse_terms


def _read_bandwidth(value: Any) -> Any:
    return parse_bandwidth(value) if isinstance(value, str) else value


def _read_link(value: Any) -> Any:
    return {"bandwidth": value} if isinstance(value, str | int | float) else value


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


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]


class LinkEntry(_Entry):
    """A link: bytes/s per direction (or text with its unit) and seconds."""

    bandwidth: Annotated[Positive, BeforeValidator(_read_bandwidth)]
    latency_s: Rate | None = None
    origin: Literal["given", "profile", "assumed"] = "given"


LinkField = Annotated[LinkEntry | None, BeforeValidator(_read_link)]


class DeviceEntry(_Entry):
    """Devices alike: `speed` is relative to their type; memory, where given, replaces that of the type."""

    type: str
    count: Count = 1
    speed: Positive = 1.0
    memory_bytes: Count | None = None
    memory_gib: Positive | None = None


class NodeEntry(_Entry):
    """Nodes alike and what stands in each."""

    count: Count = 1
    devices: Annotated[list[DeviceEntry], Field(min_length=1), BeforeValidator(_read_devices)]
    link: LinkField = None


class ProfileEntry(_Entry):
    """A device type of the user's own: every field of DeviceProfile, in its units, on top of `base`."""

    base: str | None = None
    vendor: Literal["NVIDIA", "AMD", "CPU"] | None = None
    torch_name: str | None = None
    memory_bytes: Count | None = None
    memory_gib: Positive | None = None
    memory_bandwidth: Positive | None = None
    fp32: Positive | None = None
    tf32: Rate | None = None
    fp16: Rate | None = None
    bf16: Rate | None = None
    fp8: Rate | None = None
    link: str | None = None
    link_bandwidth: Positive | None = None
    pcie_bandwidth: Rate | None = None
    compute_capability: str | None = None
    source: str | None = None
    notes: str | None = None
    marks: tuple[tuple[str, str], ...] | None = None


class SpecFile(_Entry):
    """A whole cluster file."""

    nodes: Annotated[list[NodeEntry], Field(min_length=1)]
    link: LinkField = None
    profiles: dict[str, ProfileEntry] = Field(default_factory=dict[str, ProfileEntry])


def read_spec(source: object) -> tuple[SpecFile, str | None]:
    """The checked content of a path, a dict or the one-line form, and the file it came from, if any.

    Text that names a file (it exists, or ends in .yaml, .yml or .json) is a path. Raises ClusterError with the field,
    the value given, the fix, and the file and line where there is one.
    """
    if isinstance(source, Mapping):
        return _check(source), None
    if not isinstance(source, str | Path):
        raise ClusterError(f"{_shown(source)} does not describe a cluster", fix=_SOURCE_FIX)
    if isinstance(source, str) and not _names_a_file(source):
        return _check(parse_shorthand(source)), None
    path = Path(source)
    content = _load_file(path)
    with located(str(path)):
        return _check(parse_shorthand(content) if isinstance(content, str) else content), str(path)


@contextmanager
def located(file: str | None) -> Generator[None, None, None]:
    """Errors raised inside that do not say where get the name of the file."""
    try:
        yield
    except ClusterError as error:
        raise ClusterError(error.what, at=error.at or file, fix=error.fix) from None


def _names_a_file(text: str) -> bool:
    return text.endswith((".yaml", ".yml", ".json")) or ("\n" not in text and len(text) < 4096 and Path(text).is_file())


def _load_file(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ClusterError(f"cannot read the cluster file {str(path)!r}: {reason}", fix=_SOURCE_FIX) from None
    return _parse_json(text, path) if path.suffix == ".json" else _parse_yaml(text, path)


def _parse_json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ClusterError(f"broken JSON: {error.msg}", at=f"{path}:{error.lineno}", fix=_SYNTAX_FIX) from None


def _parse_yaml(text: str, path: Path) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ClusterError(f"broken YAML: {getattr(error, 'problem', None) or error}", at=at, fix=_SYNTAX_FIX) from None


_SOURCE_FIX = "give the path of a YAML or JSON file, a dict, or one line such as '8xT4'"
_SYNTAX_FIX = "mend the syntax near this line"


def _check(content: Any) -> SpecFile:
    try:
        return SpecFile.model_validate(content)
    except ValidationError as error:
        raise _explain(error.errors()[0]) from None


_FIXES = {
    "greater_than": "write a figure above {gt:g}",
    "greater_than_equal": "write a figure of at least {ge:g}",
    "too_short": "list at least one",
    "finite_number": "write a finite figure",
    "literal_error": "write {expected}",
    "model_type": "write it as a table of fields",
}


def _explain(detail: ErrorDetails) -> ClusterError:
    """The first finding of pydantic in our words: field, value given, fix."""
    field = _path(detail["loc"])
    if detail["type"] == "missing":
        return ClusterError(f"{field} is missing", fix=f"add `{detail['loc'][-1]}:`")
    if detail["type"] == "extra_forbidden":
        known = _known_fields(detail["loc"])
        return ClusterError(f"{field} is not a known field", fix=did_you_mean(str(detail["loc"][-1]), known))
    ours = _FIXES.get(detail["type"])
    fix = ours.format(**detail.get("ctx", {})) if ours else detail["msg"].lower()
    return ClusterError(f"{field} is {_shown(detail['input'])}", fix=fix)


def _path(loc: tuple[str | int, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".") or "the cluster"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _known_fields(loc: tuple[str | int, ...]) -> list[str]:
    """The fields that the table holding `loc` may have."""
    names = [part for part in loc[:-1] if isinstance(part, str)]
    models: dict[str, type[_Entry]] = {"nodes": NodeEntry, "devices": DeviceEntry, "link": LinkEntry}
    if names[:1] == ["profiles"]:
        return list(ProfileEntry.model_fields)
    return list(models[names[-1]].model_fields if names else SpecFile.model_fields)
