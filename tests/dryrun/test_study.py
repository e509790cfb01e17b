"""A study keeps what it has cut and rehearsed, by what was asked."""

from __future__ import annotations

from tests.dryrun.studies import candidate_of, chain
from whalepy.hardware.cluster import ClusterSpec


def test_cuts_are_kept_by_the_cluster_itself() -> None:
    """Not by where it lies in memory, where another one may lie later."""
    first = candidate_of(chain(2), (2, 1))
    study, speeds = first.study, first.cluster.speeds()
    again = study.candidate(first.levels, ClusterSpec.load("2xV100-SXM2-32GB"), speeds)
    other = study.candidate(first.levels, ClusterSpec.load("2xT4"), speeds)
    assert again.cut is first.cut and other.cut is not first.cut
    assert other.plan.device_types == ("T4", "T4")
