"""Every action prints as text that gives it back."""

from __future__ import annotations

import random

import pytest

from tests.planner.schedule.plans import random_case
from whalepy.errors import PlanError
from whalepy.planner.schedule.actions import Action, parse, partner

TEXTS = [
    (Action(2, "F", 0), "2F0"),
    (Action(10, "B", 12), "10B12"),
    (Action(2, "I", 0), "2I0"),
    (Action(2, "W", 0), "2W0"),
    (Action(0, "SEND_F", 3, 2), "0SEND_F3>2"),
    (Action(2, "RECV_F", 3, 0), "2RECV_F3<0"),
    (Action(2, "SEND_B", 3, 0), "2SEND_B3>0"),
    (Action(0, "RECV_B", 3, 2), "0RECV_B3<2"),
    (Action(0, "SEND_P", None, 3), "0SEND_P>3"),
    (Action(3, "RECV_P", None, 0), "3RECV_P<0"),
    (Action(3, "SEND_G", None, 0), "3SEND_G>0"),
    (Action(0, "RECV_G", None, 3), "0RECV_G<3"),
    (Action(0, "SENT_F", 3, 2), "0SENT_F3>2"),
    (Action(2, "SENT_B", 3, 0), "2SENT_B3>0"),
    (Action(2, "REDUCE"), "2REDUCE"),
]


@pytest.mark.parametrize(("action", "text"), TEXTS)
def test_text(action: Action, text: str) -> None:
    assert str(action) == text
    assert parse(text) == action


def test_a_schedule_reads_back() -> None:
    draw = random.Random(0)
    for _ in range(50):
        for own in random_case(draw).schedule():
            assert tuple(parse(str(action)) for action in own) == own


FORMS = "write 2F0, 0SEND_F3>2, 2RECV_F3<0, 0SEND_P>3 or 2REDUCE"
OPS = "F, B, I, W, SEND_F, RECV_F, SENT_F, SEND_B, RECV_B, SENT_B, SEND_P, RECV_P, SEND_G, RECV_G, REDUCE"
WRONG = [
    ("", f"'' is not an action of a schedule\n  fix: {FORMS}"),
    ("2F", f"'2F' is not an action of a schedule\n  fix: {FORMS}"),  # a microbatch is missing
    ("2REDUCE1", f"'2REDUCE1' is not an action of a schedule\n  fix: {FORMS}"),  # once per step
    ("0SEND_F3<2", f"'0SEND_F3<2' is not an action of a schedule\n  fix: {FORMS}"),  # the arrow points out
    ("0SEND_F3", f"'0SEND_F3' is not an action of a schedule\n  fix: {FORMS}"),  # to whom
    ("0F3>2", f"'0F3>2' is not an action of a schedule\n  fix: {FORMS}"),  # a forward has no other side
    ("0G3", f"'0G3' is not an action of a schedule: there is no G\n  fix: one of {OPS}"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_what_is_no_action(text: str, message: str) -> None:
    with pytest.raises(PlanError) as error:
        parse(text)
    assert str(error.value) == message


def test_the_other_side() -> None:
    assert str(partner(parse("0SEND_F3>2"))) == "2RECV_F3<0"
    assert str(partner(parse("0RECV_G<3"))) == "3SEND_G>0"
    with pytest.raises(PlanError, match="2F0 has no other side"):
        partner(parse("2F0"))
