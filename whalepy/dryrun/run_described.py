"""A dry run of a model that is given as a description of its layers: `whalepy plan layers:FILE`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from whalepy.dryrun.answer import Sizes, answer, subject_of
from whalepy.dryrun.described import DescribedStudy
from whalepy.dryrun.progress import Progress
from whalepy.dryrun.rehearse import OPTIMIZERS
from whalepy.dryrun.run import Request, options_of
from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.layer_profile import LayerFile, read_layers
from whalepy.hardware.near import did_you_mean
from whalepy.planner.forecast import Forecast

PREFIX = "layers:"
"""What a target of this kind begins with."""
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def run_described(request: Request, progress: Progress) -> tuple[Forecast, None]:
    """The forecast of a request whose target is `layers:FILE`. Raises WhaleError for one that cannot be met."""
    _check(request)
    cluster = ClusterSpec.load(request.cluster)
    file = read_layers(Path(request.target.removeprefix(PREFIX)))
    _check_precision(request.precision, file)
    study = DescribedStudy.of_file(file, request.optimizer, request.rows or file.rows)
    options = options_of(request)
    sizes = Sizes(file.parameters, file.parameters, file.dtype)
    subject = subject_of(file.name, sizes, study, cluster, options, file.tokens)
    measured = any(layer.seconds for layer in file.layers)
    if measured and cluster.figures == "data sheet":
        subject = replace(subject, figures="mixed")
    forecast, _ = answer(study, study.recipe.model, cluster, options, subject, progress)
    origin = f"costs of layers: {file.source or request.target}"
    return replace(
        forecast,
        assumptions=(origin, *forecast.assumptions),
        not_runnable=(*forecast.not_runnable, "layers without code"),
        fidelity="" if measured else forecast.fidelity,
    ), None


def _check(request: Request) -> None:
    if request.optimizer not in OPTIMIZERS:
        raise PlanError(f"no optimizer {request.optimizer!r}", fix=did_you_mean(request.optimizer, list(OPTIMIZERS)))
    if request.length is not None:
        raise PlanError("--seq-len needs a configuration", fix="describe the layers for rows of the length you want")
    if request.recompute in ("attention", "selective"):
        raise PlanError(
            f"--recompute {request.recompute} needs the model itself", fix="choose none or full: whole layers run again"
        )
    if request.stages not in (None, 1) or request.widths is not None:
        asked = f"--stages {request.stages}" if request.widths is None else "--widths"
        raise PlanError(f"{asked} needs the model itself", fix="leave it out: layers are replicated and split")
    if request.schedule is not None:
        raise PlanError(f"--schedule {request.schedule} is for stages, of which there are none", fix="leave it out")
    if request.keeps_plan:
        raise PlanError("layers without code have no program", fix="leave out --save and --program")


def _check_precision(precision: str | None, file: LayerFile) -> None:
    if precision is not None and _DTYPES[precision] != file.dtype:
        raise PlanError(
            f"--precision {precision}: the layers are described in {file.dtype}",
            fix="leave it out, or describe them in that type (`dtype:`)",
        )
