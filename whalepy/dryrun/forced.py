"""Stages for other devices than those that are asked for, without another capture."""

from __future__ import annotations

from dataclasses import dataclass, replace

from whalepy.dryrun.blocks import LEAST_IN_STAGES, folded
from whalepy.dryrun.chosen import forced
from whalepy.dryrun.grown import grown
from whalepy.dryrun.pipeline import PipelineTried
from whalepy.dryrun.staged import tried_in_stages
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.schedule.kinds import DEFAULT, parse_kind


@dataclass(frozen=True)
class Forced:
    """A model that is put in stages: the study of the blocks that repeat, and what is asked for."""

    base: Study
    options: Options

    def on(self, cluster: ClusterSpec, stages: int) -> PipelineTried | None:
        """The pipeline on other devices, of as many stages as they allow at most, and as many replicas.

        None where there would not be two stages, or the blocks do not follow each other. Raises PlanError where what is
        asked for cannot be met.
        """
        asked, model = self.options, self.base.recipe.model
        chunks = parse_kind(asked.schedule or DEFAULT).chunks or 1
        count = min(stages, chunks * (len(cluster.devices) // (asked.split or 1)))
        if count < 2:
            return None
        shares = asked.shares if asked.shares == "equal" else None
        others = replace(asked, stages=count, replicate=None, shares=shares, widths=None)
        with folded(model, fold=bool(self.base.blocks.folds), scopes={}):
            staged, options = forced(self.base, cluster, others)
        with folded(model, least=LEAST_IN_STAGES, scopes=staged.scopes) as kept:
            paths = {first: path for path, (first, *_) in zip(kept.paths, kept.stand_for, strict=True)}
            own = {path: chain for path, chain in staged.scopes.items() if path in paths or path not in kept.whole}
            study = grown(self.base, kept, {paths.get(path, path): chain for path, chain in own.items()})
            if study is None:
                return None
            tried = tried_in_stages(study, cluster, options, staged)
            return tried if tried.verdict else None  # what it holds is rehearsed here, while the blocks are these
