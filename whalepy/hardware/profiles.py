"""Which device type a name means: what users write, and what torch reports, to one row of devices.csv."""

from __future__ import annotations

import itertools
import re
from functools import lru_cache

from whalepy.errors import ClusterError
from whalepy.hardware.devices import DeviceProfile, known_profiles, marketed_gb, profile_table
from whalepy.hardware.near import either, near_words

__all__ = ["DeviceProfile", "known_profiles", "profile", "unknown_device_fix"]

_NOISE = re.compile(r"nvidia|amd|tesla|geforce|quadro|instinct|radeon|graphics|gpu|ls")
# Words of a name that may be left out, and what else they may be written as.
_OPTIONAL_WORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"rtx", ("rtx", "")),
    (r"pcie", ("pcie", "")),
    (r"sxm", ("sxm", "sxm5", "")),
    (r"sxm\d", (r"\g<0>", "sxm", "")),
    (r"hbm\d", (r"\g<0>", "")),
    (r"(\d+)gb", (r"\g<0>", r"\g<1>g", r"\g<1>gib", "")),
)
# ROCm joins the names of both products on some driver versions.
_MORE_TORCH_NAMES = {"AMD Instinct MI250X/MI250": "MI250X-GCD"}


def profile(name: str) -> DeviceProfile:
    """The profile that `name` means: "3090", "RTX 3090", "V100-SXM2-32GB" or what torch reports for the device.

    Case, spaces and dashes do not matter; vendor words, memory size and form factor may be left out where one type
    remains. The whole name must be explained, so "A10" never means an A100, nor "RTX 3080 Ti" an RTX 3080. Names torch
    reports come first, then full names, then short ones. Raises ClusterError for an unknown or ambiguous name.
    """
    found = _exact_names().get(_squash(name)) or _short_names().get(_without_vendor_words(name), ())
    if len(found) == 1:
        return profile_table()[found[0]]
    if found:
        raise ClusterError(f"device {name!r} could be {either(found)}", fix="write one of them in full")
    raise ClusterError(f"unknown device {name!r}", fix=unknown_device_fix(name))


def unknown_device_fix(name: str) -> str:
    """What to do about a device name that is not in the table."""
    spelled = near_words(_without_vendor_words(name), _short_names())
    near = list(dict.fromkeys(found for key in spelled for found in _short_names()[key]))[:3]
    guess = f"did you mean {either(near)}? " if near else ""
    return guess + "`whalepy devices` lists the known types; others go under `profiles:` in a cluster file"


def _squash(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", text.lower())


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if not _NOISE.fullmatch(word)]


def _without_vendor_words(text: str) -> str:
    return "".join(_words(text))


@lru_cache
def _exact_names() -> dict[str, tuple[str, ...]]:
    """Squashed full names; what torch reports wins over a row's own name (MI250X is a package, torch sees halves)."""
    names = {_squash(row.name): (row.name,) for row in known_profiles()}
    names |= {_squash(row.torch_name): (row.name,) for row in known_profiles() if row.torch_name}
    return names | {_squash(reported): (name,) for reported, name in _MORE_TORCH_NAMES.items()}


@lru_cache
def _short_names() -> dict[str, tuple[str, ...]]:
    """Squashed names with any optional words left out, each with every profile it may mean, in table order."""
    found: dict[str, tuple[str, ...]] = {}
    for row in known_profiles():
        for key in sorted(_spellings(row)):
            found[key] = (*found.get(key, ()), row.name)
    return found


def _spellings(row: DeviceProfile) -> set[str]:
    keys: set[str] = set()
    for text in filter(None, (row.name, row.torch_name)):
        words = _words(text)
        if not any(re.fullmatch(r"\d+gb", word) for word in words):
            words.append(f"{marketed_gb(row.name)}gb")
        keys |= {"".join(choice) for choice in itertools.product(*map(_word_forms, words))}
    return keys


def _word_forms(word: str) -> tuple[str, ...]:
    for pattern, forms in _OPTIONAL_WORDS:
        if match := re.fullmatch(pattern, word):
            return tuple(match.expand(form) for form in forms)
    return (word,)
