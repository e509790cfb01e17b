"""The file that `whalepy profile` writes: a cluster file of what was measured, whose types others may name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from whalepy.errors import ClusterError
from whalepy.hardware.cluster import ClusterSpec, Node
from whalepy.hardware.devices import DeviceProfile
from whalepy.hardware.links import Link
from whalepy.hardware.match import RankReport, spec_from_reports
from whalepy.hardware.measured import MEASURED
from whalepy.hardware.specfile import SUFFIXES

HEADER = (
    "# Written by `whalepy profile`. A cluster file of the machine it ran on; other cluster files may name it, as\n"
    "# `type: THIS_FILE` or under `profiles:`. Figures are in SI units; `measured:` is for people and is not read.\n"
)


def measured_spec(reports: Sequence[RankReport], inside: Mapping[str, Link], between: Link | None) -> ClusterSpec:
    """The cluster that the ranks describe, with the links that were measured between them, by host.

    The memory of a type is what the first of its devices had free.
    """
    spec = spec_from_reports(reports)
    hosts = list(dict.fromkeys(report.host for report in reports))
    nodes = (replace(node, link=inside.get(host, node.link)) for node, host in zip(spec.nodes, hosts, strict=True))
    first = {device.type: device.memory_bytes for device in reversed(spec.devices)}
    return ClusterSpec(tuple(_as_measured(node, first) for node in nodes), between or spec.inter)


def file_content(spec: ClusterSpec, seen: Mapping[str, Any]) -> dict[str, Any]:
    """What the file holds: plain data with figures of five digits."""
    return _rounded(spec.to_dict() | {"measured": dict(seen)})


def check_target(path: Path) -> None:
    """Raises ClusterError where a file cannot be written: better before measuring than after."""
    if path.suffix not in SUFFIXES:
        fix = f"end it in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise ClusterError(f"{str(path)!r} is not the name of a profile file", fix=fix)
    if path.is_dir() or not path.parent.is_dir():
        reason = "it is a folder" if path.is_dir() else f"there is no folder {str(path.parent)!r}"
        raise ClusterError(f"cannot write {str(path)!r}: {reason}", fix="name a file in a folder that exists")


def write_profile(path: Path, content: Mapping[str, Any]) -> None:
    """Write the content as JSON or YAML, by the ending of the name. Raises ClusterError where that fails."""
    if path.suffix == ".json":
        text = json.dumps(content, indent=1) + "\n"
    else:
        text = HEADER + yaml.safe_dump(content, sort_keys=False, width=120, default_flow_style=None)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        fix = "choose another --output"
        raise ClusterError(f"cannot write {str(path)!r}: {error.strerror}", fix=fix) from None


def _as_measured(node: Node, first: Mapping[str, int]) -> Node:
    """The node with the memory of each type, and its link where all its devices are one type, in their profiles."""
    alike = len({device.type for device in node.devices}) == 1
    link = {"link_bandwidth": node.link.bandwidth_bytes_per_s} if alike and node.link.origin == MEASURED else {}
    devices = tuple(
        replace(device, profile=_marked(device.profile, {"memory_bytes": first[device.type], **link}))
        for device in node.devices
    )
    return replace(node, devices=devices)


def _marked(profile: DeviceProfile, figures: Mapping[str, Any]) -> DeviceProfile:
    kept = tuple(mark for mark in profile.marks if mark[0] not in figures)
    return replace(profile, marks=kept + tuple((name, MEASURED) for name in figures), **figures)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return value
