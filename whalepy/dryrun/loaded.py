"""A saved plan costed anew: the very levels, axes and shares that it holds, on the cluster that is given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from whalepy.dryrun.strategies import levels_of_plan
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options, Tried
from whalepy.errors import PlanError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.loading import check_devices
from whalepy.planner.plan import Plan
from whalepy.primitives import scopes_on
from whalepy.runtime.extents import Grid
from whalepy.runtime.planning import Choices, planned, speeds_of


def costed(plan: Plan, file: str, study: Study, cluster: ClusterSpec, options: Options) -> Tried:
    """The plan of a file, played. Raises PlanError where it belongs to another model or to other devices.

    The study is of the whole model: a plan knows its model by all of its operators.
    """
    check_devices(plan, cluster)
    levels = None if scopes_on(study.recipe.model) else levels_of_plan(plan)
    if study.identity(levels) != plan.fingerprint:
        raise PlanError(ANOTHER, fix=AGAIN)
    speeds = speeds_of(plan, len(cluster.devices))
    candidate = study.settled(plan.degrees).candidate(
        levels, cluster, speeds, plan.microbatches, options.savings, plan.orders
    )
    made = candidate.plan
    if (made.mesh, made.row_cuts, made.cuts) != (plan.mesh, plan.row_cuts, plan.cuts):  # scopes of another kind
        raise PlanError(ANOTHER, fix=AGAIN)
    rows = tuple(Grid(plan.mesh, plan.cuts, plan.row_cuts).rows(study.rows).values())
    named = " > ".join(f"{level.kind} {level.degree}" for level in levels or ()) or "as annotated"
    shares = f"shares {':'.join(map(str, rows))}" if 1 < len(rows) <= _FEW else ""
    parts = [f"saved plan {Path(file).name}: {named}", shares, *options.savings.words]
    return Tried(candidate, rows, ", ".join(filter(None, parts)), f"--plan {file}", candidate.played(rows))


ANOTHER = "the plan belongs to another model, or to another annotation of this one"
AGAIN = "plan this model again, and save the plan"
_FEW = 8
"""Shares that are written out."""


def kept(plan: Plan, best: Tried) -> Plan:
    """The same plan with the programs of its ranks."""
    if len(best.candidate.plan.stages) > 1:
        return replace(plan, programs=best.candidate.plan.programs)
    cut = best.candidate.cut
    places = tuple(range(len(cut.cluster.devices)))
    made, _ = planned(cut.program, cut.cluster, places, Choices(plan=plan))
    return replace(plan, programs=made.programs)
