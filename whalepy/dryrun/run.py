"""A dry run from its request: target, cluster and options in, forecast and plan out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from whalepy.dryrun.answer import Options, answer, subject_of
from whalepy.dryrun.rehearse import OPTIMIZERS
from whalepy.dryrun.study import Study
from whalepy.dryrun.targets import target_of
from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.near import did_you_mean
from whalepy.planner.forecast import Forecast
from whalepy.planner.plan import Plan
from whalepy.runtime.build import Recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Request:
    """The options of `whalepy plan`."""

    target: str
    cluster: str
    rows: int | None = None
    length: int | None = None
    replicate: int | None = None
    split: int | None = None
    microbatches: int | None = None
    shares: tuple[float, ...] | Literal["equal"] | None = None
    precision: str | None = None
    optimizer: str = "adamw"
    top: int = 5


def run(request: Request, progress: Callable[[str], None]) -> tuple[Forecast, Plan]:
    """The forecast and the plan. Raises WhaleError for a request that cannot be met."""
    if request.optimizer not in OPTIMIZERS:
        raise PlanError(f"no optimizer {request.optimizer!r}", fix=did_you_mean(request.optimizer, list(OPTIMIZERS)))
    cluster = ClusterSpec.load(request.cluster)
    _check_precision(request.precision, cluster)
    progress("building the model")
    target = target_of(request.target, request.rows, request.length)
    model, example = _in_precision(target.model, target.example, request.precision)
    progress("capturing the model")
    study = Study.of(Recipe(model), example, request.optimizer)
    if request.rows is not None and study.rows != request.rows:
        study = study.with_rows(request.rows)
    if study.rows < 1:
        raise PlanError("the example batch has no rows", fix="return at least one row, or give --batch-size")
    options = Options(
        request.replicate,
        request.split,
        request.microbatches,
        request.shares,
        request.optimizer,
        request.precision,
        request.top,
    )
    subject = subject_of(target.name, model, study, cluster, options, target.tokens)
    found = answer(study, model, cluster, options, subject, progress)
    progress("")
    return found


def _check_precision(precision: str | None, cluster: ClusterSpec) -> None:
    """PlanError: a card without bfloat16 units."""
    if precision != "bf16":
        return
    lacking = sorted({d.type for d in cluster.devices if d.profile.vendor != "CPU" and not d.profile.bf16})
    if lacking:
        raise PlanError(f"{', '.join(lacking)} has no bfloat16 units", fix="use --precision fp16 or fp32")


def _in_precision(model: nn.Module, example: Any, precision: str | None) -> tuple[nn.Module, Any]:
    """The model and its batch in one floating type; None keeps the model's own."""
    if precision is None:
        return model, example
    dtype = DTYPES[precision]

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    return model.to(dtype), pytree.tree_map(cast, example)
