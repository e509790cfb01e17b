"""Devices that a user places by hand: each rank is timed on its own device, and gets its own rows in the saved plan."""

from __future__ import annotations

import pytest

import whalepy
from tests.dryrun.studies import chain, ids
from whalepy.dryrun.answer import saved
from whalepy.dryrun.loaded import costed
from whalepy.dryrun.strategies import levels_of
from whalepy.dryrun.study import Candidate, Study
from whalepy.dryrun.tried import Options, Tried
from whalepy.hardware.cluster import ClusterSpec
from whalepy.runtime.build import Recipe

CARDS = "1xV100-SXM2-16GB + 1xT4"
MIXED = "1xV100-SXM2-16GB + 1xT4 + 1xV100-SXM2-16GB + 1xT4"


def placed(*ranks: int, cards: str = CARDS) -> Candidate:
    """A chain on these devices of two, with as many replicas."""
    cluster, model = ClusterSpec.load(cards), chain(2)
    scopes = [whalepy.cluster(placement=[list(ranks)]), whalepy.replicate(len(ranks))]
    whalepy.annotate(model, {"": scopes})
    study = Study.of(Recipe(model), ids(), "adamw")
    return study.candidate(None, cluster, cluster.speeds())


def with_rows(candidate: Candidate, *rows: int) -> Tried:
    return Tried(candidate, rows, "", "", candidate.played(rows))


def test_each_rank_runs_on_its_own_device() -> None:
    candidate = placed(1, 0)
    assert [candidate.device(rank).type for rank in (0, 1)] == ["V100-SXM2-16GB", "T4"]
    assert [candidate.replica_of(rank) for rank in (0, 1)] == [1, 0]


def test_a_device_outside_all_scopes_does_nothing() -> None:
    tried = with_rows(placed(1), 8)
    assert tried.ranks == (1,) and tried.candidate.device(1).type == "T4"
    idle, busy = tried.played.tracks
    assert idle.busy_s == 0 < busy.busy_s == tried.step_s


def test_rows_stay_with_their_replica_in_the_saved_plan() -> None:
    tried = with_rows(placed(1, 0), 2, 6)
    assert [tried.rows_of(rank) for rank in (0, 1)] == [6, 2]
    plan = saved(tried, tried.candidate.study)
    (cut,) = plan.cuts
    assert plan.rank_of == (1, 0)
    assert 3 * cut.weights[0] == cut.weights[1]


def test_splits_of_unequal_devices_stay_as_they_were_forecast() -> None:
    """Two replicas of a fast and a slow card each, the second with three times the rows."""
    cluster = ClusterSpec.load(MIXED)
    study = Study.of(Recipe(chain(2)), ids(), "adamw")
    tried = with_rows(study.candidate(levels_of(2, 2), cluster, cluster.speeds()), 2, 6)
    forecast, kept = tried.candidate.plan, saved(tried, study)
    rows, split = ({cut.level: cut.weights for cut in plan.cuts} for plan in (kept, forecast))
    assert 3 * rows[0][0] == rows[0][1]
    assert abs(rows[1][1] / rows[1][0] - split[1][1] / split[1][0]) < 1e-9 and rows[1][1] < rows[1][0]


@pytest.mark.parametrize(("ranks", "rows"), [((1, 0), (2, 6)), ((1,), (8,))])
def test_a_saved_plan_is_costed_on_the_devices_it_is_for(ranks: tuple[int, ...], rows: tuple[int, ...]) -> None:
    candidate = placed(*ranks)
    tried = with_rows(candidate, *rows)
    again = costed(saved(tried, candidate.study), "plan.json", candidate.study, candidate.cluster, Options())
    assert again.rows == tried.rows and again.step_s == tried.step_s
