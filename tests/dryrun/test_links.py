"""What crosses which link: traffic inside nodes, and out of them."""

from __future__ import annotations

import pytest

from tests.dryrun.studies import chain, ids, sent_on
from whalepy.dryrun.blocks import folded
from whalepy.dryrun.links import link_text, links_of
from whalepy.dryrun.strategies import levels_of
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Tried
from whalepy.hardware.cluster import ClusterSpec
from whalepy.runtime.build import Recipe

TWO_NODES = "2x2xV100-SXM2-32GB @ 10Gbit/s"


def tried(cluster: str, mesh: tuple[int, int]) -> Tried:
    model, spec = chain(2), ClusterSpec.load(cluster)
    with folded(model, fold=False) as blocks:
        study = Study.of(Recipe(model), ids(), "sgd", blocks)
    candidate = study.candidate(levels_of(*mesh), spec, spec.speeds())
    rows = (study.rows // mesh[0],) * mesh[0]
    return Tried(candidate, rows, "", "", candidate.played(rows))


def traffic(found: Tried) -> dict[str, int]:
    return {link.name: link.bytes for link in links_of(found)}


def test_a_ring_through_two_nodes_leaves_each_once() -> None:
    found = tried(TWO_NODES, (4, 1))
    each = sent_on(found.candidate.work(0, 2), 0)
    assert traffic(found) == {
        "inside node 0": each,
        "inside node 1": each,
        "out of node 0": each,
        "out of node 1": each,
    }
    out = links_of(found)[2]
    assert out.bandwidth_bytes_per_s == 1.25e9 and out.busy_s == each / 1.25e9


def test_a_split_inside_nodes_and_replicas_across() -> None:
    found = tried(TWO_NODES, (2, 2))
    work = found.candidate.work(0, 4)
    inside, between = 2 * sent_on(work, 1), 2 * sent_on(work, 0)
    assert inside > 0 < between
    assert traffic(found) == {
        "inside node 0": inside, "inside node 1": inside, "out of node 0": between, "out of node 1": between,
    }  # fmt: skip


def test_nodes_of_one_device_have_no_link_inside() -> None:
    found = tried("2x1xV100-SXM2-32GB @ 10Gbit/s", (2, 1))
    each = sent_on(found.candidate.work(0, 4), 0)
    assert traffic(found) == {"out of node 0": each, "out of node 1": each}


# The link as it is called in the head of the report.
NAMES = {
    "2x4090 + 2x2080Ti": "PCIe 3.0 x16",
    "2x3090": "PCIe 4.0 x16",  # the bridge joins pairs at most, and is usually absent
    "8xH100-SXM": "NVLink 4",
    "2x8xH100-SXM @ 400Gbit/s": "NVLink 4 inside, 400Gbit/s between nodes",
    "2x1xT4 @ 10Gbit/s": "10Gbit/s between nodes",
    "1xT4": "",
}


@pytest.mark.parametrize("cluster", NAMES)
def test_links_by_name(cluster: str) -> None:
    assert link_text(ClusterSpec.load(cluster)) == NAMES[cluster]


def test_a_link_that_was_given_is_its_bandwidth() -> None:
    spec = {"nodes": [{"devices": [{"type": "T4", "count": 2}], "link": {"bandwidth": "40Gbit/s"}}]}
    assert link_text(ClusterSpec.load(spec)) == "40Gbit/s"
