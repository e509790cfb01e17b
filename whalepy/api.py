"""compile() and plan(): the steps in order, on one screen."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whalepy.errors import AnnotationError, PlanError, WhaleError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.detect import match_ranks, report_this_rank, spec_from_reports
from whalepy.planner.decide import Cut
from whalepy.planner.plan import Plan, plan_of
from whalepy.primitives import scopes_on
from whalepy.program.analysis import Program
from whalepy.runtime.agreement import broadcast_object, gather_objects, raise_together
from whalepy.runtime.arguments import Arguments, as_arguments, leaf_shapes
from whalepy.runtime.build import (
    Analysed,
    Recipe,
    analysed,
    built,
    captured_program,
    fingerprint,
)
from whalepy.runtime.captured import CapturedModel
from whalepy.runtime.extents import Grid
from whalepy.runtime.groups import Group, start_process_group
from whalepy.runtime.parallel import ParallelModel
from whalepy.runtime.programs import notes_of, programs_of, verify_ranks
from whalepy.runtime.whole import WholeModel

Cluster = str | Path | dict[str, Any] | ClusterSpec | None
MEASURE_SECONDS = 0.3
"""How long each rank measures its speed when no cluster is described."""


@dataclass(frozen=True)
class Choices:
    """Arguments of compile that steer the plan."""

    microbatches: int | None = None
    seed: int = 0
    plan: Plan | None = None


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
    backend: str = "eager",
    capture: bool = True,
    loss_weight: Callable[..., Any] | None = None,
    plan: Plan | str | Path | None = None,
) -> ParallelModel:
    """The distributed training program of this rank. Every rank calls it alike, under torchrun; alone it runs locally.

    `example_inputs` is one global batch: a tuple of positional or a dict of keyword arguments of the model; without it
    the model is captured at the first `local_batch`. `cluster_spec` is a path, dict, `ClusterSpec` or shorthand such as
    `"2x4090 + 2x2080Ti"`; without it the ranks measure themselves. The model returns its loss, or `loss_fn(outputs,
    *targets)` makes it. Rank 0's initial values win.

    Raises WhaleError, the same on every rank: of annotation, cluster, capture, plan or verification.
    """
    _refuse_later(
        schedule=schedule, precision=precision, recompute=recompute, zero=zero or None, offload=offload,
        sync_batchnorm=sync_batchnorm or None, rebalance=rebalance,
        backend=None if backend == "eager" else backend, loss_weight=loss_weight if capture else None,
    )  # fmt: skip
    choices = _choices(microbatches, seed, plan)
    device = this_device()
    host = start_process_group(device)
    recipe = Recipe(model, loss_fn, batch_dim)
    if not capture:
        whole = WholeModel(
            recipe, device, host, partial(_share_rows, model, cluster_spec, choices, device, host), loss_weight
        )
        whole.start(None if example_inputs is None else as_arguments(example_inputs))
        return whole
    parallel = CapturedModel(recipe, device, host, partial(_plan_together, recipe, cluster_spec, choices, device, host))
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
    seed: int = 0,
    **later: Any,
) -> Plan:
    """The plan that `compile` would run, with the program of every rank; no process group, no weights, no GPU.

    Takes the arguments of `compile`. The model may live on the meta device.
    """
    defaults = {"backend": "eager", "capture": True, "optimizer": "adamw"}
    _refuse_later(**{k: v for k, v in later.items() if v not in (None, False, 0) and v != defaults.get(k)})
    if example_inputs is None:
        raise PlanError("a plan needs example_inputs", fix="give one global batch; values do not matter")
    recipe = Recipe(model, loss_fn, batch_dim)
    spec = (
        spec_from_reports([report_this_rank(this_device())]) if cluster_spec is None else ClusterSpec.load(cluster_spec)
    )
    _, program = _captured(recipe, as_arguments(example_inputs))
    ranks = tuple(range(len(spec.devices)))
    made, _ = _planned(program, spec, ranks, _choices(microbatches, seed, None))
    return made


def _choices(microbatches: int | None, seed: int, plan: Plan | str | Path | None) -> Choices:
    if microbatches is not None and microbatches < 1:
        raise PlanError(f"microbatches must be at least 1, not {microbatches}")
    if plan is None or isinstance(plan, Plan):
        return Choices(microbatches, seed, plan)
    try:
        text = Path(plan).read_text()
    except OSError as error:
        raise PlanError(f"the plan {plan} cannot be read: {error.strerror}") from error
    return Choices(microbatches, seed, Plan.from_json(text))


def _refuse_later(**options: Any) -> None:
    """An option whose feature has not landed is an error, never ignored."""
    for name, value in options.items():
        if value is not None:
            raise WhaleError(f"compile(..., {name}={value!r}) is not there yet", fix=f"leave out {name}=")


def _plan_together(
    recipe: Recipe, cluster: Cluster, choices: Choices, device: torch.device, host: Group, example: Arguments
) -> tuple[Plan, Analysed]:
    """Capture on every rank, compare, plan on rank 0, and take over its plan. An error on one rank is raised on all."""
    state: dict[str, Any] = {}

    def together(step: Callable[[], None]) -> None:
        error: BaseException | None = None
        try:
            step()
        except Exception as caught:
            error = caught
        raise_together(host, error)

    reports = gather_objects(host, report_this_rank(device, measure_seconds=0.0 if cluster else MEASURE_SECONDS))

    def prepare() -> None:
        state["spec"] = spec_from_reports(reports) if cluster is None else ClusterSpec.load(cluster)
        state["placed"] = match_ranks(state["spec"], reports)
        state["lines"], state["program"] = _captured(recipe, example)

    together(prepare)
    _compare(host, state["lines"])

    def make() -> None:
        if host.position == 0:
            state["plan"], state["main"] = _planned(state["program"], state["spec"], state["placed"], choices)
            verify_ranks(state["main"], state["plan"].rank_of, state["plan"].microbatches)

    together(make)
    text = broadcast_object(host, state["plan"].to_json() if host.position == 0 else None)

    def follow() -> None:
        if host.position != 0:
            given = replace(choices, plan=Plan.from_json(text))
            state["plan"], state["main"] = _planned(state["program"], state["spec"], state["placed"], given)

    together(follow)
    return state["plan"], state["main"]


def _share_rows(model: nn.Module, cluster: Cluster, choices: Choices, device: torch.device, host: Group) -> Plan:
    """A plan of one replicate level over all ranks, for a model that is trained whole."""
    reports = gather_objects(host, report_this_rank(device, measure_seconds=0.0 if cluster else MEASURE_SECONDS))
    spec = spec_from_reports(reports) if cluster is None else ClusterSpec.load(cluster)
    placed = match_ranks(spec, reports)
    weights = _whole_shares(model, host.size) or tuple(spec.speeds())
    return Plan(
        mesh=(host.size,),
        cuts=(Cut(0, weights),),
        row_cuts=(0,),
        orders={},
        speeds=tuple(spec.speeds()),
        device_types=tuple(d.type for d in spec.devices),
        rank_of=tuple(placed.index(d) for d in range(len(placed))),
        seed=choices.seed,
        notes=("the model is not captured: every rank runs it whole on its rows",),
    )


def _whole_shares(model: nn.Module, ranks: int) -> tuple[float, ...] | None:
    """Shares of the one replicate scope that an uncaptured model may have."""
    chains = scopes_on(model)
    for path, chain in chains.items():
        if path or len(chain) != 1 or chain[0].kind != "replicate" or chain[0].degree not in (None, ranks):
            raise AnnotationError(
                f"capture=False trains the whole model under one replicate level of {ranks} devices",
                at=chain[0].at,
                fix=f"annotate with {{'': whalepy.replicate({ranks})}} or not at all",
            )
        return chain[0].shares
    return None


def _captured(recipe: Recipe, example: Arguments) -> tuple[tuple[str, ...], Program]:
    captured = captured_program(recipe, *example, training=True, wants="loss")
    program = analysed(captured, leaf_shapes(example))
    return fingerprint(program), program


def _compare(host: Group, lines: tuple[str, ...]) -> None:
    """Raises PlanError on all ranks where ranks captured different programs, naming the first difference."""
    everyone = gather_objects(host, lines)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            pairs = zip(everyone[0], other, strict=False)
            first = next((f"{a!r} on rank 0, {b!r} on rank {rank}" for a, b in pairs if a != b), "more operators")
            raise PlanError(
                f"rank {rank} has another model than rank 0: {first}",
                fix="build the same model with the same annotations and example shapes on every rank",
            )


def _planned(program: Program, spec: ClusterSpec, placed: Sequence[int], choices: Choices) -> tuple[Plan, Analysed]:
    """The plan for ranks placed on the devices of a cluster, and the program it stands for."""
    given = choices.plan
    speeds = spec.speeds() if given is None else given.speeds
    if len(speeds) != len(placed):
        raise PlanError(f"the plan is for {len(speeds)} devices, {len(placed)} are here")
    microbatches = choices.microbatches or (given.microbatches if given is not None else 1)
    main, orders = built(program, speeds, None if given is None else given.orders, microbatches=microbatches)
    made = plan_of(
        main.decisions,
        orders,
        speeds=tuple(speeds),
        device_types=tuple(device.type for device in spec.devices),
        rank_of=tuple(placed.index(device) for device in range(len(placed))),
        microbatches=microbatches,
        seed=choices.seed if given is None else given.seed,
        rows=_example_rows(program),
    )
    _check_rows(made, [p for chain in main.chains for p in chain])
    programs = programs_of(main, made.rank_of, microbatches)
    return replace(made, notes=notes_of(main), programs=programs), main


def _example_rows(program: Program) -> int:
    if program.batch is None:
        return 0
    size = program.axes.size(program.batch)
    return size if isinstance(size, int) else int(size.subs(program.hints))


def _check_rows(plan: Plan, primitives: Sequence[Any]) -> None:
    """Every replica with a share gets a row of the example batch; later steps may have fewer."""
    grid = Grid(plan.mesh, plan.cuts, plan.row_cuts)
    rows = grid.rows(plan.rows)
    empty = [at for at, n in rows.items() if n == 0 and _has_share(grid, at)]
    if plan.rows and empty:
        replicas = next((p for p in primitives if p.kind == "replicate"), None)
        raise PlanError(
            f"example_inputs has {plan.rows} rows, too few for {len(rows)} replicas: {len(empty)} would get none",
            at=None if replicas is None else replicas.at,
            fix="give a larger global batch, a smaller degree, or more even shares",
        )


def _has_share(grid: Grid, at: tuple[int, ...]) -> bool:
    cuts = [grid.cuts[grid.row_cuts[level] or 0] for level in grid.row_levels]
    return all(cut.weights[position] > 0 for cut, position in zip(cuts, at, strict=True))


def this_device() -> torch.device:
    """The device of this rank: its cuda device under a launcher, else the first, else the cpu."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
