"""The forms of cluster(placement)."""

import pytest

from whalepy.errors import AnnotationError
from whalepy.primitives import Placement, cluster

WRITTEN = [
    ("auto", Placement("auto")),
    ("all", Placement("all")),
    ({"average": 2}, Placement("average", 2)),
    ({"row": 1}, Placement("row", 1)),
    ({"type": "V100-SXM2-32GB"}, Placement("type", "V100-SXM2-32GB")),
    ({"node": 0}, Placement("node", 0)),  # nodes count from 0
    ([[0, 1], [2]], Placement("ranks", ((0, 1), (2,)))),  # virtual devices need not be equal
]


@pytest.mark.parametrize(("written", "placement"), WRITTEN, ids=[str(written) for written, _ in WRITTEN])
def test_every_form_is_stored_and_prints_as_it_is_written(written, placement: Placement) -> None:
    assert cluster(written).placement == placement
    assert repr(cluster(written)) == f"cluster({written!r})"
    assert cluster(placement).placement == placement


def test_rank_lists_are_kept_apart_from_the_users_lists() -> None:
    ranks = [[0, 1], [2, 3]]
    scope = cluster(ranks)
    ranks[0].append(9)
    assert scope.placement == Placement("ranks", ((0, 1), (2, 3)))


FORMS = (
    'write "auto", "all", {"average": 2}, {"row": 2}, {"type": "V100-SXM2-32GB"}, {"node": 0}, '
    "or one list of ranks per virtual device like [[0, 1], [2, 3]]"
)

REFUSED = [
    ("everywhere", "cluster('everywhere'): this is no placement"),
    (4, "cluster(4): this is no placement"),
    ({}, "cluster({}): a selection has one key, this has 0"),
    ({"type": "A100", "node": 0}, "cluster({'type': 'A100', 'node': 0}): a selection has one key, this has 2"),
    ({"column": 2}, "cluster({'column': 2}): 'column' is no selection"),
    ({0: 2}, "cluster({0: 2}): 0 is no selection"),
    ({"average": 0}, "cluster({'average': 0}): average takes a whole number of at least 1"),
    ({"row": "2"}, "cluster({'row': '2'}): row takes a whole number of at least 1"),
    ({"node": -1}, "cluster({'node': -1}): node takes a whole number of at least 0"),
    ({"type": 100}, "cluster({'type': 100}): the type is the name of a device type"),
    ({"type": ""}, "cluster({'type': ''}): the type is the name of a device type"),
    ([], "cluster([]): every virtual device is a list of at least one rank"),
    ([0, 1], "cluster([0, 1]): every virtual device is a list of at least one rank"),  # one list short
    ([[0], []], "cluster([[0], []]): every virtual device is a list of at least one rank"),
    ([[0, -1]], "cluster([[0, -1]]): -1 is no rank"),
    ([[None]], "cluster([[None]]): None is no rank"),
    ([["0"]], "cluster([['0']]): '0' is no rank"),
    ([[0, 1], [1]], "cluster([[0, 1], [1]]): rank 1 stands in it twice"),
]


@pytest.mark.parametrize(("written", "what"), REFUSED, ids=[what for _, what in REFUSED])
def test_other_forms_are_refused(written, what: str) -> None:
    line = cluster().at
    with pytest.raises(AnnotationError) as refused:
        cluster(written)
    at = f"test_placement.py:{int(line.rpartition(':')[2]) + 2}"
    assert str(refused.value) == f"{what}\n  at:  {at}\n  fix: {FORMS}"
