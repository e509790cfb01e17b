"""Planning among the ranks that started: reports, matching, one capture each, one plan for all."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from whalepy.errors import AnnotationError, PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.detect import RankReport, match_ranks, report_this_rank, spec_from_reports
from whalepy.planner.annotation import Chosen, scopes_of
from whalepy.planner.cost import Network
from whalepy.planner.decide import Cut, Orders
from whalepy.planner.degrees import Degrees, open_scopes
from whalepy.planner.loading import check_devices
from whalepy.planner.mesh import arrange
from whalepy.planner.placing import Arrangement
from whalepy.planner.placing import Place as PlaceOf
from whalepy.planner.plan import Plan, StagePlan, stage_plan
from whalepy.planner.schedule.kinds import DEFAULT, defers, parse_kind
from whalepy.primitives import annotate, annotated, scopes_on
from whalepy.program.analysis import Program
from whalepy.program.axes import evaluate
from whalepy.program.taskgraphs import stages_in
from whalepy.runtime.agreement import broadcast_object, gather_objects, raise_together
from whalepy.runtime.arguments import Arguments, leaf_shapes
from whalepy.runtime.build import Analysed, Recipe, analysed, captured_program, fingerprint, identity
from whalepy.runtime.extents import Grid, grid_of
from whalepy.runtime.groups import Group
from whalepy.runtime.measured_cache import measured_here, speed_here
from whalepy.runtime.pipeline import Pipeline, arranged, pipelined, scopes_in
from whalepy.runtime.programs import notes_of, programs_of, verify_ranks

Cluster = str | Path | dict[str, Any] | ClusterSpec | None


@dataclass(frozen=True)
class Choices:
    """Arguments of compile that steer the plan."""

    microbatches: int | None = None
    seed: int = 0
    plan: Plan | None = None
    schedule: str | None = None
    idle: bool = True
    """Whether devices that scopes cannot share may be left idle."""
    degrees: Degrees = ()
    """Of the scopes that leave them open."""


Chooser = Callable[[Recipe, Program, ClusterSpec, Arguments, Choices], Chosen | None]
"""What annotates a model that has no annotations, or settles open degrees; None: all devices, by their speeds."""


def plan_together(
    recipe: Recipe,
    cluster: Cluster,
    choices: Choices,
    device: torch.device,
    host: Group,
    chooser: Chooser,
    example: Arguments,
) -> tuple[Plan, Pipeline]:
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
        if choices.plan is not None:
            check_devices(choices.plan, state["spec"])
        state["placed"] = match_ranks(state["spec"], reports)
        state["lines"], state["program"] = program_for(recipe, example)

    together(prepare)
    _compare(host, example, state["lines"])

    def choose() -> None:
        if host.position == 0:
            state["chosen"] = _chosen(state["program"], recipe, state["spec"], example, choices, chooser)

    together(choose)
    chosen: Chosen | None = broadcast_object(host, state.get("chosen"))

    def follow_choice() -> None:
        if chosen is not None and chosen.annotation:
            annotate(recipe.model, scopes_of(chosen.annotation))
            _, state["program"] = program_for(recipe, example)

    together(follow_choice)
    choices = _with(choices, chosen)

    def make() -> None:
        if host.position == 0:
            made, state["main"] = planned(state["program"], state["spec"], state["placed"], choices)
            state["plan"] = _told(made, chosen)
            verify_ranks(state["main"], state["plan"], state["plan"].microbatches)

    together(make)
    text = broadcast_object(host, state["plan"].to_json() if host.position == 0 else None)

    def follow() -> None:
        if host.position != 0:
            given = replace(choices, plan=Plan.from_json(text))
            state["plan"], state["main"] = planned(state["program"], state["spec"], state["placed"], given)

    together(follow)
    if host.position == 0:
        _warn(state["plan"])
    return state["plan"], state["main"]


def _report(cluster: Cluster, device: torch.device, host: Group) -> RankReport:
    """What this rank says of itself; measured where no cluster is described and there is somebody to compare with."""
    if cluster is not None or host.size == 1:
        return report_this_rank(device)
    return report_this_rank(device, measured_here(device), speed_here(device, host))


def share_rows(model: nn.Module, cluster: Cluster, choices: Choices, device: torch.device, host: Group) -> Plan:
    """A plan of one replicate level over all ranks, for a model that is trained whole."""
    reports = gather_objects(host, _report(cluster, device, host))
    spec = spec_from_reports(reports) if cluster is None else ClusterSpec.load(cluster)
    placed = match_ranks(spec, reports)
    weights = _whole_shares(model, host.size) or tuple(spec.speeds())
    stage = StagePlan(
        mesh=(host.size,),
        cuts=(Cut(0, weights),),
        row_cuts=(0,),
        orders={},
        speeds=tuple(spec.speeds()),
        device_types=tuple(d.type for d in spec.devices),
        rank_of=tuple(placed.index(d) for d in range(len(placed))),
        devices=tuple(range(len(placed))),
    )
    return Plan(
        stages=(stage,),
        devices=host.size,
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


def _chosen(
    program: Program, recipe: Recipe, spec: ClusterSpec, example: Arguments, choices: Choices, chooser: Chooser
) -> Chosen | None:
    """What is chosen on several devices for a model without annotations, or where these leave something open."""
    if len(spec.devices) == 1 or _example_rows(program) == 0 or choices.plan is not None:
        return None
    bare = not scopes_on(recipe.model) and not any(op.scope for op in program.operators)
    in_time = stages_in(program) and spec.on_gpus and None in (choices.microbatches, choices.schedule)
    if not (bare or in_time or open_scopes(scopes_in(program))):
        return None
    return chooser(recipe, program, spec, example, choices)


def _with(choices: Choices, chosen: Chosen | None) -> Choices:
    if chosen is None:
        return choices
    count, schedule = choices.microbatches or chosen.microbatches, choices.schedule or chosen.schedule
    return replace(choices, microbatches=count, schedule=schedule, degrees=chosen.degrees)


def _told(plan: Plan, chosen: Chosen | None) -> Plan:
    if chosen is None:
        return plan
    return replace(plan, annotation=chosen.annotation, notes=(chosen.note, *plan.notes))


def plan_alone(recipe: Recipe, cluster: Cluster, choices: Choices, chooser: Chooser, example: Arguments) -> Plan:
    """The plan for a described cluster, made in this process alone."""
    alone = [report_this_rank(this_device())]
    spec = spec_from_reports(alone) if cluster is None else ClusterSpec.load(cluster)
    if choices.plan is not None:
        check_devices(choices.plan, spec)
    _, program = program_for(recipe, example)
    chosen = _chosen(program, recipe, spec, example, choices, chooser)
    if chosen is not None and chosen.annotation:
        with annotated(recipe.model, scopes_of(chosen.annotation)):
            _, program = program_for(recipe, example)
    choices = _with(choices, chosen)
    made = _told(planned(program, spec, tuple(range(len(spec.devices))), choices)[0], chosen)
    _warn(made)
    return made


def _warn(plan: Plan) -> None:
    for note in _waits(plan):
        warnings.warn(note, stacklevel=4)


def program_for(recipe: Recipe, example: Arguments) -> tuple[tuple[str, ...], Program]:
    """The fingerprint of a model's training program, and the program."""
    captured = captured_program(recipe, *example, training=True, wants="loss")
    program = analysed(captured, leaf_shapes(example), sync_batchnorm=recipe.sync_batchnorm)
    _check_stages(recipe.model, program)
    return fingerprint(program), program


def _check_stages(model: nn.Module, program: Program) -> None:
    """AnnotationError: no operator ran in a stage that was put on a module."""
    there = set(stages_in(program))
    for path, chain in scopes_on(model).items():
        for scope in chain:
            if scope.kind == "stage" and scope not in there:
                raise AnnotationError(
                    f'{scope!r} on "{path}" has no operators',
                    at=scope.at,
                    fix="put stages on modules whose forward computes something",
                )


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
    loads: Sequence[int] | None = None,
) -> tuple[Plan, Pipeline]:
    """The plan for ranks placed on the devices of a cluster, and the program it stands for.

    Default shares follow `speeds`, by device; without them those of the saved plan, or of the cluster. Devices go to
    stages by the `loads` of their operators; without them by their FLOPs.
    """
    given = choices.plan
    own = identity(program)
    if given is not None and given.fingerprint != own:
        raise PlanError(
            "the plan belongs to another model, or to another annotation of this one",
            fix="plan this model again, and save the plan",
        )
    rows = _example_rows(program)
    if choices.microbatches and choices.microbatches > max(rows, 1):
        raise PlanError(
            f"microbatches={choices.microbatches} cannot cut the {rows} rows of example_inputs",
            fix="choose fewer microbatches, or give a larger global batch",
        )
    schedule = choices.schedule or (DEFAULT if given is None else given.schedule)
    if speeds is None:
        speeds = spec.speeds() if given is None else speeds_of(given, len(placed))
    places = [PlaceOf(device.type, device.node) for device in spec.devices]
    degrees = choices.degrees or (() if given is None else given.degrees)
    chunks = parse_kind(schedule).chunks or 1
    arrangement = arranged(program, speeds, places, chunks, idle=choices.idle, loads=loads, degrees=degrees)
    by_stage = [[speeds[d] for d in devices] for devices in arrangement.devices]
    orders = None if given is None else [stage.orders for stage in given.stages]
    cut = _cut_in_time(program, arrangement, by_stage, orders, choices, rows, defers(schedule))
    main, found = cut.main, cut.orders
    network = Network(spec, range(len(spec.devices)))
    delays = [()] * len(main.stages) if given is None else [stage.delay_bytes for stage in given.stages]
    stages = tuple(
        stage_plan(
            made.decisions,
            order,
            speeds=tuple(own_speeds),
            device_types=tuple(spec.devices[d].type for d in devices),
            rank_of=tuple(placed.index(d) for d in devices),
            devices=devices,
            outer=_outer_levels(made, arrangement) if arrangement.stages else None,
            delay_bytes=told or network.delays(made.decisions.mesh, devices),
        )
        for made, order, own_speeds, devices, told in zip(
            main.stages, found, by_stage, arrangement.devices, delays, strict=True
        )
    )
    made = Plan(
        stages,
        devices=len(placed),
        schedule=schedule,
        microbatches=cut.microbatches,
        seed=choices.seed if given is None else given.seed,
        rows=rows,
        fingerprint=own,
        degrees=degrees,
    )
    fewer = _feeding_all(made) if choices.microbatches is None and given is None else made.microbatches
    if fewer != made.microbatches:
        fed = replace(choices, microbatches=fewer)
        return planned(program, spec, placed, fed, speeds=speeds, loads=loads)
    _check_rows(made, [p for stage in main.stages for chain in stage.chains for p in chain])
    _check_shared_rows(made)
    notes = (*notes_of(main), *cut.notes, *_waits(made))
    return replace(made, notes=notes, programs=programs_of(main, made)), main


def _waits(plan: Plan) -> Iterator[str]:
    """What a pipeline loses for want of microbatches, and which ranks are idle."""
    groups = len(plan.hosts)
    if groups > plan.microbatches:
        waiting = (groups - 1) / (plan.microbatches + groups - 1)
        yield (
            f"{plan.microbatches} microbatches are fewer than {groups} stages: every device waits {waiting:.0%} of a "
            "step or more; give more rows or microbatches="
        )
    for rank in plan.idle:
        yield f"rank {rank} is idle: the scopes cannot use all {plan.devices} devices"


def speeds_of(plan: Plan, devices: int) -> tuple[float, ...]:
    """The speeds of a saved plan by device."""
    found = [1.0] * devices
    for stage in plan.stages:
        for device, speed in zip(stage.devices, stage.speeds, strict=True):
            found[device] = speed
    return tuple(found)


_MICROBATCHES_PER_STAGE = 4
"""Of a pipeline where the user says nothing: the bubble is then at most a fifth of the step (GPipe, section 2.3)."""


@dataclass(frozen=True)
class _InTime:
    """A program cut into microbatches."""

    microbatches: int
    main: Pipeline
    orders: tuple[Orders, ...]
    notes: tuple[str, ...] = ()
    """Why a pipeline has one microbatch, where nobody asked for one."""


def _cut_in_time(
    program: Program,
    arrangement: Arrangement,
    speeds: Sequence[Sequence[float]],
    orders: Sequence[Orders] | None,
    choices: Choices,
    rows: int,
    later: bool,
) -> _InTime:
    """The program cut into as many microbatches as asked for, else as a pipeline needs.

    Chosen here, there is one where the loss is no sum over rows.
    """

    def cut(count: int, *notes: str) -> _InTime:
        return _InTime(count, *pipelined(program, arrangement, speeds, orders, microbatches=count, defers=later), notes)

    asked = choices.microbatches or (choices.plan.microbatches if choices.plan is not None else None)
    if asked is not None or len(set(arrangement.devices)) == 1:
        return cut(asked or 1)
    if any(way.kernel == "batch_statistics" for op in program.operators for way in op.options):
        return cut(1, "one microbatch: batch norm takes its statistics from all rows that it sees at once")
    wanted = max(min(_MICROBATCHES_PER_STAGE * len(arrangement.stages), rows // arrangement.copies), 1)
    try:
        return cut(wanted)
    except PlanError as error:
        return cut(1, f"one microbatch: {error.what}" + (f" ({error.at})" if error.at else ""))


def _outer_levels(made: Analysed, arrangement: Arrangement) -> int:
    """The levels of a stage that scopes around all stages own."""
    around = {own for own in arrangement.scopes.values() if own is not None}
    mesh = arrange(made.chains, prod(made.decisions.mesh))
    owned = [level for owners in mesh.owners.values() for level, owner in enumerate(owners) if owner in around]
    return max(owned, default=-1) + 1


def _check_shared_rows(plan: Plan) -> None:
    """PlanError: a rank would need other rows for one of its stages than for another."""
    for hosted in plan.hosts:
        grids = {(plan.stages[k].mesh, tuple(map(str, _row_table(plan, k)))) for k in hosted}
        if len({table for _, table in grids}) > 1:
            raise PlanError(
                f"stages {', '.join(map(str, hosted))} share devices but cut the rows in different ways",
                fix="give the stages that share devices the same replicate scopes",
            )


def _row_table(plan: Plan, k: int) -> list[list[tuple[int, int]]]:
    stage = plan.stages[k]
    grid = grid_of(plan, stage)
    by_rank = {rank: grid.row_pieces(plan.rows, stage.coordinates_of(rank)) for rank in stage.rank_of}
    return [by_rank[rank] for rank in sorted(by_rank)]


def _example_rows(program: Program) -> int:
    if program.batch is None:
        return 0
    return evaluate(program.axes.size(program.batch), program.hints)


def _check_rows(plan: Plan, primitives: Sequence[Any]) -> None:
    """Every replica with a share gets a row of the example batch; later steps may have fewer."""
    for stage in plan.stages:
        _check_rows_of_stage(plan, grid_of(plan, stage), primitives)


def _feeding_all(plan: Plan) -> int:
    """The most microbatches, of at most those of the plan, with rows for every replica; those of the plan if none."""
    for count in range(plan.microbatches, 0, -1):
        fewer = replace(plan, microbatches=count)
        if not any(grid_of(fewer, stage).without_rows(plan.rows) for stage in plan.stages):
            return count
    return plan.microbatches


def _check_rows_of_stage(plan: Plan, grid: Grid, primitives: Sequence[Any]) -> None:
    empty = grid.without_rows(plan.rows)
    if plan.rows and empty:
        replicas = next((p for p in primitives if p.kind == "replicate"), None)
        wanted = len(grid.rows(plan.rows))
        raise PlanError(
            f"example_inputs has {plan.rows} rows, too few for {wanted} replicas: {len(empty)} would get none",
            at=None if replicas is None else replicas.at,
            fix="give a larger global batch, a smaller degree, or more even shares",
        )


def this_device() -> torch.device:
    """The device of this rank: its cuda device under a launcher, else the first, else the cpu."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
