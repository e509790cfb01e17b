"""Meeting points: who does not come is named, what fails on one rank is known to all, nothing waits for ever."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from tests.pool import Pool
from whalepy.errors import ClusterError, WhaleError
from whalepy.runtime.roll_call import Launch, RollCall, SaidTogether


def call(timeout_s: float) -> RollCall:
    launch = Launch.from_environment()
    assert launch is not None
    return RollCall.open(launch, timeout_s)


def rank_here() -> int:
    return int(os.environ["RANK"])


def all_come() -> list[int]:
    together = call(20)
    try:
        return [together.step("first", lambda: rank_here()), together.step("second", lambda: 10 * rank_here())]
    finally:
        together.close()


def test_each_rank_gets_its_own_result(workers: Pool) -> None:
    assert workers.run(3, all_come, default_group=False) == [[0, 0], [1, 10], [2, 20]]


def said(run: Any) -> tuple[str, str | None, bool]:
    try:
        run()
    except SaidTogether as error:
        return error.what, error.fix, error.is_mine
    return "nothing", None, False


def without(absent: tuple[int, ...]) -> tuple[str, str | None, bool] | None:
    if rank_here() in absent:
        return None
    return said(lambda: call(4.0))


FIX = "look at the output of that rank: it did not start, failed, or hangs; --timeout waits longer"
ABSENT = [
    (2, (1,), "rank 1 of 2 did not reach 'start' within 4 s; there: 0 (HOST)"),
    (3, (1, 2), "ranks 1, 2 of 3 did not reach 'start' within 4 s; there: 0 (HOST)"),
    (3, (1,), "rank 1 of 3 did not reach 'start' within 4 s; there: 0 (HOST), 2 (HOST)"),
]


@pytest.mark.parametrize(("size", "absent", "what"), ABSENT)
def test_a_rank_that_does_not_come_is_named(
    workers: Pool, monkeypatch: pytest.MonkeyPatch, size: int, absent: tuple[int, ...], what: str
) -> None:
    import socket

    workers.run(size, without, tuple(range(size)), default_group=False)  # processes start, modules load
    told = workers.run(size, without, absent, default_group=False)
    expected = what.replace("HOST", socket.gethostname())
    assert told == [None if rank in absent else (expected, FIX, rank == 0) for rank in range(size)]


def no_rank_0() -> tuple[str, str | None] | None:
    if rank_here() == 0:
        return None
    try:
        call(0.5)
    except ClusterError as error:
        return error.what.partition(" at ")[0], error.fix
    return None


def test_without_rank_0_there_is_nowhere_to_meet(workers: Pool) -> None:
    told = workers.run(2, no_rank_0, default_group=False)
    fix = "check that it started, the address, and that no firewall is between"
    assert told == [None, ("rank 1 cannot reach rank 0", fix)]


def one_fails(kind: str) -> tuple[str, str | None, bool]:
    together = call(5)
    errors: dict[str, Exception] = {"ours": WhaleError("no", fix="do"), "other": ValueError("first line\nsecond")}

    def step() -> None:
        if rank_here() == 1:
            raise errors[kind]

    def all_fail() -> None:
        raise errors["ours"]

    try:
        return said(lambda: together.step("work", all_fail if kind == "all" else step))
    finally:
        together.close()


FAILURES = [
    ("ours", ("rank 1: no", "do")),
    ("other", ("rank 1: ValueError: first line", None)),
    ("all", ("no", "do")),  # where all say the same, no rank is to blame
]


@pytest.mark.parametrize(("kind", "words"), FAILURES)
def test_what_fails_on_one_rank_is_raised_on_all(workers: Pool, kind: str, words: tuple[str, str | None]) -> None:
    told = workers.run(2, one_fails, kind, default_group=False)
    assert told == [(*words, True), (*words, False)]


def one_hangs() -> tuple[str, str | None, bool] | None:
    together = call(3)  # waits 6 s for the others to come out of a step
    if rank_here() == 1:
        time.sleep(8)
        return None
    try:
        return said(lambda: together.step("work", lambda: None))
    finally:
        together.close()


def test_a_rank_that_hangs_in_a_step_is_named(workers: Pool) -> None:
    import socket

    workers.run(2, without, (0, 1), default_group=False)
    told = workers.run(2, one_hangs, default_group=False)
    assert told[0] == (f"rank 1 of 2 did not reach 'work' within 6 s; there: 0 ({socket.gethostname()})", FIX, True)


ENVIRONMENTS = [
    ({"RANK": "x"}, "the environment variable RANK is 'x'"),
    ({"WORLD_SIZE": "-2"}, "the environment variable WORLD_SIZE is '-2'"),
    ({"MASTER_PORT": ""}, "the environment variable MASTER_PORT is ''"),
    ({"RANK": "2"}, "the launcher says rank 2 of 2 at 'localhost'"),
    ({"MASTER_ADDR": ""}, "the launcher says rank 0 of 2 at ''"),
]


@pytest.mark.parametrize(("changed", "what"), ENVIRONMENTS)
def test_a_broken_environment(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], what: str) -> None:
    right = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (right | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ClusterError) as error:
        Launch.from_environment()
    assert (error.value.what, error.value.fix) == (what, "start it as `torchrun --nproc-per-node=N -m whalepy check`")


def test_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert Launch.from_environment() is None
