"""Stages that are forced on a model: cut anew for other devices, without another capture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from whalepy.dryrun.blocks import LEAST_IN_STAGES, folded
from whalepy.dryrun.grown import grown
from whalepy.dryrun.pipeline import PipelineTried
from whalepy.dryrun.staged import Staged, tried_in_stages
from whalepy.dryrun.stages import Block, staging
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.schedule.kinds import DEFAULT, parse_kind


@dataclass(frozen=True)
class Forced:
    """A model that is put in stages: the study of its repeated blocks without them, and all its blocks."""

    base: Study
    blocks: Sequence[Block]
    options: Options

    @property
    def model(self) -> nn.Module:
        """The model, whole."""
        return self.base.recipe.model

    def on(self, cluster: ClusterSpec, microbatches: int) -> PipelineTried | None:
        """The pipeline on other devices: of as many stages as they allow at most, and as many replicas.

        None where two stages are too many, or the blocks do not follow each other. Raises PlanError as `staging` does.
        """
        options = self.options
        chunks = parse_kind(options.schedule or DEFAULT).chunks or 1
        most = chunks * (len(cluster.devices) // (options.split or 1))
        count = min(options.stages or 1, most)
        if count < 2:
            return None
        free = options.shares if options.shares == "equal" else None
        now = replace(options, stages=count, replicate=None, shares=free, microbatches=microbatches)
        made = staging(now, self.blocks, cluster, type(self.model).__name__)
        with folded(self.model, least=LEAST_IN_STAGES, scopes=made.scopes) as kept:
            own = {at: made.scopes[first] for at, (first, *_) in zip(kept.paths, kept.stand_for, strict=True)}
            study = grown(self.base, kept, {"": made.scopes.get("", ()), **own})
            if study is None:
                return None
            tried = tried_in_stages(study, cluster, now, Staged(made.name))
            return tried if tried.verdict else None  # what it holds is rehearsed here, while the blocks are these
