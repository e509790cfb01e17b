"""On CPUs, memory that tensors have let go of stays with the process, so that no step takes it from the system anew."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_GIVEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")
"""Environment variables that say what the C library does with freed memory."""


def keep_freed_memory(device: torch.device) -> bool:
    """Have the C library keep what is freed, if tensors live in its memory; whether it does.

    By default it takes large tensors from the system one by one, and gives back what is free at the end of a step;
    then every page is filled with zeros before it is used again. Left alone where the environment says what the library
    does, and where it is another than glibc. Source: mallopt(3).
    """
    if device.type != "cpu" or not sys.platform.startswith("linux") or any(name in os.environ for name in _GIVEN):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
