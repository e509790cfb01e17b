"""Names of devices: every way users and torch write them."""

from __future__ import annotations

import pytest

from whalepy.errors import ClusterError
from whalepy.hardware.profiles import known_profiles, profile

NAMES = [
    ("3090", "RTX-3090"),
    ("RTX 3090", "RTX-3090"),
    ("rtx3090", "RTX-3090"),
    ("2080Ti", "RTX-2080-Ti"),
    ("GeForce RTX 2080 Ti", "RTX-2080-Ti"),  # older drivers leave NVIDIA out
    ("NVIDIA TITAN RTX", "Titan-RTX"),  # newer drivers put it in
    ("V100-SXM2-32GB", "V100-SXM2-32GB"),
    ("Tesla V100-SXM2-32GB-LS", "V100-SXM2-32GB"),
    ("V100-32GB", "V100-SXM2-32GB"),  # one form factor has this memory
    ("A100-80GB", "A100-SXM4-80GB"),
    ("A100 SXM 40g", "A100-SXM4-40GB"),
    ("A10", "A10"),  # not A100, not A10G
    ("A10G", "A10G"),
    ("L4", "L4"),  # not L40S
    ("H20", "H20"),  # not H200
    ("H200", "H200-SXM"),
    ("B200", "B200"),  # not GB200
    ("NVIDIA H100 80GB HBM3", "H100-SXM"),
    ("H100-SXM5-80GB", "H100-SXM"),
    ("NVIDIA RTX A6000", "A6000"),
    ("3060", "RTX-3060-12GB"),
    ("MI250X", "MI250X"),  # the package, as the table has it
    ("AMD Instinct MI250X", "MI250X-GCD"),  # what torch says of one die
    ("AMD Instinct MI250X/MI250", "MI250X-GCD"),
    ("CPU", "cpu"),
]


@pytest.mark.parametrize(("written", "name"), NAMES)
def test_names(written: str, name: str) -> None:
    assert profile(written).name == name


def test_every_row_is_found_by_its_own_and_by_torchs_name() -> None:
    for row in known_profiles():
        assert profile(row.name) == row
        assert not row.torch_name or profile(row.torch_name) == row


LISTED = "`whalepy devices` lists the known types; others go under `profiles:` in a cluster file"
ERRORS = [
    (
        "V100",
        "device 'V100' could be V100-PCIE-16GB, V100-SXM2-16GB or V100-SXM2-32GB\n  fix: write one of them in full",
    ),
    ("H100-80GB", "device 'H100-80GB' could be H100-PCIE or H100-SXM\n  fix: write one of them in full"),
    ("3091", f"unknown device '3091'\n  fix: did you mean RTX-3090? {LISTED}"),
    ("NVIDIA H100 NVL", f"unknown device 'NVIDIA H100 NVL'\n  fix: did you mean H100-PCIE or H100-SXM? {LISTED}"),
    ("xyzzy", f"unknown device 'xyzzy'\n  fix: {LISTED}"),
    ("", f"unknown device ''\n  fix: {LISTED}"),
]


@pytest.mark.parametrize(("written", "message"), ERRORS)
def test_errors(written: str, message: str) -> None:
    with pytest.raises(ClusterError) as error:
        profile(written)
    assert str(error.value) == message


# Other products, or slices of one: their figures are not those of the name they contain.
OTHERS = ["RTX 3080 Ti", "RTX 3080 12GB", "RTX 4070", "2080", "L40", "A100-SXM4-80GB MIG 1g.10gb", "A100-PCIE-80GB"]


@pytest.mark.parametrize("written", OTHERS)
def test_a_name_within_a_name_is_another_device(written: str) -> None:
    with pytest.raises(ClusterError, match="unknown device"):
        profile(written)
