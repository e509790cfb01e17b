"""What each primitive takes, and the whole message for what it does not."""

import math
from fractions import Fraction

import numpy
import pytest

from whalepy.errors import AnnotationError
from whalepy.primitives import Primitive, cluster, replicate, split, stage

PRINTED = [
    (replicate(), "replicate()"),
    (replicate(2), "replicate(2)"),
    (replicate(numpy.int64(2)), "replicate(2)"),  # counts often come out of numpy
    (replicate(2, shares=(3, 1)), "replicate(2, shares=(3, 1))"),
    (replicate(shares=[0.5, 0.25]), "replicate(2, shares=(0.5, 0.25))"),  # the degree is the number of shares
    (replicate(shares=(Fraction(1, 4), numpy.float32(3))), "replicate(2, shares=(0.25, 3))"),
    (replicate(shares=(1,)), "replicate(1, shares=(1,))"),
    (split(4, on="head.weight:0"), "split(4, on='head.weight:0')"),
    (split(shares=(1, 0)), "split(2, shares=(1, 0))"),  # a device may get nothing
    (stage(), "stage()"),
    (stage(2), "stage(2)"),
    (cluster(), "cluster('auto')"),
]


@pytest.mark.parametrize(("primitive", "printed"), PRINTED, ids=[printed for _, printed in PRINTED])
def test_a_primitive_prints_as_it_is_written(primitive: Primitive, printed: str) -> None:
    assert repr(primitive) == printed


def test_fields_hold_checked_values() -> None:
    primitive = split(numpy.int64(2), shares=[3, 1], on="head.weight:0")
    assert (primitive.kind, primitive.degree, primitive.shares) == ("split", 2, (3.0, 1.0))
    assert (primitive.on, primitive.placement) == ("head.weight:0", None)
    assert type(primitive.degree) is int
    assert stage(3).degree == 3


def degree_fix(name: str) -> str:
    return f"give {name} as 1 or more, or leave it out to let the planner decide"


LENGTH = "give one weight per part; without a degree, it is the number of shares"
WEIGHT = "give every part a finite weight of 0 or more"
POSITIVE = "give at least one part a positive weight"
LIST = "write one weight per part: (3, 1)"
ON = 'write the parameter\'s name and its dim: on="head.weight:0"'

REFUSED = [
    # degrees
    (lambda: replicate(0), "replicate(degree=0): degree is a whole number of at least 1", degree_fix("degree")),
    (lambda: split(-2), "split(degree=-2): degree is a whole number of at least 1", degree_fix("degree")),
    (lambda: stage(1.0), "stage(devices=1.0): devices is a whole number of at least 1", degree_fix("devices")),
    (lambda: stage("2"), "stage(devices='2'): devices is a whole number of at least 1", degree_fix("devices")),
    # Python counts True as 1
    (lambda: replicate(True), "replicate(degree=True): degree is a whole number of at least 1", degree_fix("degree")),
    # `@replicate` without parentheses hands it the function
    (lambda: replicate(len), "replicate is used as a decorator without parentheses", "write @replicate()"),
    (lambda: stage(int), "stage is used as a decorator without parentheses", "write @stage()"),
    # shares
    (lambda: replicate(2, shares=(3, 1, 1)), "replicate(shares=(3, 1, 1)): 3 shares for a degree of 2", LENGTH),
    (lambda: split(shares=(3, -1)), "split(shares=(3, -1)): -1 is no weight", WEIGHT),
    (lambda: split(shares=(math.nan, 1)), "split(shares=(nan, 1)): nan is no weight", WEIGHT),
    (lambda: split(shares=(math.inf, 1)), "split(shares=(inf, 1)): inf is no weight", WEIGHT),
    (lambda: split(shares=(None, 1)), "split(shares=(None, 1)): None is no weight", WEIGHT),
    (lambda: split(shares=("3", "1")), "split(shares=('3', '1')): '3' is no weight", WEIGHT),
    (lambda: replicate(shares=(0, 0)), "replicate(shares=(0, 0)): no part has a positive weight", POSITIVE),
    (lambda: replicate(shares=()), "replicate(shares=()): no part has a positive weight", POSITIVE),
    (lambda: replicate(shares=3), "replicate(shares=3): shares are a list of weights", LIST),
    (lambda: replicate(shares="31"), "replicate(shares='31'): shares are a list of weights", LIST),
    # on
    (lambda: split(on="head.weight"), "split(on='head.weight'): this names no dim of a parameter", ON),
    (lambda: split(on="head.weight:-1"), "split(on='head.weight:-1'): this names no dim of a parameter", ON),
    (lambda: split(on=":0"), "split(on=':0'): this names no dim of a parameter", ON),
    (lambda: split(on=0), "split(on=0): this names no dim of a parameter", ON),
]


@pytest.mark.parametrize(("make", "what", "fix"), REFUSED, ids=[what for _, what, _ in REFUSED])
def test_a_wrong_argument_is_refused(make, what: str, fix: str) -> None:
    with pytest.raises(AnnotationError) as refused:
        make()
    at = f"test_arguments.py:{make.__code__.co_firstlineno}"  # the user's line
    assert str(refused.value) == f"{what}\n  at:  {at}\n  fix: {fix}"
