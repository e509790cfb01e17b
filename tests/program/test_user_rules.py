from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import whalepy
from whalepy.errors import WhaleError
from whalepy.program.user_rules import USER_RULES

DOCS = Path(__file__).parents[2] / "docs" / "rules.md"
NOTATION = "\n  fix: see docs/rules.md for the notation"


@pytest.fixture(autouse=True)
def no_user_rules() -> Iterator[None]:
    yield
    USER_RULES.clear()


def test_the_examples_of_the_documentation(capsys: pytest.CaptureFixture[str]) -> None:
    define, check, wrong = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)
    scope: dict[str, Any] = {}
    # torch reads the annotations of a custom operator: they may not be strings, as this file's would be.
    exec(compile(define, str(DOCS), "exec", dont_inherit=True), scope)
    # The documentation says gradients need a formula; here without one.
    check, wrong = (text.replace("torch.randn(", "torch.ones(") for text in (check, wrong))
    formula = scope["decay"].register_autograd
    formula(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
    exec(compile(check, str(DOCS), "exec", dont_inherit=True), scope)
    assert capsys.readouterr().out == "('b', 's')\n"
    with pytest.raises(WhaleError) as caught:
        exec(compile(wrong, str(DOCS), "exec", dont_inherit=True), scope)
    printed = " ".join(line.removeprefix("#").strip() for line in wrong.splitlines() if line.startswith("#"))
    assert printed == "WhaleError: " + " ".join(str(caught.value).replace("\n  ", " ").split())


def _backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = ctx.saved_tensors
    back = g.flip(-1).cumsum(-1).flip(-1)
    return back * w, (back * x).sum(0)


# operator, rule -> what is wrong with it
REFUSED = [
    (
        "nolib",
        "a -> a",
        "'nolib' is not an operator's name\n  fix: write \"lib::op\", as it was given to torch.library",
    ),
    (
        "aten::no_such_thing",
        "a -> a",
        "torch knows no operator 'aten::no_such_thing'\n  fix: import the module that registers it before this line",
    ),
    ("aten::mm", "mk -> m", "'mk -> m' has 1 operands; aten::mm takes 2 tensors (rule of aten::mm)" + NOTATION),
    (
        "aten::mm",
        "mk, kn -> m, n",
        "'mk, kn -> m, n' has 2 results; aten::mm returns 1 tensors (rule of aten::mm)" + NOTATION,
    ),
    (
        "aten::mm",
        "mk, kn -> mnx",
        "'x' stands only on the right of 'mk, kn -> mnx': no operand says how it is cut (rule of aten::mm)" + NOTATION,
    ),
    ("aten::mm", "mk, Kn -> mn", "'mk, Kn -> mn' says both 'k' (free) and 'K' (whole) (rule of aten::mm)" + NOTATION),
    (
        "aten::mm",
        "(a b)k, kn -> (a b)n",
        "'a' stands only inside a product of '(a b)k, kn -> (a b)n': its size is known from nowhere (rule of aten::mm)"
        + NOTATION,
    ),
    (
        "aten::mm",
        "mk, kn -> mn !k=mine",
        "'mk, kn -> mn !k=mine' names a local kernel; an operator of yours has none (rule of aten::mm)" + NOTATION,
    ),
    (
        "aten::add_.Tensor",
        "a, a -> a",
        "aten::add_ writes to its arguments; only operators that return new tensors can be sharded "
        "(rule of aten::add_.Tensor)" + NOTATION,
    ),
    (
        "aten::cat",
        "a -> a",
        "aten::cat takes a list of tensors, for which a line has no entry (rule of aten::cat)" + NOTATION,
    ),
    ("aten::mm", "mk, kn mn", "the rule 'mk, kn mn' needs exactly one '->'\n  fix: write 'operands -> results'"),
    (
        "aten::mm",
        "m(k, kn -> mn",
        "unbalanced parentheses in the rule 'm(k, kn -> mn'\n  fix: write a product dim as (a b)",
    ),
    ("aten::mm", "......k, kn -> mn", "'...' stands twice in one operand of the rule '......k, kn -> mn'"),
    ("aten::mm", "mk, kn -> mn !k", "the mark '!k' of the rule 'mk, kn -> mn !k' is not of the form !letter=kernel"),
]


@pytest.mark.parametrize(("name", "line", "message"), REFUSED)
def test_a_line_that_cannot_be_the_rule_is_refused_when_it_is_added(name: str, line: str, message: str) -> None:
    with pytest.raises(WhaleError) as caught:
        whalepy.rule(name, line)
    assert str(caught.value) == message
    assert not USER_RULES


def test_a_later_rule_replaces_the_earlier_one() -> None:
    whalepy.rule("aten::mm", "mk, kn -> mn")
    whalepy.rule("aten::mm", "MK, Kn -> Mn")
    assert whalepy.check_rule("aten::mm", lambda: (torch.ones(4, 5), torch.ones(5, 6))) == ("n",)
