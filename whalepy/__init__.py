"""whalepy: annotate a local PyTorch model, compile it, train it on every device for what it is worth."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "replicate": "whalepy.primitives",
    "split": "whalepy.primitives",
    "stage": "whalepy.primitives",
    "cluster": "whalepy.primitives",
    "annotate": "whalepy.primitives",
    "compile": "whalepy.api",
    "plan": "whalepy.api",
    "ParallelModel": "whalepy.runtime.parallel",
    "Plan": "whalepy.planner.plan",
    "rule": "whalepy.program.user_rules",
    "check_rule": "whalepy.runtime.check_rule",
    "ClusterSpec": "whalepy.hardware.cluster",
    "WhaleError": "whalepy.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'whalepy' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
