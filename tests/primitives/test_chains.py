"""Which primitive may stand inside which."""

import itertools

import pytest

from whalepy.errors import AnnotationError
from whalepy.primitives import Primitive, cluster, replicate, split, stage
from whalepy.primitives.chains import check_chain, extended

KINDS = {"cluster": cluster, "replicate": replicate, "stage": stage, "split": split}

LEGAL_PAIRS = {
    *itertools.product(["cluster"], ["replicate", "stage", "split"]),
    *itertools.product(["replicate"], ["stage", "replicate", "split"]),
    *itertools.product(["stage"], ["replicate", "split"]),
}


def nests(chain: tuple[Primitive, ...]) -> bool:
    try:
        check_chain(chain)
    except AnnotationError:
        return False
    return True


def test_every_pair() -> None:
    pairs = itertools.product(KINDS, repeat=2)
    assert {(a, b) for a, b in pairs if nests((KINDS[a](), KINDS[b]()))} == LEGAL_PAIRS


LONGER = [
    (("cluster", "replicate", "stage", "split"), True),
    (("cluster", "replicate", "stage", "replicate", "split"), True),  # replicas of a pipeline of replicated stages
    (("replicate", "replicate", "replicate"), True),
    (("stage", "replicate", "stage"), False),  # each neighbour is legal: it still is a stage inside a stage
    (("cluster", "stage", "split", "split"), False),
    (("replicate", "split", "cluster"), False),
]


@pytest.mark.parametrize(("kinds", "legal"), LONGER)
def test_longer_chains(kinds: tuple[str, ...], legal: bool) -> None:
    assert nests(tuple(KINDS[kind]() for kind in kinds)) is legal


def test_one_object_is_one_scope() -> None:
    outer, inner = replicate(2), split(2)
    assert extended((outer, inner), outer) == (outer, inner)  # also where a second replicate could not stand
    assert extended((outer, inner), inner) == (outer, inner)


MESSAGES = [
    # inside, around (outermost first), the one named, the fix
    ("replicate", ("split",), "split", "inside split only plain operators may appear"),
    ("split", ("replicate", "split"), "split", "inside split only plain operators may appear"),
    ("stage", ("stage", "replicate"), "stage", "inside stage only replicate, split and plain operators may appear"),
    ("stage", ("stage", "split"), "split", "inside split only plain operators may appear"),  # the nearest is named
    ("cluster", ("stage",), "stage", "cluster is the outermost primitive: put everything else inside it"),
]


@pytest.mark.parametrize(("kind", "around", "named", "fix"), MESSAGES)
def test_the_whole_message(kind: str, around: tuple[str, ...], named: str, fix: str) -> None:
    chain = tuple(KINDS[outer]() for outer in around)
    at = {primitive.kind: primitive.at for primitive in chain}
    inner = KINDS[kind]()
    with pytest.raises(AnnotationError) as refused:
        extended(chain, inner)
    assert str(refused.value) == (f"{kind} cannot stand inside {named} ({at[named]})\n  at:  {inner.at}\n  fix: {fix}")
    assert inner.at not in at.values()
