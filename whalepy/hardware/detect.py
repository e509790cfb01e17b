"""What this rank runs on: host, device type, free memory."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import torch

from whalepy.hardware.match import RankReport, match_ranks, spec_from_reports, type_name
from whalepy.hardware.measured import Measured

__all__ = ["RankReport", "match_ranks", "report_this_rank", "spec_from_reports"]


def report_this_rank(device: torch.device, measured: Measured | None = None, speed: float | None = None) -> RankReport:
    """Host, type, free memory and local rank of this process; its speed too where it was measured.

    `speed`: in FLOP/s, while all ranks compute; else the best that was measured.
    """
    return RankReport(
        host=socket.gethostname(),
        type=type_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu",
        memory_bytes=_free_bytes(device),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        speed=speed or (measured.rate() or None if measured else None),
        measured=measured,
    )


def _free_bytes(device: torch.device) -> int:
    """Free memory: of the GPU, or this rank's part of the host's, as many ranks as the launcher says share it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return _available_host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _available_host_bytes() -> int:
    """What Linux calls available; elsewhere all physical memory."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    kibibytes = next((int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    if kibibytes is not None:
        return kibibytes * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
