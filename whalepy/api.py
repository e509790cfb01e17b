"""compile() and plan(): the steps in order, on one screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from whalepy.errors import PlanError, WhaleError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.annotation import Chosen, scopes_of
from whalepy.planner.loading import read_plan
from whalepy.planner.plan import Plan
from whalepy.primitives import Primitive, annotate, annotated, scopes_on
from whalepy.program.analysis import Program
from whalepy.runtime.arguments import Arguments, as_arguments
from whalepy.runtime.build import Recipe
from whalepy.runtime.captured import CapturedModel
from whalepy.runtime.groups import start_process_group
from whalepy.runtime.kept_memory import keep_freed_memory
from whalepy.runtime.parallel import ParallelModel
from whalepy.runtime.pieces import EAGER, check_backend
from whalepy.runtime.planning import Choices, Chooser, Cluster, plan_alone, plan_together, share_rows, this_device
from whalepy.runtime.switches import turned_off
from whalepy.runtime.whole import WholeModel


def compile(
    model: nn.Module,
    cluster_spec: Cluster = None,
    example_inputs: Any = None,
    *,
    loss_fn: Callable[..., Any] | None = None,
    batch_dim: int | Mapping[str | int, int | None] = 0,
    microbatches: int | None = None,
    schedule: str | None = None,
    precision: str | None = None,
    recompute: str | None = None,
    zero: int | None = None,
    offload: str | None = None,
    optimizer: str = "adamw",
    sync_batchnorm: bool = False,
    rebalance: str | None = None,
    seed: int = 0,
    backend: str = EAGER,
    capture: bool = True,
    loss_weight: Callable[..., Any] | None = None,
    plan: Plan | str | Path | None = None,
) -> ParallelModel:
    """The distributed training program of this rank. Every rank calls it alike, under torchrun; alone it runs locally.

    `example_inputs` is one global batch: a tuple of positional or a dict of keyword arguments of the model; without it
    the model is captured at the first `local_batch`. `cluster_spec` is a path, dict, `ClusterSpec` or shorthand such as
    `"2x4090 + 2x2080Ti"`; without it the ranks measure themselves. The model returns its loss, or `loss_fn(outputs,
    *targets)` makes it. Rank 0's initial values win. `backend` is one of torch.compile's, such as "inductor", for what
    lies between the exchanges of a step.

    Raises WhaleError, the same on every rank: of annotation, cluster, capture, plan or verification.
    """
    _refuse_later(
        precision=precision, recompute=recompute, zero=zero or None, offload=offload,
        rebalance=rebalance, loss_weight=loss_weight if capture else None,
        backend=None if capture or backend == EAGER else backend,
    )  # fmt: skip
    check_backend(backend)
    choices = _choices(microbatches, seed, plan, schedule)
    annotate(model, _scopes_of(choices.plan, model))
    device = this_device()
    host = start_process_group(device)
    off = turned_off(host)
    if "kept-memory" not in off:
        keep_freed_memory(device)
    recipe = Recipe(model, loss_fn, batch_dim, sync_batchnorm)
    if not capture:
        whole = WholeModel(
            recipe, device, host, partial(share_rows, model, cluster_spec, choices, device, host), loss_weight
        )
        whole.start(None if example_inputs is None else as_arguments(example_inputs))
        return whole
    planner = partial(plan_together, recipe, cluster_spec, choices, device, host, _chooser(optimizer))
    parallel = CapturedModel(recipe, device, host, planner, off, backend)
    if example_inputs is not None:
        parallel.start(as_arguments(example_inputs))
    return parallel


def plan(
    model: nn.Module,
    cluster_spec: Cluster = None,
    example_inputs: Any = None,
    *,
    loss_fn: Callable[..., Any] | None = None,
    batch_dim: int | Mapping[str | int, int | None] = 0,
    microbatches: int | None = None,
    schedule: str | None = None,
    sync_batchnorm: bool = False,
    seed: int = 0,
    plan: Plan | str | Path | None = None,
    **later: Any,
) -> Plan:
    """The plan that `compile` would run, with the program of every rank; no process group, no weights, no GPU.

    Takes the arguments of `compile`. The model may live on the meta device. A saved `plan` is that plan again, with its
    programs. Raises PlanError where it belongs to another model or to other devices.
    """
    check_backend(later.pop("backend", EAGER))
    defaults = {"capture": True, "optimizer": "adamw"}
    _refuse_later(**{k: v for k, v in later.items() if v not in (None, False, 0) and v != defaults.get(k)})
    if example_inputs is None:
        raise PlanError("a plan needs example_inputs", fix="give one global batch; values do not matter")
    choices = _choices(microbatches, seed, plan, schedule)
    recipe = Recipe(model, loss_fn, batch_dim, sync_batchnorm)
    chooser = _chooser(later.get("optimizer", "adamw"))
    with annotated(model, _scopes_of(choices.plan, model)):
        made = plan_alone(recipe, cluster_spec, choices, chooser, as_arguments(example_inputs))
    return made if choices.plan is None else replace(choices.plan, programs=made.programs)


def _chooser(optimizer: str) -> Chooser:
    """What annotates a model that has no annotations, or settles open degrees: a dry run on the devices there are."""

    def choose(
        recipe: Recipe, program: Program, spec: ClusterSpec, example: Arguments, choices: Choices
    ) -> Chosen | None:
        from whalepy.dryrun.left_open import chosen_for
        from whalepy.dryrun.progress import OnTerminal

        return chosen_for(recipe, program, spec, example, choices, optimizer, OnTerminal())

    return choose


def _choices(
    microbatches: int | None, seed: int, plan: Plan | str | Path | None, schedule: str | None = None
) -> Choices:
    if microbatches is not None and microbatches < 1:
        raise PlanError(f"microbatches must be at least 1, not {microbatches}")
    return Choices(microbatches, seed, None if plan is None else read_plan(plan), schedule)


def _scopes_of(plan: Plan | None, model: nn.Module) -> dict[str, list[Primitive]]:
    """What a saved plan was made with, for a model without scopes."""
    return {} if plan is None or scopes_on(model) else scopes_of(plan.annotation)


def _refuse_later(**options: Any) -> None:
    """An option whose feature has not landed is an error, never ignored."""
    for name, value in options.items():
        if value is not None:
            raise WhaleError(f"compile(..., {name}={value!r}) is not there yet", fix=f"leave out {name}=")
