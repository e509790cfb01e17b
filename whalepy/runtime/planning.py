"""Planning among the ranks that started: reports, matching, one capture each, one plan for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whalepy.errors import AnnotationError, PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.detect import RankReport, match_ranks, report_this_rank, spec_from_reports
from whalepy.planner.decide import Cut
from whalepy.planner.plan import Plan, plan_of
from whalepy.primitives import scopes_on
from whalepy.program.analysis import Program
from whalepy.program.axes import evaluate
from whalepy.runtime.agreement import broadcast_object, gather_objects, raise_together
from whalepy.runtime.arguments import Arguments, leaf_shapes
from whalepy.runtime.build import Analysed, Recipe, analysed, built, captured_program, fingerprint, identity
from whalepy.runtime.extents import Grid
from whalepy.runtime.groups import Group
from whalepy.runtime.measured_cache import measured_here
from whalepy.runtime.programs import notes_of, programs_of, verify_ranks

Cluster = str | Path | dict[str, Any] | ClusterSpec | None


@dataclass(frozen=True)
class Choices:
    """Arguments of compile that steer the plan."""

    microbatches: int | None = None
    seed: int = 0
    plan: Plan | None = None


def plan_together(
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

    reports = gather_objects(host, _report(cluster, device, host))

    def prepare() -> None:
        state["spec"] = spec_from_reports(reports) if cluster is None else ClusterSpec.load(cluster)
        state["placed"] = match_ranks(state["spec"], reports)
        state["lines"], state["program"] = program_for(recipe, example)

    together(prepare)
    _compare(host, example, state["lines"])

    def make() -> None:
        if host.position == 0:
            state["plan"], state["main"] = planned(state["program"], state["spec"], state["placed"], choices)
            verify_ranks(state["main"], state["plan"].rank_of, state["plan"].microbatches)

    together(make)
    text = broadcast_object(host, state["plan"].to_json() if host.position == 0 else None)

    def follow() -> None:
        if host.position != 0:
            given = replace(choices, plan=Plan.from_json(text))
            state["plan"], state["main"] = planned(state["program"], state["spec"], state["placed"], given)

    together(follow)
    return state["plan"], state["main"]


def _report(cluster: Cluster, device: torch.device, host: Group) -> RankReport:
    """What this rank says of itself; measured where no cluster is described and there is somebody to compare with."""
    measured = measured_here(device) if cluster is None and host.size > 1 else None
    return report_this_rank(device, measured)


def share_rows(model: nn.Module, cluster: Cluster, choices: Choices, device: torch.device, host: Group) -> Plan:
    """A plan of one replicate level over all ranks, for a model that is trained whole."""
    reports = gather_objects(host, _report(cluster, device, host))
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


def plan_alone(recipe: Recipe, cluster: Cluster, choices: Choices, example: Arguments) -> Plan:
    """The plan for a described cluster, made in this process alone."""
    alone = [report_this_rank(this_device())]
    spec = spec_from_reports(alone) if cluster is None else ClusterSpec.load(cluster)
    _, program = program_for(recipe, example)
    made, _ = planned(program, spec, tuple(range(len(spec.devices))), choices)
    return made


def program_for(recipe: Recipe, example: Arguments) -> tuple[tuple[str, ...], Program]:
    """The fingerprint of a model's training program, and the program."""
    captured = captured_program(recipe, *example, training=True, wants="loss")
    program = analysed(captured, leaf_shapes(example), sync_batchnorm=recipe.sync_batchnorm)
    return fingerprint(program), program


def _compare(host: Group, example: Arguments, lines: tuple[str, ...]) -> None:
    """Raises PlanError on all ranks where ranks captured different programs, naming the first difference."""
    for rank, shapes in enumerate(examples := gather_objects(host, leaf_shapes(example))):
        if shapes != examples[0]:
            raise PlanError(
                f"example_inputs have shapes {shapes} on rank {rank} and {examples[0]} on rank 0",
                fix="give every rank the same global batch",
            )
    everyone = gather_objects(host, lines)
    for rank, other in enumerate(everyone):
        if other != everyone[0]:
            pairs = zip(everyone[0], other, strict=False)
            told = ((_brief(a, b), _brief(b, a)) for a, b in pairs if a != b)
            first = next((f"{own} on rank 0, {its} on rank {rank}" for own, its in told), "more operators")
            raise PlanError(
                f"rank {rank} has another model than rank 0: {first}",
                fix="build the same model with the same annotations and example shapes on every rank",
            )


def _brief(line: str, other: str) -> str:
    """The operator of a line where that tells it from the other, else the whole line."""
    operator, theirs = line.split(" ", 2)[:2], other.split(" ", 2)[:2]
    return repr(line) if operator == theirs else f"{operator[0]} ({operator[1]})"


def planned(
    program: Program,
    spec: ClusterSpec,
    placed: Sequence[int],
    choices: Choices,
    *,
    speeds: Sequence[float] | None = None,
) -> tuple[Plan, Analysed]:
    """The plan for ranks placed on the devices of a cluster, and the program it stands for.

    Default shares follow `speeds`, by device; without them those of the saved plan, or of the cluster.
    """
    given = choices.plan
    if speeds is None:
        speeds = spec.speeds() if given is None else given.speeds
    own = identity(program)
    if given is not None and given.fingerprint != own:
        raise PlanError(
            "the plan belongs to another model, or to another annotation of this one",
            fix="plan this model again, and save the plan",
        )
    if choices.microbatches and choices.microbatches > max(_example_rows(program), 1):
        raise PlanError(
            f"microbatches={choices.microbatches} cannot cut the {_example_rows(program)} rows of example_inputs",
            fix="choose fewer microbatches, or give a larger global batch",
        )
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
        fingerprint=own,
    )
    _check_rows(made, [p for chain in main.chains for p in chain])
    programs = programs_of(main, made.rank_of, microbatches)
    return replace(made, notes=notes_of(main), programs=programs), main


def _example_rows(program: Program) -> int:
    if program.batch is None:
        return 0
    return evaluate(program.axes.size(program.batch), program.hints)


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
