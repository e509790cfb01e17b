"""More of the same devices, as lines that `--cluster` takes."""

from __future__ import annotations

import pytest

from whalepy.dryrun.strategies import line_of, times_as_many
from whalepy.hardware.cluster import ClusterSpec


@pytest.mark.parametrize(
    ("cluster", "times", "text"),
    [
        ("1xT4", 2, "2xT4"),
        ("1xT4 + 1xK80", 4, "4xT4 + 4xK80"),
        ("8xV100-SXM2-32GB", 2, "2x8xV100-SXM2-32GB @ 100Gbit/s"),
        ("2x1xT4 @ 10Gbit/s", 2, "4x1xT4 @ 10Gbit/s"),
        ("2x8xA100-SXM4-40GB + 1x8xT4 @ 50Gbit/s", 2, "4x8xA100-SXM4-40GB + 2x8xT4 @ 50Gbit/s"),
        ("2xcpu*0.5", 2, "4xcpu*0.5"),
    ],
)
def test_more_of_the_same(cluster: str, times: int, text: str) -> None:
    before = ClusterSpec.load(cluster)
    more = times_as_many(before, times)
    assert len(more.devices) == times * len(before.devices)
    assert more == ClusterSpec.load(text)
    assert line_of(more) is not None


def test_a_line_cannot_say_all() -> None:
    changed = {"type": "T4", "count": 1, "memory_bytes": 10 * 2**30}
    assert line_of(ClusterSpec.load({"nodes": [{"devices": [changed]}]})) is None
