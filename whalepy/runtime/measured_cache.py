"""What this rank's device does, measured in about a second and kept for a day in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from pydantic import TypeAdapter

from whalepy.hardware.measured import Measured
from whalepy.runtime.agreement import gather_objects
from whalepy.runtime.groups import Group
from whalepy.runtime.measure import measure_device
from whalepy.runtime.measure_together import speed_together

# A machine that was busy while it was measured is not judged by that for longer.
KEPT_S = 24 * 3600.0
_FORMAT = 3


T = TypeVar("T")


@dataclass(frozen=True)
class Kept(Generic[T]):
    """The content of a file: for whom it was measured, so that a name that collides is noticed, and what."""

    key: dict[str, str]
    measured: T


_OF_DEVICE = TypeAdapter(Kept[Measured])
_OF_SPEED = TypeAdapter(Kept[float])


def measured_here(device: torch.device) -> Measured:
    """What `device` does: as the cache folder has it, else measured now and put there.

    Kept apart by host, device, torch version, threads, and place among the ranks of the host: those share its cores. A
    file that is old, broken or of another key is measured anew; a folder that cannot be written is done without.
    """
    key = _key(device)
    found = _read(_OF_DEVICE, key)
    if found is None or not _is_sound(found):
        found = measure_device(device, quick=True)
        _write(_OF_DEVICE, Kept(key, found))
    return found


def speed_here(device: torch.device, host: Group) -> float:
    """`speed_together` of this rank: kept like `measured_here`, for the same ranks on the same cores. Collective.

    Where one rank has none, all measure: they do so together.
    """
    everyone = gather_objects(host, _key(device) | {"cores": _cores()})
    key = everyone[host.position] | {"rank": str(host.position), "beside": _digest(everyone)}
    found = _read(_OF_SPEED, key)
    if any(speed is None or not 0 < speed < _MOST for speed in gather_objects(host, found)):
        found = speed_together(device, host)
        _write(_OF_SPEED, Kept(key, found))
    assert found is not None
    return found


def cache_folder() -> Path | None:
    """Where a user's caches go; None for a user without a home."""
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(given) if given else Path.home() / ".cache") / "whalepy"
    except RuntimeError:
        return None


def _key(device: torch.device) -> dict[str, str]:
    key = {
        "format": str(_FORMAT),
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "local rank": os.environ.get("LOCAL_RANK", "0"),
        "local ranks": os.environ.get("LOCAL_WORLD_SIZE", "1"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        key["uuid"] = str(getattr(properties, "uuid", device.index))
    return key


def _cores() -> str:
    """Those that this process may run on, where the system tells."""
    return str(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ""


def _file(key: dict[str, str]) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / "measured" / f"{_digest(key)}.json"


def _digest(data: object) -> str:
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=12).hexdigest()


def _read(form: TypeAdapter[Kept[T]], key: dict[str, str]) -> T | None:
    path = _file(key)
    try:
        if path is None or not -60 < time.time() - path.stat().st_mtime < KEPT_S:
            return None
        kept = form.validate_json(path.read_bytes())
    except (OSError, ValueError):  # none there, or broken; pydantic's error is a ValueError
        return None
    return kept.measured if kept.key == key else None


_MOST = 1e30
"""FLOP/s and sizes beyond are no figures."""


def _is_sound(measured: Measured) -> bool:
    points = [point for of in (measured.products, measured.memory) for row in of.values() for point in row]
    return all(0 < p.size < _MOST and 0 < p.seconds < 1e6 for p in points) and measured.rate() > 0


def _write(form: TypeAdapter[Kept[T]], kept: Kept[T]) -> None:
    """Whole or not at all: another rank may read at the same time."""
    path = _file(kept.key)
    if path is None:
        return
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(form.dump_json(kept, indent=1))
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
