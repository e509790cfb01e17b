"""What the figures of a cluster rest on that neither the user nor a data sheet said, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from whalepy.hardware.devices import USABLE_FRACTION, DeviceProfile
from whalepy.hardware.efficiency import GIB, PRACTICE
from whalepy.hardware.links import Link
from whalepy.hardware.wheels import builds_for, builds_for_all, torch_release

_STANDING = {
    "assumed": "assumed",
    "estimated": f"{USABLE_FRACTION:.0%} of the marketed size",
    "?": "sources disagree",
    "memory": "not looked up",
}
_UNUSED = ("torch_name", "compute_capability")
_PRACTICE_FIELDS = ("product_efficiency", "memory_efficiency", "launch_s", "host_bandwidth", "runtime_bytes")


def about_profile(profile: DeviceProfile) -> Iterator[str]:
    """The unsure figures of a type, in one sentence, if it has any."""
    unsure = [(field, _STANDING[mark]) for field, mark in profile.marks if mark in _STANDING and field not in _UNUSED]
    if unsure:
        yield f"{profile.name}: " + ", ".join(f"{field} ({standing})" for field, standing in unsure)
    if profile.scale != 1.0:
        yield f"{profile.name}: {profile.scale:g} x the speed of its figures, as published training runs reached"


def about_practice(profiles: Iterable[DeviceProfile]) -> Iterator[str]:
    """What was taken for the devices of one vendor, where nobody measured what they make of their peaks."""
    taken: dict[str, set[str]] = {}
    for profile in profiles:
        words = taken.setdefault(profile.vendor, set())
        words |= {field for field in _PRACTICE_FIELDS if getattr(profile, field) in ((), None)}
    for vendor, fields in taken.items():
        sentences = [_TAKEN[field].format(**_shown(vendor)) for field in _PRACTICE_FIELDS if field in fields]
        if sentences:
            yield f"{vendor} devices, not measured: {', '.join(sentences)}"


_TAKEN = {
    "product_efficiency": (
        "large products reach {product:.0%} of the peak of matrix units, less {waves:g} waves of tiles ({source}), "
        "{vector:.0%} without"
    ),
    "memory_efficiency": "large elementwise operators {memory:.0%} of the memory bandwidth",
    "launch_s": "{launch:g} us of the host per operator",
    "host_bandwidth": "{host:.0%} of the host link",
    "runtime_bytes": "{runtime:.1f} GiB held by libraries",
}


def _shown(vendor: str) -> dict[str, object]:
    taken = PRACTICE[vendor]
    return {
        "product": taken.product_fraction,
        "waves": taken.waves_lost,
        "vector": taken.vector_fraction,
        "source": taken.source,
        "memory": taken.memory_fraction,
        "launch": taken.launch_s * 1e6,
        "host": taken.host_fraction,
        "runtime": taken.runtime_bytes / GIB,
    }


def about_wheels(profiles: Iterable[DeviceProfile]) -> Iterator[str]:
    """That no official torch wheel has kernels for all of these devices, where that is so."""
    known = [found for found in dict.fromkeys(profiles) if found.compute_capability]
    release = torch_release()
    if known and not builds_for_all(known, release):
        each = sorted({f"{found.name}: {' '.join(builds_for(found, release)) or 'none'}" for found in known})
        yield f"no official torch {release} wheel has kernels for all devices ({'; '.join(each)})"


def about_inside(profiles: Sequence[DeviceProfile], link: Link) -> Iterator[str]:
    """What was taken for the link inside a node of these types, where the user gave none."""
    if link.origin != "profile" or len(profiles) < 2:
        return
    names = " and ".join(dict.fromkeys(profile.name for profile in profiles))
    if len(set(profiles)) > 1:
        yield f"{names} in one node: PCIe is taken between them"
    elif profiles[0].bridge_is_optional:
        yield f"{names}: a bridge joins pairs at most and is usually absent, PCIe is taken"


def about_between(link: Link | None) -> Iterator[str]:
    """What was taken for the link between nodes, where nobody said."""
    if link and link.origin == "assumed":
        yield f"between nodes: {link} is assumed, nobody gave or measured it"
