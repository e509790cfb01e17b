"""docs/clusters.md: its lines and its file are clusters."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.entries import ProfileEntry
from whalepy.hardware.profiles import profile

DOCUMENT = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text(encoding="utf-8")


def test_its_lines() -> None:
    rows = re.findall(r"^\| `(.*?)` \| (.*?) \|$", DOCUMENT, re.MULTILINE)
    sizes = {line: [len(node.devices) for node in ClusterSpec.load(line).nodes] for line, _ in rows}
    assert list(sizes.values()) == [[4], [8] * 16, [4]]


def test_its_file() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
    spec = ClusterSpec.load(yaml.safe_load(block))
    assert str(spec) == "4x8xA100-SXM4-80GB + (2xMyCard[20GiB]*0.9 + 1xRTX-3090) @ 100Gbit/s"


def test_the_names_and_fields_it_gives() -> None:
    assert [profile(name).name for name in ("3090", "A100-80GB", "NVIDIA GeForce RTX 3090")] == [
        "RTX-3090",
        "A100-SXM4-80GB",
        "RTX-3090",
    ]
    (sentence,) = re.findall(r"Of a type may be given:\n(.*?)`\. What nobody", DOCUMENT, re.DOTALL)
    assert set(re.findall(r"`(\w+)", sentence)) <= set(ProfileEntry.model_fields)
