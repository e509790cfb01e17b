"""Schedules as lanes of text."""

from __future__ import annotations

import pytest

from tests.planner.schedule.plans import Case, chain, looped, plain
from whalepy.planner.schedule.draw import drawn

DRAWN = [
    (
        Case("1f1b", plain(3), 3, chain(3)),
        """
group 0 (stage 0)  F0 F1 F2 .  .  .  .  B0--- .  B1--- .  B2--- R
group 1 (stage 1)  .  F0 F1 .  .  B0--- F2 B1--- .  B2--- R  .  .
group 2 (stage 2)  .  .  F0 B0--- F1 B1--- F2 B2--- R  .  .  .  .
""",
    ),
    (
        Case("zero-bubble", plain(2), 3, chain(2)),
        """
group 0 (stage 0)  F0 F1 .  I0 W0 F2 I1 W1 I2 W2 R
group 1 (stage 1)  .  F0 I0 F1 I1 W0 F2 I2 W1 W2 R
""",
    ),
    (
        Case("interleaved", looped(2, 2), 2, chain(4)),
        """
group 0 (stages 0, 2)  0F0 0F1 2F0 2F1 .   .   2B0---- .   2B1---- 0B0---- 0B1---- 2R  0R
group 1 (stages 1, 3)  .   1F0 1F1 3F0 3B0---- 3F1 3B1---- 1B0---- 1B1---- 3R  1R  .   .
""",
    ),
]


@pytest.mark.parametrize(("case", "text"), DRAWN)
def test_drawn(case: Case, text: str) -> None:
    assert drawn(case.schedule()) == text.strip()


def test_the_middle_is_left_out_where_it_is_too_wide() -> None:
    text = drawn(Case("1f1b", plain(2), 12, chain(2)).schedule(), width=60, names=("rank 0", "ranks 1-2"))
    assert max(map(len, text.splitlines())) <= 60
    assert text == (
        "rank 0     F0  F1  .   .   B0----- … B10---- .   B11---- R\n"
        "ranks 1-2  .   F0  B0----- F1  B1--… F11 B11---- R   .   ."
    )
