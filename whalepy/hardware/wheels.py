"""Which official torch wheels (x86-64 Linux) have kernels for a device, read from wheels.csv with the source of each.

A kernel built for compute capability x.y runs on x.z with z >= y and on no other x; PTX (`+PTX`) is compiled at first
use for any later one. ROCm builds are per gfx name.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, resources

from whalepy.hardware.devices import DeviceProfile

_ANY = "any"


@dataclass(frozen=True)
class Wheel:
    """One build of one torch release."""

    torch: str  # 2.13
    build: str  # the suffix of its version: cu126, rocm7.2
    architectures: tuple[str, ...]  # compute capabilities, perhaps +PTX, or gfx names
    source: str


@lru_cache
def known_wheels() -> tuple[Wheel, ...]:
    """Every wheel of wheels.csv, in its order: oldest torch first."""
    text = resources.files("whalepy.hardware").joinpath("wheels.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return tuple(Wheel(row["torch"], row["build"], tuple(row["architectures"].split()), row["source"]) for row in rows)


def torch_release() -> str:
    """The torch release that is installed (`2.13`), else the newest that wheels.csv knows; torch is not imported."""
    releases = list(dict.fromkeys(wheel.torch for wheel in known_wheels()))
    try:
        installed = ".".join(metadata.version("torch").split(".")[:2])
    except metadata.PackageNotFoundError:
        return releases[-1]
    return installed if installed in releases else releases[-1]


def builds_for(profile: DeviceProfile, torch: str) -> tuple[str, ...]:
    """The builds of a torch release that have kernels for the device; `any` for a CPU."""
    if profile.vendor == "CPU":
        return (_ANY,)
    kinds = "rocm" if profile.vendor == "AMD" else "cu"
    wheels = [wheel for wheel in known_wheels() if wheel.torch == torch and wheel.build.startswith(kinds)]
    return tuple(wheel.build for wheel in wheels if runs_on(profile.compute_capability, wheel.architectures))


def builds_for_all(profiles: Sequence[DeviceProfile], torch: str) -> tuple[str, ...]:
    """The builds that have kernels for every one of the devices; CPUs aside, which every build serves."""
    common = [set(builds_for(profile, torch)) - {_ANY} for profile in profiles if profile.vendor != "CPU"]
    order = [wheel.build for wheel in known_wheels() if wheel.torch == torch]
    return tuple(build for build in order if all(build in own for own in common))


def runs_on(capability: str, architectures: Sequence[str]) -> bool:
    """Whether kernels for these architectures (`8.6`, `12.0+PTX`, `gfx90a`) run on a device of this capability."""
    if capability.startswith("gfx"):
        return capability in architectures
    own = _number(capability)
    return own is not None and any(_serves(architecture, own) for architecture in architectures)


def _serves(architecture: str, own: tuple[int, int]) -> bool:
    built = _number(architecture.removesuffix("+PTX"))
    if built is None:
        return False
    return (built[0] == own[0] and built <= own) or (architecture.endswith("+PTX") and built <= own)


def _number(capability: str) -> tuple[int, int] | None:
    major, dot, minor = capability.partition(".")
    return (int(major), int(minor)) if dot and major.isdecimal() and minor.isdecimal() else None
