"""A dry run from its request: target, cluster and options in, forecast and plan out."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from whalepy.dryrun.answer import Sizes, answer, answer_in_stages, replicated, saved, sizes_of, subject_of
from whalepy.dryrun.beyond import adds_in_stages
from whalepy.dryrun.blocks import LEAST_IN_STAGES, NO_BLOCKS, Blocks, folded
from whalepy.dryrun.chosen import Ways, choices_of, estimates_of, forced, surveyed, with_estimates
from whalepy.dryrun.forced import Forced
from whalepy.dryrun.grown import grown
from whalepy.dryrun.loaded import AGAIN, ANOTHER, costed, kept
from whalepy.dryrun.pipeline import PipelineTried
from whalepy.dryrun.progress import Progress
from whalepy.dryrun.recompute import Recompute
from whalepy.dryrun.rehearse import OPTIMIZERS
from whalepy.dryrun.staged import Staged, saved_in_stages
from whalepy.dryrun.study import Study
from whalepy.dryrun.targets import Target, target_of
from whalepy.dryrun.tried import Balance, Options, Tried
from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.near import did_you_mean
from whalepy.planner.annotation import scopes_of
from whalepy.planner.forecast import Alternative, Forecast
from whalepy.planner.form import Width
from whalepy.planner.loading import check_devices, read_plan
from whalepy.planner.plan import Plan
from whalepy.planner.schedule.kinds import DEFAULT, parse_kind
from whalepy.primitives import Primitive, annotate, annotated, scopes_on
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
    widths: tuple[Width, ...] | None = None
    """Of the stages on each group of devices."""
    schedule: str | None = None
    balance: Balance = "exact"
    beyond: bool = True
    """Whether other schedules and savings of memory are tried, and whether the forecast says what more rows, longer
    sequences and fewer devices would do."""


def run(request: Request, progress: Progress) -> tuple[Forecast, Plan | None]:
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
    if given is not None and len(given.stages) > 1 and not scopes_on(model):
        annotate(model, scopes_of(given.annotation))
    with ExitStack() as put:
        bare = not _stages_on(model)
        asked = _Asked(target, recipe, example, cluster, options_of(request), request, sizes, progress, given, bare)
        forecast, best, whole = _answered(asked, put)
        if len(forecast.stages) > 1 and not forecast.fits and asked.may_choose:
            put.close()
            forecast, best, whole = _answered(replace(asked, request=replace(request, stages=1)), put)
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


@dataclass(frozen=True)
class _Asked:
    """What a dry run is made of."""

    target: Target
    recipe: Recipe
    example: Any
    cluster: ClusterSpec
    options: Options
    request: Request
    sizes: Sizes
    progress: Progress
    given: Plan | None
    """A saved plan."""
    bare: bool
    """Whether the user put no stages on the modules."""

    @property
    def may_choose(self) -> bool:
        """Whether stages may be chosen, or not."""
        return self.bare and self.given is None and self.request.stages is self.request.widths is None


def options_of(request: Request) -> Options:
    """What a request forces."""
    stages = None if request.stages == 1 else request.stages
    if request.widths is not None:
        stages = len(request.widths) * (parse_kind(request.schedule or DEFAULT).chunks or 1)
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
        stages,
        request.widths,
        request.schedule,
        request.balance,
        request.beyond,
    )


def _answered(asked: _Asked, put: ExitStack) -> tuple[Forecast, Tried, Study | None]:
    """The forecast, the plan behind it, and the study of the model if that is of the whole model.

    `put`: takes away the stages again that it puts on the model.
    """
    target, recipe, example, cluster = asked.target, asked.recipe, asked.example, asked.cluster
    options, request, sizes, progress, given = asked.options, asked.request, asked.sizes, asked.progress, asked.given

    def of(study: Study) -> tuple[Forecast, Tried]:
        subject = subject_of(target.name, sizes, study, cluster, options, target.tokens)
        tried = None if given is None else costed(given, str(request.plan), study, cluster, options)
        return answer(study, recipe.model, cluster, options, subject, progress, tried)

    progress("capturing the model")
    model = recipe.model
    staged = Staged() if given is None else Staged.saved(given, str(request.plan))
    estimates: tuple[Alternative, ...] = ()
    again: Forced | None = None
    known: _Known | None = None
    if options.stages is not None:
        known = _forced_stages(recipe, example, cluster, options, request, progress)
        staged, options, again = _fastest(*known, progress)
        put.enter_context(annotated(model, staged.scopes))
    elif given is None and asked.bare:
        with _unstaged(recipe, example, request) as study:
            if not stages_in(study.program):
                _check_no_schedule(options)
                found, faster = None, False
                if request.stages is None and _is_bare(study) and len(cluster.devices) > 1:
                    found, estimates, faster = _instead(study, cluster, options, progress)
                if not faster:
                    forecast, best = of(study)
                    if found is None or forecast.fits:
                        return with_estimates(forecast, estimates), best, None if study.blocks.folds else study
                assert found is not None
                known = found, *_based(study, found, progress)
        if known is not None:
            staged, options, again = _fastest(*known, progress)
        put.enter_context(annotated(model, staged.scopes))

    def in_stages(study: Study) -> tuple[Forecast, Tried]:
        if staged.given is None and not staged.flags:
            _check_degrees(options)
        _check_saved(study, given)
        subject = subject_of(target.name, sizes, study, cluster, options, target.tokens)
        forecast, best = answer_in_stages(study, cluster, options, subject, progress, staged)
        return with_estimates(forecast, estimates), best

    standing = _stages_on(model)
    if standing and given is None:
        with folded(model, least=LEAST_IN_STAGES) as blocks:
            study = None if again is None else grown(again.base, blocks, scopes_on(model))
            if study is None and blocks.folds:
                study = _folded_study(recipe, example, request, blocks)
            found = in_stages(study) if study is not None and standing.issuperset(stages_in(study.program)) else None
        if found is not None:
            return (*(_with_adds(*found, again, progress) if again and options.beyond else found), None)
    with folded(model, fold=False) as blocks:
        study = _study(recipe, example, request, blocks)
        if not stages_in(study.program):
            _check_no_schedule(options)
            return (*of(study), study)
        return (*in_stages(study), study)


def _with_adds(forecast: Forecast, best: Tried, again: Forced, progress: Progress) -> tuple[Forecast, Tried]:
    """The forecast with what each device adds to stages that are cut anew for the others."""
    progress("without a device")
    alike = replace(again, options=replace(again.options, schedule=forecast.schedule))
    added = adds_in_stages(best, lambda others: alike.on(others, len(forecast.stages)))
    return replace(forecast, devices=tuple(replace(d, adds=added[d.rank]) for d in forecast.devices)), best


@contextmanager
def _unstaged(recipe: Recipe, example: Any, request: Request) -> Generator[Study]:
    """The study of the model without most of its blocks; of the whole model where that cannot be."""
    with folded(recipe.model) as blocks:
        study = _folded_study(recipe, example, request, blocks) if blocks.folds else None
        if study is not None:
            yield study
            return
    with folded(recipe.model, fold=False) as blocks:
        yield _study(recipe, example, request, blocks)


def _stages_on(model: nn.Module) -> set[Primitive]:
    """The stages that stand on modules; a block that is left out takes none with it that the code itself enters."""
    return {scope for chain in scopes_on(model).values() for scope in chain if scope.kind == "stage"}


def _is_bare(study: Study) -> bool:
    """Whether the model has no annotations."""
    return not any(op.scope for op in study.program.operators if op.kind == "call")


_Known = tuple[Ways, tuple[Tried, ...] | None, Forced | None]
"""Ways to put a model in stages; the whole model on every device; how to play them: neither without lists of blocks."""


def _instead(
    study: Study, cluster: ClusterSpec, options: Options, progress: Progress
) -> tuple[Ways | None, tuple[Alternative, ...], bool]:
    """The best stages that fit, what the search expects of the best ways, and whether the stages beat one stage."""
    if options.zero is not None and options.zero > 1:  # not there yet with stages
        return None, (), False
    progress("looking for the best stages")
    found = surveyed(study, cluster, options.split)
    choices = choices_of(found, cluster, options)
    estimates = estimates_of(choices, cluster, options)
    staged = tuple(choice for choice in choices if len(choice.sizes) > 1)
    if not staged:
        return None, estimates, False
    one = next((choice.step_s for choice in choices if len(choice.sizes) == 1), math.inf)
    return Ways(found, staged, cluster, options), estimates, staged[0].step_s <= one * _WORTH_IT


_WORTH_IT = 0.97
"""Stages are taken for what they are expected to gain by more than this: one stage is simpler, and known better."""


def _forced_stages(
    recipe: Recipe,
    example: Any,
    cluster: ClusterSpec,
    options: Options,
    request: Request,
    progress: Progress,
) -> _Known:
    """The stages that are forced. Raises PlanError for a model that has annotations of its own."""
    with _unstaged(recipe, example, request) as study:
        if not _is_bare(study):
            asked = "--stages" if options.widths is None else "--widths"
            raise PlanError(
                "the model is annotated, so stages cannot be forced",
                fix=f"leave out {asked}, or return a model without annotations",
            )
        progress(f"looking for the best {options.stages} stages")
        ways = forced(study, cluster, options)
        return ways, *_based(study, ways, progress)


def _based(study: Study, ways: Ways, progress: Progress) -> tuple[tuple[Tried, ...] | None, Forced | None]:
    """The whole model tried on every device, and how to put it in stages."""
    if not study.blocks.paths:
        return None, None
    progress("the whole model on every device")
    _, options = ways.staged(ways.choices[0])
    return replicated(study, ways.cluster, options), Forced(study, ways.options)


def _fastest(
    ways: Ways, baselines: tuple[Tried, ...] | None, again: Forced | None, progress: Progress
) -> tuple[Staged, Options, Forced | None]:
    """The stages of the fastest of these ways, and what they are run with."""
    ways, choice, others = (ways, ways.choices[0], ()) if again is None else again.fastest(ways, progress)
    staged, options = ways.staged(choice)
    return replace(staged, baselines=baselines, others=others), options, again


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
    forced = ("stages", "widths", "schedule", "replicate", "split", "microbatches", "shares")
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
