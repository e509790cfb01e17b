"""Device types that a cluster file brings along: refined from a known type, measured in another file, or new."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from whalepy.errors import ClusterError
from whalepy.hardware.devices import GIB, DeviceProfile, profile_table
from whalepy.hardware.entries import DeviceEntry, ProfileEntry, SpecFile
from whalepy.hardware.near import either, near_words
from whalepy.hardware.profiles import profile
from whalepy.hardware.specfile import SUFFIXES, located, read_spec

_NEEDED = ("fp32", "memory_bandwidth", "link_bandwidth")
# Rates and bandwidths below this are figures in TFLOP/s or GB/s that were not converted.
_LEAST = 1e6
_IN_SI = ("fp32", "tf32", "fp16", "bf16", "fp8", "fp64", "memory_bandwidth", "link_bandwidth", "pcie_bandwidth")


def own_profiles(spec: SpecFile, file: str | None, reading: tuple[Path, ...] = ()) -> dict[str, DeviceProfile]:
    """Every type of `profiles:`, and every type that is the path of a file, by the name that the spec uses.

    Paths are relative to the file that names them. Raises ClusterError naming the field.
    """
    folder = Path(file).parent if file else Path()
    found = {name: _own(name, entry, folder, reading) for name, entry in spec.profiles.items()}
    for path in dict.fromkeys(_file_types(spec)):
        found.setdefault(path, replace(_from_file(folder / path, None, reading), name=Path(path).stem))
    return found


def type_of(name: str, own: Mapping[str, DeviceProfile]) -> DeviceProfile:
    """The profile that a type means in a spec with these types of its own. Raises ClusterError as `profile` does."""
    if name in own:
        return own[name]
    try:
        return profile(name)
    except ClusterError as error:
        near = near_words(name, own)
        raise ClusterError(error.what, fix=f"did you mean {either(near)}?" if near else error.fix) from None


def memory_of(entry: DeviceEntry | ProfileEntry, default: DeviceProfile) -> int:
    """Bytes that the entry gives, or those of the type."""
    if entry.memory_bytes is not None:
        return entry.memory_bytes
    return default.memory_bytes if entry.memory_gib is None else max(1, int(entry.memory_gib * GIB))


def is_known(figures: DeviceProfile) -> bool:
    """Whether the table of devices has just these figures."""
    return profile_table().get(figures.name) == figures


def profile_dict(figures: DeviceProfile) -> dict[str, Any]:
    """Plain JSON data, as `profiles:` reads it; what is that of its vendor is left out."""
    data: dict[str, Any] = {key: value for key, value in asdict(figures).items() if value not in (None, ())}
    data["marks"] = [list(mark) for mark in figures.marks]
    if figures.product_efficiency:
        data["product_efficiency"] = {dtype: _points(curve) for dtype, curve in figures.product_efficiency}
    if figures.kind_efficiency:
        data["kind_efficiency"] = {kind: _points(curve) for kind, curve in figures.kind_efficiency}
    if figures.memory_efficiency:
        data["memory_efficiency"] = _points(figures.memory_efficiency)
    without = {"name"} if figures.base else {"name", "base"}
    return {key: value for key, value in data.items() if key not in without}


def _points(curve: tuple[tuple[float, float], ...]) -> list[list[float]]:
    return [list(point) for point in curve]


def _file_types(spec: SpecFile) -> Iterator[str]:
    for node in spec.nodes:
        for entry in node.devices:
            if entry.type.endswith(SUFFIXES) and entry.type not in spec.profiles:
                yield entry.type


def _own(name: str, entry: ProfileEntry, folder: Path, reading: tuple[Path, ...]) -> DeviceProfile:
    """A type of the user's own, from a file, a known type or nothing; it may also restate a known name."""
    given: dict[str, Any] = entry.model_dump(exclude_none=True, exclude={"base", "file", "memory_gib", "memory_bytes"})
    for field in ("product_efficiency", "kind_efficiency"):
        if field in given:
            given[field] = tuple(given[field].items())
    for field in _IN_SI:
        if 0 < given.get(field, 0) < _LEAST:
            fix = "write it in FLOP/s or bytes/s: 35.6 TFLOP/s is 35.6e+12"
            raise ClusterError(f"profiles.{name}.{field} is {given[field]:g}", fix=fix)
    base = _base(name, entry, given, folder, reading)
    return replace(base, name=name, memory_bytes=memory_of(entry, base), **given)


def _base(
    name: str, entry: ProfileEntry, given: Mapping[str, Any], folder: Path, reading: tuple[Path, ...]
) -> DeviceProfile:
    if entry.file and entry.base:
        raise ClusterError(f"profiles.{name} has both base and file", fix="leave one of them out")
    if entry.file:
        return _from_file(folder / entry.file, name, reading)
    if entry.base:
        try:
            known = profile(entry.base)
        except ClusterError as error:
            raise ClusterError(f"profiles.{name}.base: {error.what}", fix=error.fix) from None
        return replace(known, base=known.name)
    missing = [field for field in _NEEDED if field not in given]
    if entry.memory_bytes is None and entry.memory_gib is None:
        missing.append("memory_gib")
    if missing:
        fix = "add it in SI units, or name a known type as `base:`"
        raise ClusterError(f"profiles.{name}.{missing[0]} is missing", fix=fix)
    return DeviceProfile(name, "NVIDIA", name, 0, 0.0, 0.0)


def _from_file(path: Path, name: str | None, reading: tuple[Path, ...]) -> DeviceProfile:
    """The profile of that name in a file, or its only one."""
    whole = path.resolve()
    if whole in reading:
        raise ClusterError("profile files name each other in a circle", at=str(path), fix="measure one of them anew")
    spec, _ = read_spec(path)
    with located(str(path)):
        found = own_profiles(spec, str(path), (*reading, whole))
        if len(found) == 1:
            return next(iter(found.values()))
        if not found:
            fix = "write it with `whalepy profile --output FILE`, or by hand under `profiles:`"
            raise ClusterError("the file holds no device profile", fix=fix)
        if name not in found:
            what = f"the file holds {len(found)} profiles" + (f", none of them {name}" if name else "")
            fix = f"name one of them under `profiles:`, each in its own file: {', '.join(found)}"
            raise ClusterError(what, fix=fix)
        return found[name]
