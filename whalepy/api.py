"""compile() and plan(): the steps in order, on one screen."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whalepy.errors import PlanError, WhaleError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.detect import match_ranks, report_this_rank, spec_from_reports
from whalepy.planner.decide import decide
from whalepy.planner.plan import Plan, plan_of
from whalepy.runtime.agreement import broadcast_object, gather_objects, raise_together
from whalepy.runtime.arguments import Arguments, as_arguments
from whalepy.runtime.build import Analysed, Recipe, analysed, captured_program, leaf_shapes, rewritten, subject_of
from whalepy.runtime.groups import Group, start_process_group
from whalepy.runtime.parallel import ParallelModel

Cluster = str | Path | dict[str, Any] | ClusterSpec | None


def compile(  # noqa: A001
    model: nn.Module,
    cluster_spec: Cluster = None,
    example_inputs: Any = None,
    *,
    loss_fn: Callable[..., Any] | None = None,
    batch_dim: Any = 0,
    microbatches: int | None = None,
    seed: int = 0,
    plan: Plan | str | Path | None = None,
) -> ParallelModel:
    """The distributed training program of this rank."""
    device = this_device()
    host = start_process_group(device)
    recipe = Recipe(model, loss_fn, batch_dim)
    error: BaseException | None = None
    main: Analysed | None = None
    made: Plan | None = None
    reports = gather_objects(host, report_this_rank(device))
    try:
        spec = spec_from_reports(reports) if cluster_spec is None else ClusterSpec.load(cluster_spec)
        placed = match_ranks(spec, reports)
        main, made = _planned(recipe, as_arguments(example_inputs), spec, placed, microbatches, seed)
    except Exception as caught:
        error = caught
    raise_together(host, error)
    assert main is not None and made is not None
    return ParallelModel(recipe, made, device, host, main)


def _planned(
    recipe: Recipe, example: Arguments, spec: ClusterSpec, placed: tuple[int, ...], microbatches: int | None, seed: int
) -> tuple[Analysed, Plan]:
    captured = captured_program(recipe, *example, training=True, wants="loss")
    program = analysed(captured, leaf_shapes(example))
    speeds = spec.speeds()
    decisions, orders = decide(subject_of(program), speeds)
    rank_of = tuple(placed.index(device) for device in range(len(placed)))
    made = plan_of(
        decisions,
        orders,
        speeds=speeds,
        device_types=tuple(d.type for d in spec.devices),
        rank_of=rank_of,
        microbatches=microbatches or 1,
        seed=seed,
    )
    return Analysed(example, program, decisions, rewritten(program, decisions)), made


def this_device() -> torch.device:
    """The device of this rank: its cuda device under a launcher, else the first, else the cpu."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
