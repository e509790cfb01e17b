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

import torch
from pydantic import TypeAdapter

from whalepy.hardware.measured import Measured
from whalepy.runtime.measure import measure_device

# A machine that was busy while it was measured is not judged by that for longer.
KEPT_S = 24 * 3600.0
_FORMAT = 2


@dataclass(frozen=True)
class Kept:
    """The content of a file: for whom it was measured, so that a name that collides is noticed, and what."""

    key: dict[str, str]
    measured: Measured


def measured_here(device: torch.device) -> Measured:
    """What `device` does: as the cache folder has it, else measured now and put there.

    Kept apart by host, device, torch version, threads, and place among the ranks of the host: those share its cores. A
    file that is old, broken or of another key is measured anew; a folder that cannot be written is done without.
    """
    key = _key(device)
    path = _file(key)
    found = None if path is None else _read(path, key)
    if found is None:
        found = measure_device(device, quick=True)
        if path is not None:
            _write(path, Kept(key, found))
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


def _file(key: dict[str, str]) -> Path | None:
    folder = cache_folder()
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
    return None if folder is None else folder / "measured" / f"{digest}.json"


def _read(path: Path, key: dict[str, str]) -> Measured | None:
    try:
        if not -60 < time.time() - path.stat().st_mtime < KEPT_S:
            return None
        kept = TypeAdapter(Kept).validate_json(path.read_bytes())
    except (OSError, ValueError):  # none there, or broken; pydantic's error is a ValueError
        return None
    return kept.measured if kept.key == key and _is_sound(kept.measured) else None


def _is_sound(measured: Measured) -> bool:
    points = [point for of in (measured.products, measured.memory) for row in of.values() for point in row]
    return all(0 < p.size < 1e30 and 0 < p.seconds < 1e6 for p in points) and measured.rate() > 0


def _write(path: Path, kept: Kept) -> None:
    """Whole or not at all: another rank may read at the same time."""
    beside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_bytes(TypeAdapter(Kept).dump_json(kept, indent=1))
        beside.replace(path)
    except OSError:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
