"""What tensors let go of stays with the process, unless the environment says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from whalepy.runtime.kept_memory import keep_freed_memory

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
# Activations of 48 MiB each, which glibc by default takes from the system one by one.
STEPS = """
import resource, torch, whalepy
from torch import nn
model = nn.Sequential(nn.Linear(64, 4096), nn.ReLU(), nn.Linear(4096, 1))
parallel = whalepy.compile(model, "1xcpu", (torch.rand(3072, 64),), loss_fn=lambda y: y.mean())
batch = torch.rand(3072, 64)
pages = []
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parallel.train_step(batch)
    pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(pages))
"""


def _pages_per_step(**environment: str) -> int:
    """How many pages the system gives for a step at least, in a process of its own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "WHALEPY_"))}
    ran = subprocess.run(
        [sys.executable, "-c", STEPS], env=own | environment, capture_output=True, text=True, check=True
    )
    return int(ran.stdout.split()[-1])


@linux
def test_steps_take_no_pages_anew() -> None:
    """48 MiB are 12,288 pages."""
    assert _pages_per_step() < 1000


@linux
@pytest.mark.parametrize("environment", [{"WHALEPY_OFF": "kept-memory"}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_it_can_be_left_alone(environment: dict[str, str]) -> None:
    assert _pages_per_step(**environment) > 12_000


def test_memory_of_cards_is_not_the_librarys() -> None:
    assert not keep_freed_memory(torch.device("cuda"))
