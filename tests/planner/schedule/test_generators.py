"""Stages 1 to 8, microbatches 1 to 16, every kind: verified, with the memory and the bubbles that theory says."""

from __future__ import annotations

from itertools import accumulate

import pytest

from tests.planner.schedule.plans import KINDS, PLAIN, Case, chain, in_a_chain, looped, plain, seconds
from whalepy.planner.schedule.generators import forward_only
from whalepy.planner.schedule.hosting import blocks_of
from whalepy.planner.schedule.kinds import compute_actions
from whalepy.planner.schedule.lowering import lowered
from whalepy.planner.schedule.simulate import Simulated, in_flight, simulate
from whalepy.planner.schedule.verify import verify

STAGES, MICROBATCHES = range(1, 9), range(1, 17)

ORDERS = [
    ("gpipe", plain(2), 2, "0F0 0F1 0B0 0B1 | 1F0 1F1 1B0 1B1"),
    ("gpipe", looped(1, 2), 2, "0F0 1F0 0F1 1F1 1B0 0B0 1B1 0B1"),  # neighbours on one group are one block
    ("gpipe", looped(2, 2), 1, "0F0 2F0 2B0 0B0 | 1F0 3F0 3B0 1B0"),
    ("1f1b", plain(2), 3, "0F0 0F1 0B0 0F2 0B1 0B2 | 1F0 1B0 1F1 1B1 1F2 1B2"),
    ("1f1b", plain(3), 1, "0F0 0B0 | 1F0 1B0 | 2F0 2B0"),  # fewer microbatches than stages
    ("zero-bubble", plain(2), 3, "0F0 0F1 0I0 0W0 0F2 0I1 0W1 0I2 0W2 | 1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1W2"),
    (
        "interleaved",
        looped(2, 2),
        2,
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1 | 1F0 1F1 3F0 3B0 3F1 3B1 1B0 1B1",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "hosts", "microbatches", "text"), ORDERS)
def test_orders(kind: str, hosts: tuple[tuple[int, ...], ...], microbatches: int, text: str) -> None:
    found = compute_actions(kind, hosts, microbatches)
    assert " | ".join(" ".join(map(str, own)) for own in found) == text


def played(case: Case) -> Simulated:
    schedule = case.schedule()
    verify(schedule, case.hosts, case.crossings, case.lendings, case.microbatches)
    return simulate(schedule, seconds)


@pytest.mark.parametrize("kind", PLAIN)
def test_every_chain_is_verified_and_ends_when_theory_says(kind: str) -> None:
    """With equal stages, whose F, I and W take one second each.

    1F1B and GPipe: M + S - 1 slots of forward and backward (Huang et al., GPipe, section 2.3; Narayanan et al.,
    Megatron-LM, section 2.2.1), so a bubble of (S - 1) / (M + S - 1).
    Zero-bubble: (S - 1) (F + I - W) of bubble where microbatches fill the pipeline, M >= S (Qi et al., ZB-H1);
    with fewer no stage has a W to fill the bubble with, and what takes the time is the way of all microbatches through
    all stages and back, then one W: 2 (M + S - 1) + 1.
    """
    for stages in STAGES:
        for microbatches in MICROBATCHES:
            found = played(in_a_chain(kind, stages, microbatches))
            filled = 3 * microbatches + (stages - 1)
            if kind != "zero-bubble":
                assert found.step_s == 3 * (microbatches + stages - 1)
                assert found.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))
            elif microbatches >= stages:
                assert found.step_s == filled
            else:
                assert found.step_s == 2 * (microbatches + stages - 1) + 1 > filled


def test_microbatches_in_flight() -> None:
    """1F1B: min(M, S - i) on stage i; zero-bubble: on every stage what the first one has under 1F1B; GPipe: all."""
    for stages in STAGES:
        for microbatches in MICROBATCHES:
            expected = {
                "1f1b": [min(microbatches, stages - stage) for stage in range(stages)],
                "zero-bubble": [min(microbatches, stages)] * stages,
                "gpipe": [microbatches] * stages,
            }
            for kind, most in expected.items():
                found = in_flight(in_a_chain(kind, stages, microbatches).schedule())
                assert list(found.values()) == most, (kind, stages, microbatches)


def test_interleaved_ends_when_theory_says() -> None:
    """On G groups with v stages each, 3 s of F and B per stage: the bubble is (G - 1) / (v M) of the ideal time.

    Source: Narayanan et al., Megatron-LM (2021), section 2.2.2, there for M a multiple of G; rounds of unequal size
    reach it for any M >= G. With fewer microbatches than groups it is as long as 1F1B with a group for every stage.
    """
    for groups in STAGES:
        for chunks in (2, 3):
            stages = groups * chunks
            for microbatches in MICROBATCHES if stages <= 8 else (3, 5, 8, 13):
                case = Case("interleaved", looped(groups, chunks), microbatches, chain(stages))
                found = played(case)
                ideal = 3 * microbatches * chunks
                if groups == 1 or microbatches >= groups:
                    assert found.step_s == ideal + 3 * (groups - 1)
                    assert found.bubble_s[0] / ideal == pytest.approx((groups - 1) / (chunks * microbatches))
                else:
                    assert found.step_s == 3 * (microbatches + stages - 1)


def test_interleaved_holds_its_warm_up_and_one_more() -> None:
    """On group g at most 2 (G - g - 1) + (v - 1) R + 1 microbatches of its stages, where the first round has R."""
    for groups in range(2, 9):
        for chunks in (2, 3):
            for microbatches in MICROBATCHES:
                largest = -(-microbatches // max(1, microbatches // groups))
                orders = compute_actions("interleaved", looped(groups, chunks), microbatches)
                for group, own in enumerate(orders):
                    most = 2 * (groups - group - 1) + (chunks - 1) * largest + 1
                    steps = (1 if action.op == "F" else -1 for action in own)
                    assert max(accumulate(steps)) == min(most, chunks * microbatches)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_hosts_are_verified_and_not_slower_than_one_by_one(kind: str) -> None:
    """Groups that host unlike numbers of stages: in no more than the time of all stages one after another."""
    for hosts in (((0, 2), (1,)), ((0, 3), (1, 2)), ((0,), (1, 3, 5), (2, 4)), ((0, 1), (2, 3)), ((0, 1, 2),)):
        stages = sum(map(len, hosts))
        for microbatches in MICROBATCHES:
            found = played(Case(kind, hosts, microbatches, chain(stages)))
            assert found.step_s <= 3 * microbatches * stages


def test_odd_hosts_hold_no_more_than_theirs() -> None:
    """Of L blocks of neighbouring stages, block i holds min(M, L - i) under 1F1B, and min(M, L) under zero-bubble."""
    reached: set[str] = set()
    for hosts in (((0, 2), (1,)), ((0, 3), (1, 2)), ((0,), (1, 3, 5), (2, 4)), looped(2, 2), looped(3, 2)):
        blocks = blocks_of(hosts)
        for kind in ("1f1b", "zero-bubble"):
            for microbatches in MICROBATCHES:
                found = in_flight(compute_actions(kind, hosts, microbatches))
                for index, block in enumerate(blocks):
                    most = min(microbatches, len(blocks) - (index if kind == "1f1b" else 0))
                    assert max(found[stage] for stage in block.stages) <= most
                    if microbatches > len(blocks) and found[block.stages[0]] == most:
                        reached.add(kind)
    assert reached == {"1f1b", "zero-bubble"}


def test_forward_only() -> None:
    for hosts in (plain(4), looped(2, 2), looped(3, 3), ((0, 2), (1,))):
        stages = sum(map(len, hosts))
        for microbatches in MICROBATCHES:
            schedule = lowered(forward_only(hosts, microbatches), chain(stages))
            verify(schedule, hosts, chain(stages), (), microbatches, trained=())
            assert {action.op for own in schedule for action in own} <= {"F", "SEND_F", "RECV_F"}
            assert set(simulate(schedule, seconds).in_flight.values()) == {0}
