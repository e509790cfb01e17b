"""The names of schedules, and what is wrong with other names."""

from __future__ import annotations

import pytest

from tests.planner.schedule.plans import looped, plain
from whalepy.errors import PlanError
from whalepy.planner.schedule.generators import interleaved, one_f_one_b
from whalepy.planner.schedule.kinds import Kind, compute_actions, parse_kind

KINDS = [
    ("1f1b", Kind("1f1b")),
    ("gpipe", Kind("gpipe")),
    ("zero-bubble", Kind("zero-bubble")),
    ("interleaved", Kind("interleaved")),
    ("interleaved:2", Kind("interleaved", 2)),
]


@pytest.mark.parametrize(("text", "kind"), KINDS)
def test_kinds(text: str, kind: Kind) -> None:
    assert parse_kind(text) == kind
    assert str(kind) == text


WRONG = [
    ("1f1", "there is no schedule '1f1'\n  fix: did you mean 1f1b?"),
    ("zerobubble", "there is no schedule 'zerobubble'\n  fix: did you mean zero-bubble?"),
    ("xyz", "there is no schedule 'xyz'\n  fix: known: 1f1b, gpipe, interleaved, zero-bubble"),
    ("gpipe:2", "schedule 'gpipe:2': only interleaved takes a number of chunks\n  fix: write gpipe"),
    ("interleaved:", "schedule 'interleaved:' has no whole number of chunks\n  fix: write interleaved:2"),
    ("interleaved:0", "schedule 'interleaved:0' has no whole number of chunks\n  fix: write interleaved:2"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_no_kind(text: str, message: str) -> None:
    with pytest.raises(PlanError) as error:
        parse_kind(text)
    assert str(error.value) == message


def test_each_kind_has_its_generator() -> None:
    assert compute_actions("1f1b", plain(3), 4) == one_f_one_b(plain(3), 4)
    assert compute_actions("interleaved:2", looped(2, 2), 4) == interleaved(looped(2, 2), 4)


BAD_HOSTS = [
    (((0,), (2,)), 2, "hosts ((0,), (2,)) do not give every stage to exactly one group"),
    (((0, 1), (1,)), 2, "hosts ((0, 1), (1,)) do not give every stage to exactly one group"),
    (((0,), ()), 2, "hosts ((0,), ()) do not give every stage to exactly one group"),
    ((), 2, "hosts () do not give every stage to exactly one group"),
    (((1,), (0,)), 2, "hosts ((1,), (0,)) are not in order of their stages\n  fix: write ((0,), (1,))"),
    (((0,), (1,)), 0, "0 microbatches cannot be scheduled\n  fix: use at least one"),
]


@pytest.mark.parametrize(("hosts", "microbatches", "message"), BAD_HOSTS)
def test_hosts_that_are_none(hosts: tuple[tuple[int, ...], ...], microbatches: int, message: str) -> None:
    with pytest.raises(PlanError) as error:
        compute_actions("1f1b", hosts, microbatches)
    assert str(error.value).startswith(message)


def test_chunks_have_to_fit_the_hosts() -> None:
    with pytest.raises(PlanError) as error:
        compute_actions("interleaved:3", looped(2, 2), 4)
    assert str(error.value) == (
        "schedule 'interleaved:3', but a group of devices hosts 2 stages\n"
        "  fix: write interleaved:2, or cut the model into 3 stages per group"
    )
