"""What ZeRO and recomputation save, by the book.

Source: Rajbhandari et al., ZeRO, SC 2020, sections 5 and 7; Korthikanti et al., arXiv:2205.05198, sections 4 and 5.
"""

from __future__ import annotations

import pytest

from tests.dryrun.studies import candidate_of, chain, ids, sent_on
from whalepy.dryrun.study import Savings
from whalepy.planner.work import Rehearsal

REPLICAS = 4


@pytest.fixture(scope="module")
def works() -> list[Rehearsal]:
    """One study under the four stages."""
    first = candidate_of(chain(4), (REPLICAS, 1))
    cluster = first.cluster
    levels = first.levels
    return [first.study.candidate(levels, cluster, cluster.speeds(), 1, Savings(z)).work(0, 2) for z in range(4)]


def bytes_of_model() -> int:
    return sum(4 * parameter.numel() for parameter in chain(4).parameters())


def test_bytes_that_a_replica_keeps(works: list[Rehearsal]) -> None:
    size, part = bytes_of_model(), bytes_of_model() / REPLICAS
    # Per parameter in float32: itself, its gradient, two moments.
    wanted = [(size, size, 2 * size), (size, size, 2 * part), (size, part, 2 * part), (part, part, 2 * part)]
    for work, kept in zip(works, wanted, strict=True):
        assert (work.parameters, work.gradients, work.optimizer) == pytest.approx(kept, rel=0.01)
    assert [work.peak for work in works] == sorted((work.peak for work in works), reverse=True)


def test_bytes_that_a_replica_sends(works: list[Rehearsal]) -> None:
    size, gone = bytes_of_model(), 1 - 1 / REPLICAS
    scalars = 200  # the sum of the loss and its weight
    sent = [sent_on(work, 0) for work in works]
    assert sent[:3] == pytest.approx([2 * size * gone] * 3, abs=scalars)
    # A third time the parameters: forward, backward, and the gradients. What lies outside all blocks is gathered once.
    outside = sum(4 * p.numel() for name, p in chain(4).named_parameters() if "blocks" not in name)
    assert sent[3] == pytest.approx((3 * size - outside) * gone, abs=outside + scalars)
    kinds = [{e.collective for e in work.events if e.collective and e.bytes > scalars} for work in works]
    assert kinds == [{"all-reduce"}, *[{"reduce-scatter", "all-gather"}] * 3]


def test_one_replica_has_nothing_to_keep_in_parts() -> None:
    plain, saving = (candidate_of(chain(3), (1, 2), 1, Savings(zero)).work(0, 8) for zero in (0, 3))
    assert plain == saving


# -- recomputation


def measured(recompute: str, length: int = 16, *, fused: bool = False, layers: int = 4) -> Rehearsal:
    savings = Savings(0, recompute)  # type: ignore[arg-type]
    return candidate_of(chain(layers, fused=fused), (1, 1), 1, savings, ids(length=length)).work(0, 8)


def activations(work: Rehearsal) -> int:
    """Bytes at the end of the forward pass beyond those at its start."""
    forward = [event.memory for event in work.events if event.phase == "forward" and event.block >= 0]
    return forward[-1] - forward[0]


def test_memory_falls_and_products_rise() -> None:
    none, selective, full = (measured(kind, 32) for kind in ("none", "selective", "full"))
    assert activations(none) > activations(selective) > activations(full)
    blocks = sum(e.flops for e in none.events if e.phase == "forward" and e.block >= 0)
    assert none.flops <= selective.flops < full.flops <= none.flops + blocks
    assert full.parameters == none.parameters and full.optimizer == none.optimizer


def test_attention_alone_changes_nothing_where_it_is_fused() -> None:
    none, attention = measured("none", fused=True), measured("attention", fused=True)
    assert activations(attention) == activations(none) and attention.flops == none.flops


def test_attention_alone_keeps_nothing_that_grows_with_the_square() -> None:
    def squares(recompute: str) -> int:
        """What four times the length takes beyond four times the bytes."""
        return activations(measured(recompute, 256)) - 4 * activations(measured(recompute, 64))

    # The softmax of the scores of each block: rows x length x length.
    assert squares("none") >= 3 * 4 * 8 * (256**2 - 4 * 64**2)
    assert squares("attention") < squares("none") / 3
