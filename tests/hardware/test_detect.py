from __future__ import annotations

import socket

import pytest
import torch

from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.detect import match_ranks, report_this_rank
from whalepy.hardware.measured import Measured, Point

CPU = torch.device("cpu")


def test_report_of_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    report = report_this_rank(CPU)
    assert (report.host, report.type, report.local_rank, report.speed) == (socket.gethostname(), "cpu", 3, None)
    assert match_ranks(ClusterSpec.load("1xcpu"), [report]) == (0,)


def test_ranks_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = report_this_rank(CPU).memory_bytes
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert report_this_rank(CPU).memory_bytes == pytest.approx(alone / 4, rel=0.5)  # what is free moves


def test_the_speed_is_what_was_measured() -> None:
    measured = Measured({"float32": (Point(1e6, 1e-3), Point(1e9, 0.5))})
    assert report_this_rank(CPU, measured).speed == 2e9
    assert report_this_rank(CPU, Measured({})).speed is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_report_of_a_gpu() -> None:
    report = report_this_rank(torch.device("cuda", 0))
    assert 0 < report.memory_bytes <= torch.cuda.get_device_properties(0).total_memory
    assert report.type != "cpu"
