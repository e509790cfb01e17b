from __future__ import annotations

import pytest

from whalepy.errors import ClusterError
from whalepy.hardware.shorthand import Term, parse_shorthand, parse_terms

TERMS = [
    ("2x4090", Term(None, 2, "4090", 1.0)),  # a type that begins with digits
    ("2x2x4090", Term(2, 2, "4090", 1.0)),
    ("2xrtx-4090", Term(None, 2, "rtx-4090", 1.0)),  # a type with an x in it
    ("2xRTX-4090", Term(None, 2, "RTX-4090", 1.0)),
    ("8xV100-SXM2-32GB", Term(None, 8, "V100-SXM2-32GB", 1.0)),
    (" 4 x 8 x RTX 2080 Ti * 0.9 ", Term(4, 8, "RTX 2080 Ti", 0.9)),  # free spacing
    ("2Xcpu*.5", Term(None, 2, "cpu", 0.5)),
    ("2×cpu", Term(None, 2, "cpu", 1.0)),
]


@pytest.mark.parametrize(("text", "term"), TERMS)
def test_terms(text: str, term: Term) -> None:
    assert parse_terms(text) == (term,)


def shape(text: str) -> list[tuple[int, list[tuple[int, str]]]]:
    """(nodes alike, [(devices, type), ...]) in order."""
    nodes = parse_shorthand(text)["nodes"]
    return [(node["count"], [(item["count"], item["type"]) for item in node["devices"]]) for node in nodes]


NODES = [
    ("2xA + 2xB", [(1, [(2, "A"), (2, "B")])]),  # without @: one node
    ("2xA + 2xB @ 1Gbit/s", [(1, [(2, "A")]), (1, [(2, "B")])]),  # with @: a node each
    ("3x2xA + 2xB @ 1Gbit/s", [(3, [(2, "A")]), (1, [(2, "B")])]),
    ("1x2xA + 2xB + 1x2xC + 2xD", [(1, [(2, "A")]), (1, [(2, "B"), (2, "D")]), (1, [(2, "C")])]),  # B and D share
]


@pytest.mark.parametrize(("text", "nodes"), NODES)
def test_nodes(text: str, nodes: list[tuple[int, list[tuple[int, str]]]]) -> None:
    assert shape(text) == nodes


def test_bandwidth() -> None:
    assert parse_shorthand("2xA @ 8Gbit/s")["link"] == {"bandwidth": 1e9}
    assert "link" not in parse_shorthand("2xA")


GRAMMAR = "write `[NODES x] DEVICES x TYPE [* SPEED]`, for example 2x8xA100-SXM4-80GB or 2xcpu*0.5"
COUNT = "write a whole number of at least 1, or leave the term out"
SPEED = "write a positive figure, relative to the type's own speed: *0.5 is half as fast"
ERRORS = [
    ("A100", f"cannot read the cluster term 'A100'\n  fix: {GRAMMAR}"),
    ("2xcpu +", f"cannot read the cluster term ''\n  fix: {GRAMMAR}"),
    ("0xcpu", f"cluster term '0xcpu': 0 is not a number of devices\n  fix: {COUNT}"),
    ("0x2xcpu", f"cluster term '0x2xcpu': 0 is not a number of nodes\n  fix: {COUNT}"),
    ("-2xcpu", f"cluster term '-2xcpu': -2 is not a number of devices\n  fix: {COUNT}"),
    ("2.5xcpu", f"cluster term '2.5xcpu': 2.5 is not a number of devices\n  fix: {COUNT}"),
    ("2xcpu*0", f"cluster term '2xcpu*0': '0' is not a speed\n  fix: {SPEED}"),
    ("2xcpu*nan", f"cluster term '2xcpu*nan': 'nan' is not a speed\n  fix: {SPEED}"),
    ("2xcpu*", f"cluster term '2xcpu*': '' is not a speed\n  fix: {SPEED}"),
]


@pytest.mark.parametrize(("text", "message"), ERRORS)
def test_errors(text: str, message: str) -> None:
    with pytest.raises(ClusterError) as error:
        parse_shorthand(text)
    assert str(error.value) == message
