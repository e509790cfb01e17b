"""What the figures of a cluster rest on that neither the user nor a data sheet said, in sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from whalepy.hardware.devices import USABLE_FRACTION, DeviceProfile
from whalepy.hardware.links import Link

_STANDING = {
    "assumed": "assumed",
    "estimated": f"{USABLE_FRACTION:.0%} of the marketed size",
    "?": "sources disagree",
    "memory": "not looked up",
}
_UNUSED = ("torch_name", "compute_capability")


def about_profile(profile: DeviceProfile) -> Iterator[str]:
    """The unsure figures of a type, in one sentence, if it has any."""
    unsure = [(field, _STANDING[mark]) for field, mark in profile.marks if mark in _STANDING and field not in _UNUSED]
    if unsure:
        yield f"{profile.name}: " + ", ".join(f"{field} ({standing})" for field, standing in unsure)


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
