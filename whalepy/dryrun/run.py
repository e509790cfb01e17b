"""A dry run from its request: target, cluster and options in, forecast and plan out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from whalepy.dryrun.answer import Sizes, answer, answer_in_stages, replicated, saved, sizes_of, subject_of
from whalepy.dryrun.beyond import adds_in_stages
from whalepy.dryrun.blocks import LEAST_IN_STAGES, NO_BLOCKS, Blocks, folded
from whalepy.dryrun.forced import Forced
from whalepy.dryrun.grown import grown
from whalepy.dryrun.loaded import AGAIN, ANOTHER, costed, kept
from whalepy.dryrun.pipeline import PipelineTried
from whalepy.dryrun.recompute import Recompute
from whalepy.dryrun.rehearse import OPTIMIZERS
from whalepy.dryrun.staged import Staged, saved_in_stages
from whalepy.dryrun.stages import flops_of_blocks, staging, unfolded
from whalepy.dryrun.study import Study
from whalepy.dryrun.targets import Target, target_of
from whalepy.dryrun.tried import Balance, Options, Tried
from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.near import did_you_mean
from whalepy.planner.forecast import Forecast
from whalepy.planner.loading import check_devices, read_plan
from whalepy.planner.plan import Plan
from whalepy.primitives import Primitive, annotate, scopes_on
from whalepy.program.taskgraphs import stages_in
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
    zero: int | None = None
    recompute: Recompute | None = None
    keeps_plan: bool = True
    """Whether the plan is wanted beside the forecast: that takes the capture of the whole model."""
    plan: str | None = None
    """The file of a saved plan, to be costed anew."""
    stages: int | None = None
    schedule: str | None = None
    balance: Balance = "exact"


def run(request: Request, progress: Callable[[str], None]) -> tuple[Forecast, Plan | None]:
    """The forecast and, where it is wanted, the plan. Raises WhaleError for a request that cannot be met."""
    if request.optimizer not in OPTIMIZERS:
        raise PlanError(f"no optimizer {request.optimizer!r}", fix=did_you_mean(request.optimizer, list(OPTIMIZERS)))
    cluster = ClusterSpec.load(request.cluster)
    given = None if request.plan is None else read_plan(request.plan)
    if given is not None:
        _check_alone(request)
        check_devices(given, cluster)
    _check_precision(request.precision, cluster)
    progress("building the model")
    target = target_of(request.target, request.rows, request.length)
    sizes = sizes_of(target.model)
    model, example = _in_precision(target.model, target.example, request.precision)
    recipe = Recipe(model)
    options = options_of(request)
    forecast, best, whole = _answered(target, recipe, example, cluster, options, request, sizes, progress, given)
    chosen = None
    if given is not None:
        chosen = kept(given, best)
    elif request.keeps_plan:
        if whole is None:
            progress("capturing the whole model")
            whole = _study(recipe, example, request, NO_BLOCKS)
        chosen = saved_in_stages(best, whole) if isinstance(best, PipelineTried) else saved(best, whole)
    progress("")
    return forecast, chosen


def options_of(request: Request) -> Options:
    """What a request forces."""
    return Options(
        request.replicate,
        request.split,
        request.microbatches,
        request.shares,
        request.optimizer,
        request.precision,
        request.top,
        request.zero,
        request.recompute,
        None if request.stages == 1 else request.stages,
        request.schedule,
        request.balance,
    )


def _answered(
    target: Target,
    recipe: Recipe,
    example: Any,
    cluster: ClusterSpec,
    options: Options,
    request: Request,
    sizes: Sizes,
    progress: Callable[[str], None],
    given: Plan | None,
) -> tuple[Forecast, Tried, Study | None]:
    """The forecast, the plan behind it, and the study of the model if that is of the whole model."""

    def of(study: Study) -> tuple[Forecast, Tried]:
        subject = subject_of(target.name, sizes, study, cluster, options, target.tokens)
        tried = None if given is None else costed(given, str(request.plan), study, cluster, options)
        return answer(study, recipe.model, cluster, options, subject, progress, tried)

    progress("capturing the model")
    staged = Staged() if given is None else Staged.saved(given, str(request.plan))
    forced: Forced | None = None
    if options.stages is not None:
        staged, forced = _put_in_stages(recipe, example, cluster, options, request, progress)
    elif given is None and not _stages_on(recipe.model):
        with folded(recipe.model) as blocks:
            study = _folded_study(recipe, example, request, blocks) if blocks.folds else None
            if study is not None and not stages_in(study.program):
                _check_no_schedule(options)
                return (*of(study), None)

    def in_stages(study: Study) -> tuple[Forecast, Tried]:
        if options.stages is None:
            _check_degrees(options)
        _check_saved(study, given)
        subject = subject_of(target.name, sizes, study, cluster, options, target.tokens)
        return answer_in_stages(study, cluster, options, subject, progress, staged)

    put = _stages_on(recipe.model)
    if put and given is None:
        with folded(recipe.model, least=LEAST_IN_STAGES) as blocks:
            study = None if forced is None else grown(forced.base, blocks, scopes_on(recipe.model))
            if study is None and blocks.folds:
                study = _folded_study(recipe, example, request, blocks)
            found = in_stages(study) if study is not None and put.issuperset(stages_in(study.program)) else None
        if found is not None:
            return (*(found if forced is None else _with_adds(*found, forced, progress)), None)
    with folded(recipe.model, fold=False) as blocks:
        study = _study(recipe, example, request, blocks)
        if not stages_in(study.program):
            _check_no_schedule(options)
            return (*of(study), study)
        return (*in_stages(study), study)


def _with_adds(
    forecast: Forecast, best: Tried, forced: Forced, progress: Callable[[str], None]
) -> tuple[Forecast, Tried]:
    """The forecast with what each device adds to stages that are cut anew for the others."""
    progress("without a device")
    added = adds_in_stages(best, lambda others: forced.on(others, best.candidate.microbatches))
    return replace(forecast, devices=tuple(replace(d, adds=added[d.rank]) for d in forecast.devices)), best


def _stages_on(model: nn.Module) -> set[Primitive]:
    """The stages that stand on modules; a block that is left out takes none with it that the code itself enters."""
    return {scope for chain in scopes_on(model).values() for scope in chain if scope.kind == "stage"}


def _put_in_stages(
    recipe: Recipe,
    example: Any,
    cluster: ClusterSpec,
    options: Options,
    request: Request,
    progress: Callable[[str], None],
) -> tuple[Staged, Forced | None]:
    """The stages that are forced, put on the model, and how to cut others if its repeated blocks stand for all.

    Raises PlanError for a model that has annotations of its own.
    """
    model = recipe.model
    weighed = baselines = base = None
    with folded(model) as blocks:
        study = _folded_study(recipe, example, request, blocks) if blocks.folds else None
        weighed = None if study is None else flops_of_blocks(model, study, blocks)
        if study is not None and not stages_in(study.program):
            progress("the whole model on every device")
            base, baselines = study, replicated(study, cluster, options)
    if weighed is None:
        with folded(model, fold=False) as blocks:
            study = _study(recipe, example, request, blocks)
            weighed = flops_of_blocks(model, study, blocks)
    assert study is not None
    if any(op.scope for op in study.program.operators if op.kind == "call"):
        raise PlanError(
            "the model is annotated, so stages cannot be forced",
            fix="leave out --stages, or return a model without annotations",
        )
    made = staging(options, unfolded(weighed), cluster, type(model).__name__)
    annotate(model, made.scopes)
    forced = None if base is None else Forced(base, unfolded(weighed), options)
    return Staged(made.name, made.flags, made.text, baselines=baselines), forced


def _check_no_schedule(options: Options) -> None:
    if options.schedule is not None:
        raise PlanError(
            f"--schedule {options.schedule} is for stages, of which there are none",
            fix="give --stages, or annotate the model with whalepy.stage()",
        )


def _check_degrees(options: Options) -> None:
    forced = [name for name in ("replicate", "split", "shares") if getattr(options, name) is not None]
    forced += ["balance"] if options.balance != "exact" else []
    if forced:
        raise PlanError(
            f"the model is annotated, so --{forced[0]} cannot be forced",
            fix=f"leave out --{forced[0]}, or return a model without annotations",
        )


def _check_saved(study: Study, given: Plan | None) -> None:
    if given is not None and study.identity(None) != given.fingerprint:
        raise PlanError(ANOTHER, fix=AGAIN)


def _folded_study(recipe: Recipe, example: Any, request: Request, blocks: Blocks) -> Study | None:
    """The study of a model without most of its blocks; None for one that counts them, or takes them in its own way."""
    try:
        study = _study(recipe, example, request, blocks)
    except Exception:
        return None
    return study if blocks.stand_for_all(study.program.nodes) else None


def _study(recipe: Recipe, example: Any, request: Request, blocks: Blocks) -> Study:
    study = Study.of(recipe, example, request.optimizer, blocks, master=request.precision in ("bf16", "fp16"))
    if request.rows is not None and study.rows != request.rows:
        study = study.with_rows(request.rows)
    if study.rows < 1:
        raise PlanError("the example batch has no rows", fix="return at least one row, or give --batch-size")
    return study


def _check_alone(request: Request) -> None:
    """PlanError: something that the saved plan has decided is forced too."""
    forced = ("stages", "schedule", "replicate", "split", "microbatches", "shares")
    for name in (name for name in forced if getattr(request, name) is not None):
        raise PlanError(f"--{name} and --plan cannot both decide", fix=f"leave out --{name}, or plan without --plan")


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

    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model, pytree.tree_map(cast, example)
