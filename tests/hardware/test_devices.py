"""The table: units, marks, rates."""

from __future__ import annotations

import pytest

from whalepy.errors import ClusterError
from whalepy.hardware.devices import GIB, DeviceProfile, known_profiles, profile_table


def test_every_row_has_the_figures_the_planner_needs() -> None:
    assert len(known_profiles()) == 43  # 42 accelerators and the CPU slot
    for row in known_profiles():
        figures = (row.memory_bytes, row.memory_bandwidth, row.fp32, row.link_bandwidth, row.peer_bandwidth)
        assert all(figure > 0 for figure in figures), row.name
        assert row.source
        assert row.vendor in {"NVIDIA", "AMD", "CPU"}


FIGURES = [
    ("V100-SXM2-32GB", "fp16", 125e12),  # TFLOP/s to FLOP/s
    ("A100-SXM4-80GB", "memory_bytes", 85167243264),  # exact where a device query was found
    ("GH200", "memory_bytes", 95 * GIB),  # usable GiB where only that was
    ("A30", "memory_bytes", int(24 * GIB * 0.95)),  # neither: marketed x 0.95
    ("V100-SXM2-16GB", "link_bandwidth", 150e9),  # one direction, all links
    ("RTX-3090", "peer_bandwidth", 31.5e9),  # its bridge joins pairs and is usually absent
    ("A100-SXM4-40GB", "peer_bandwidth", 300e9),  # a switch is always there
    ("P100-PCIE-16GB", "fp16", 18.7e12),  # native vector float16, no tensor cores
    ("GB200", "pcie_bandwidth", 0.0),  # its host link is not PCIe
    ("cpu", "fp32", 50e9),
    ("cpu", "memory_bytes", 4 * GIB),
]


@pytest.mark.parametrize(("name", "field", "value"), FIGURES)
def test_figures(name: str, field: str, value: float) -> None:
    assert getattr(profile_table()[name], field) == value


MARKS = [
    ("A30", "memory_bytes", "estimated"),  # ours: no print-out was found
    ("V100-SXM2-32GB", "memory_bytes", "?"),  # two marks on one cell: the later one says more
    ("K80", "memory_bytes", "derived"),
    ("A30", "link_bandwidth", "memory"),
    ("cpu", "fp32", "assumed"),
]


@pytest.mark.parametrize(("name", "field", "mark"), MARKS)
def test_marks(name: str, field: str, mark: str) -> None:
    assert dict(profile_table()[name].marks)[field] == mark


def test_a_sure_figure_has_no_mark() -> None:
    assert "fp32" not in dict(profile_table()["A100-SXM4-80GB"].marks)


RATES = [
    ("A100-SXM4-80GB", "float32", 19.5e12),
    ("A100-SXM4-80GB", "torch.bfloat16", 312e12),
    ("A100-SXM4-80GB", "tf32", 156e12),
    ("H100-SXM", "float8_e4m3fn", 1978.9e12),
    ("V100-SXM2-16GB", "bf16", 15.7e12),  # no units: computed in float32
    ("K80", "fp16", 4.37e12),
    ("cpu", "float64", 25e9),  # assumed half
]


@pytest.mark.parametrize(("name", "dtype", "rate"), RATES)
def test_rates(name: str, dtype: str, rate: float) -> None:
    assert profile_table()[name].rate(dtype) == rate


def test_no_float8_units() -> None:
    with pytest.raises(ClusterError) as error:
        profile_table()["T4"].rate("float8")
    assert str(error.value) == "T4 has no float8 units\n  fix: plan with float16, bfloat16 or float32"


def test_unknown_dtype() -> None:
    with pytest.raises(ClusterError) as error:
        profile_table()["T4"].rate("float31")
    assert str(error.value).splitlines()[0] == "no device has a rate for dtype 'float31'"
    assert "did you mean float32" in str(error.value)


def test_a_bridge_without_pcie_figure_is_used() -> None:
    own = DeviceProfile("x", "NVIDIA", "x", 1, 1.0, 1.0, link="bridge (else PCIe)", link_bandwidth=5e9)
    assert own.peer_bandwidth == 5e9
