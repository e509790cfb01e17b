"""What this rank runs on: device type, free memory, and on request its measured speed."""

from __future__ import annotations

import os
import socket
import statistics
import time
from pathlib import Path

import torch

from whalepy.hardware.match import RankReport, match_ranks, spec_from_reports, type_name

__all__ = ["RankReport", "match_ranks", "measure_speed", "report_this_rank", "spec_from_reports"]

# Sides of the square float32 product that is timed: large enough for full speed, small enough to repeat.
_SIDE = {"cuda": 4096, "cpu": 512}
_WINDOWS = 5


def report_this_rank(device: torch.device, *, measure_seconds: float = 0.0) -> RankReport:
    """Host, type, free memory and local rank of this process; its speed too where `measure_seconds` is positive."""
    return RankReport(
        host=socket.gethostname(),
        type=type_name(torch.cuda.get_device_name(device)) if device.type == "cuda" else "cpu",
        memory_bytes=_free_bytes(device),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        speed=measure_speed(device, measure_seconds) if measure_seconds > 0 else None,
    )


def measure_speed(device: torch.device, seconds: float = 1.0) -> float:
    """Float32 FLOP/s of square matrix products on `device`, the median of five windows of `seconds` together.

    Ranks that share a host measure at the same time, so each gets what it will have in training.
    """
    side = _SIDE.get(device.type, _SIDE["cpu"])
    left, right = (torch.rand(side, side, device=device) for _ in range(2))
    out = torch.empty(side, side, device=device)
    torch.mm(left, right, out=out)  # first use: libraries load, caches fill
    _wait(device)
    rates = [_rate_in_window(left, right, out, seconds / _WINDOWS) for _ in range(_WINDOWS)]
    return statistics.median(rates)


def _rate_in_window(left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, seconds: float) -> float:
    start = time.perf_counter()
    products = 0
    while (spent := time.perf_counter() - start) < seconds or not products:
        torch.mm(left, right, out=out)
        _wait(left.device)
        products += 1
    return products * 2 * left.shape[0] ** 3 / spent


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
