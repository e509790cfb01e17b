"""Nothing that can be given as a cluster ends in anything but a cluster or one sentence: no traceback, no waiting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from whalepy.errors import ClusterError
from whalepy.hardware.cluster import ClusterSpec

TERM = "cannot read the cluster term"
SOURCES: list[tuple[Any, str]] = [
    ("1000000x8xA100-SXM4-80GB @ 1GB/s", "the cluster has 8,000,000 devices, more than 65,536"),
    ("9" * 5000 + "xcpu", "cluster term"),  # more digits than Python turns into a number
    ("1x" + "9" * 30 + "xcpu", "cluster term"),
    ("", TERM),
    (" ", TERM),
    ("+", TERM),
    ("a" * 5000, TERM),  # too long for a file name
    ("\0", TERM),  # no file name either
    ("2xcpu @", "'' is not a bandwidth"),
    ("2xcpu*nan", "cluster term '2xcpu*nan': 'nan' is not a speed"),
    ("2xcpu*1e400", "cluster term '2xcpu*1e400': '1e400' is not a speed"),
    ("2x1xcpu @ 1e308TB/s", "'1e308TB/s' is not a bandwidth"),  # finite, but not in bytes
    ("2x1xcpu @ 5e-324bit/s", "link.bandwidth is 0.0"),  # positive, but not in bytes
    ("/", "cannot read the cluster file '/': it is a folder"),
    (Path("/dev/zero"), "cannot read the cluster file '/dev/zero': it is not a plain file"),  # would never end
    (None, "None does not describe a cluster"),
    (b"2xcpu", "b'2xcpu' does not describe a cluster"),
    ({"nodes": None}, "nodes is None"),
    ({"nodes": [None]}, "nodes[0] is None"),
    ({1: 2}, "nodes is missing"),
    ({"nodes": [{"devices": "2xcpu"}], None: 1}, "None is not a known field"),
    ({"nodes": [{"devices": [{"type": None}]}]}, "nodes[0].devices[0].type is None"),
    ({"nodes": [{"devices": [{"type": "cpu", "count": True}]}]}, "nodes[0].devices[0].count is True"),
    ({"nodes": [{"devices": [{"type": "cpu", "count": 10**5000}]}]}, "nodes[0].devices[0].count is a number of"),
    ({"nodes": [{"devices": [{"type": "cpu", "memory_gib": 1e308}]}]}, "nodes[0].devices[0].memory_gib is 1e+308"),
    ({"nodes": [{"devices": "2xcpu", "link": {"bandwidth": "fast"}}]}, "nodes[0].link.bandwidth is 'fast'"),
    ({"nodes": [{"devices": "2xcpu", "link": True}]}, "nodes[0].link is True"),
]


@pytest.mark.parametrize(("source", "what"), SOURCES, ids=range(len(SOURCES)))
def test_sources(source: Any, what: str) -> None:
    with pytest.raises(ClusterError) as error:
        ClusterSpec.load(source)
    assert error.value.what.startswith(what)
    assert len(error.value.what) < 200  # what was given is cut off
    assert error.value.fix


PROFILES: list[tuple[Any, str, str]] = [
    (
        {"base": "T4", "fp32": 35.6},
        "profiles.A.fp32 is 35.6",
        "write it in FLOP/s or bytes/s: 35.6 TFLOP/s is 35.6e+12",
    ),
    ({"base": "T4", "memory_bandwidth": 936}, "profiles.A.memory_bandwidth is 936", "write it in FLOP/s or bytes/s"),
    ({"base": "3091"}, "profiles.A.base: unknown device '3091'", "did you mean RTX-3090?"),
    ({"base": "T4", "file": "x.yaml"}, "profiles.A has both base and file", "leave one of them out"),
    ("none.yaml", "cannot read the cluster file 'none.yaml': No such file or directory", "give the path"),
    (5, "profiles.A is 5", "write it as a table of fields"),
    ({"base": "T4", "memory_efficiency": []}, "profiles.A.memory_efficiency is []", "list at least one"),
    ({"base": "T4", "memory_efficiency": [[1]]}, "profiles.A.memory_efficiency[0][1] is [1]", "write each point as"),
    ({"base": "T4", "memory_efficiency": [[2, 1], [1, 1]]}, "profiles.A.memory_efficiency is", "list the points by"),
    (
        {"base": "T4", "memory_efficiency": [[1, 0]]},
        "profiles.A.memory_efficiency[0][1] is 0",
        "write a figure above 0",
    ),
    (
        {"base": "T4", "product_efficiency": {"float31": [[1, 1]]}},
        "profiles.A.product_efficiency is {'float31': [[1, 1]]}",
        "no device has a rate for dtype 'float31'; did you mean float32",
    ),
]


@pytest.mark.parametrize(("profile", "what", "fix"), PROFILES)
def test_profiles(profile: Any, what: str, fix: str) -> None:
    with pytest.raises(ClusterError) as error:
        ClusterSpec.load({"nodes": [{"devices": "1xA"}], "profiles": {"A": profile}})
    assert error.value.what.startswith(what)
    assert (error.value.fix or "").startswith(fix)


def test_a_misspelled_type_of_ones_own() -> None:
    with pytest.raises(ClusterError) as error:
        ClusterSpec.load({"nodes": [{"devices": "1xFastCrad"}], "profiles": {"FastCard": {"base": "T4"}}})
    assert str(error.value) == "unknown device 'FastCrad'\n  fix: did you mean FastCard?"


FILES: list[tuple[str, str | bytes, str]] = [
    ("a.json", "", "broken JSON: Expecting value"),
    ("a.yaml", b"\xff\xfe\x00", "cannot read the cluster file"),  # no text
    ("a.yaml", "nodes: 2020-13-45", "cannot read the cluster file: month must be in 1..12"),
    ("a.yaml", "nodes: [{devices: 2xcpu, count: " + "9" * 5000 + "}]", "cannot read the cluster file: Exceeds"),
    ("a.json", '{"nodes": ' + "9" * 5000 + "}", "cannot read the cluster file: Exceeds"),
    ("a.json", "[" * 100_000, "cannot read the cluster file: maximum recursion"),
    ("a.yaml", "[" * 3_000, "cannot read the cluster file: maximum recursion"),
    ("a.yaml", "nodes:\n\t- a", "broken YAML: found character '\\t' that cannot start any token"),
    ("a.yaml", "a: \x01", "broken YAML: unacceptable character"),
    ("a.yaml", "!!python/object:os.system x", "broken YAML: could not determine a constructor"),  # nothing is run
    ("a.yaml", "[1, 2]", "the cluster is [1, 2]"),
    ("a.yaml", "true", "the cluster is True"),
    ("a.yaml", "nodes: [{devices: 1xA}]\nprofiles: {A: a.yaml}", "profile files name each other in a circle"),
    ("a.yaml", "nodes: [{devices: {type: a.yaml}}]", "profile files name each other in a circle"),
]


@pytest.mark.parametrize(("name", "content", "what"), FILES, ids=range(len(FILES)))
def test_files(tmp_path: Path, name: str, content: str | bytes, what: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ClusterError) as error:
        ClusterSpec.load(path)
    assert error.value.what.startswith(what)
    assert str(path) in str(error.value)


def test_a_profile_file_with_several_types(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text("nodes: [{devices: 1xA}]\nprofiles: {A: {base: T4}, B: {base: T4}}")
    path = tmp_path / "c.yaml"
    path.write_text("nodes: [{devices: 1xB}]\nprofiles: {B: two.yaml}")  # one of that name
    assert ClusterSpec.load(path).devices[0].profile.torch_name == "Tesla T4"
    path.write_text("nodes: [{devices: 1xC}]\nprofiles: {C: two.yaml}")
    with pytest.raises(ClusterError) as error:
        ClusterSpec.load(path)
    assert error.value.what == "the file holds 2 profiles, none of them C"


FIELDS = st.sampled_from(
    [
        *("nodes", "devices", "count", "type", "speed", "memory_gib", "memory_bytes", "link", "bandwidth"),
        *("latency_s", "profiles", "base", "file", "fp32"),
    ]
)
WORDS = st.sampled_from(["2xcpu", "cpu", "T4", "1xT4 + 1x3090", "1GB/s", "A", "x.yaml", "2x2xcpu", "1e9", ""])
FIGURES = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), WORDS, st.text(max_size=9))
TREES = st.recursive(
    FIGURES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(FIELDS, inner, max_size=4))
)


@given(TREES)
def test_any_tree(tree: Any) -> None:
    _load(tree)
    _load({"nodes": tree})
    _load({"nodes": [{"devices": tree}], "link": "1GB/s"})
    _load({"nodes": [{"devices": "1xA"}], "profiles": {"A": tree}})


@given(st.text(alphabet="0123456789xX*+@.eE-/ \n\tcpuT4GbitsB/"))
def test_any_line(line: str) -> None:
    _load(line)


@given(st.text(), st.sampled_from(["a.yaml", "a.json"]))
def test_any_file(tmp_path_factory: pytest.TempPathFactory, text: str, name: str) -> None:
    path = tmp_path_factory.getbasetemp() / name
    path.write_text(text, encoding="utf-8", errors="replace")
    _load(path)


def _load(source: Any) -> None:
    """A cluster that is the same when its plain data is read again, or an error in a sentence."""
    try:
        spec = ClusterSpec.load(source)
    except ClusterError as error:
        assert error.what and error.fix, repr(error)
        return
    assert 0 < min(spec.speeds()) <= max(spec.speeds()) == 1
    assert ClusterSpec.load(json.loads(json.dumps(spec.to_dict()))) == spec
    assert ClusterSpec.load(yaml.safe_load(yaml.safe_dump(spec.to_dict()))) == spec
