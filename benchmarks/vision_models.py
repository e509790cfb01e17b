"""Vision, multimodal and hand-written models of the catalogue: architectures that no rule was written for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.catalogue import Made
from benchmarks.own_parts import PARTS


def _part(make_model: Callable[[], torch.nn.Module], batch: Callable[[], dict[str, Any]]) -> Callable[[], Made]:
    def make() -> Made:
        torch.manual_seed(0)
        return make_model(), batch()

    return make


VISION: dict[str, Callable[[], Made]] = {
    **{name: _part(*part) for name, part in PARTS.items()},
}
