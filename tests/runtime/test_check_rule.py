from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import whalepy
from tests.rule_cases import ints, t, u
from whalepy.errors import WhaleError
from whalepy.program import rule_table
from whalepy.program.call import Call
from whalepy.program.rule_table import rule_of
from whalepy.program.rules import Rule, parse_rule
from whalepy.program.user_rules import USER_RULES
from whalepy.runtime.check_rule import check_call, refuse_difference, two_level_modes
from whalepy.runtime.one_operator import Trial, one_operator

a = torch.ops.aten


@torch.library.custom_op("whalepy_test::decay", mutates_args=())
def decay(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Running sums over the last dim of x, weighted by w."""
    return (x * w).cumsum(-1)


@decay.register_fake
def _(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def decay_backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = ctx.saved_tensors
    back = g.flip(-1).cumsum(-1).flip(-1)
    return back * w, (back * x).sum(0)


decay.register_autograd(decay_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def decay_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return t(6, 4, 5), t(4, 5)


@pytest.fixture(autouse=True)
def no_user_rules() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    USER_RULES.clear()


def test_a_true_rule_gives_the_letters_it_was_tried_along() -> None:
    whalepy.rule("whalepy_test::decay", "b s D, s D -> b s D")
    assert whalepy.check_rule("whalepy_test::decay", decay_inputs) == ("b", "s")
    assert whalepy.check_rule("whalepy_test::decay", lambda: {"x": t(6, 4, 5), "w": t(4, 5)}) == ("b", "s")


FIX_CASE = "  fix: write an UPPER-case letter for a dim that the operator needs whole, _ for one that is unrelated"
# rule -> the whole message
WRONG = [
    # the running sum needs its dim whole
    (
        "b s d, s d -> b s d",
        "the rule 'b s d, s d -> b s d' of whalepy_test.decay is wrong: cut along 'd' at shares 3:1, result 0 differs "
        "by 1.0e+00 of its largest value at position (0,)\n" + FIX_CASE,
    ),
    # the weights do not have the rows
    (
        "b s D, b D -> b s D",
        "the rule 'b s D, b D -> b s D' of whalepy_test.decay is wrong: 'b' stands for dims of 4 and 6\n"
        "  fix: give dims that are different axes different letters, or _",
    ),
    # the weights are cut too, but the rule says nothing of it
    (
        "b s D, _ D -> b s D",
        "the rule 'b s D, _ D -> b s D' of whalepy_test.decay is wrong: cut along 's' at shares 3:1, a position "
        "failed: The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 1\n"
        + FIX_CASE,
    ),
    # the result has the rows
    (
        "b s D, s D -> _ s D",
        "the rule 'b s D, s D -> _ s D' of whalepy_test.decay is wrong: cut along 'b' at shares 3:1, a position "
        "failed: result 0 has shape [5, 4, 5], not [6, 4, 5]\n" + FIX_CASE,
    ),
    # nothing may be cut
    (
        "_ _ _, _ _ -> _ _ _",
        "the rule of whalepy_test::decay allows no cut at these sizes\n"
        "  fix: give inputs whose free dims are larger than 1",
    ),
    # not the ranks of the inputs
    (
        "b D, D -> b D",
        "the rule 'b D, D -> b D' does not fit operands of 3, 2 dims and results of 3\n"
        "  fix: write one letter per dim, `...` for leading dims",
    ),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_a_wrong_rule_is_refused_in_a_sentence(line: str, message: str) -> None:
    whalepy.rule("whalepy_test::decay", line)
    with pytest.raises(WhaleError) as caught:
        whalepy.check_rule("whalepy_test::decay", decay_inputs)
    assert str(caught.value) == message


def test_an_operator_without_a_rule() -> None:
    with pytest.raises(WhaleError) as caught:
        whalepy.check_rule("whalepy_test::decay", decay_inputs)
    assert str(caught.value) == (
        "whalepy_test.decay has no rule that fits these arguments: it runs replicated\n"
        '  fix: register one: whalepy.rule("lib::op", "operands -> results")'
    )


# Wrong entries for operators of torch, by what is wrong with them: each must be noticed.
MISTAKES = [
    (a.softmax.int, (t(4, 6), -1), parse_rule("... -> ...")),  # the dim is needed whole
    (a.mean.dim, (t(4, 6), [0]), parse_rule("ab -> b")),  # partial means do not add up
    (a.add.Scalar, (t(4, 6), 1.0), parse_rule("... -> ...", linear=((0,),))),  # affine
    (a.relu.default, (t(4, 6),), parse_rule("... -> ...", linear=((0,),))),  # not linear, though relu(0) = 0
    (a.mul.Tensor, (t(4, 6), t(4, 6)), parse_rule("..., ... -> ...", linear=((0, 1),))),  # linear in each, not in both
    (a.linear.default, (t(4, 6), t(3, 6), t(3)), parse_rule("...k, nk, n -> ...n")),  # the bias counts twice
    (a.flip.default, (t(4, 6), [0]), parse_rule("ab -> ab")),  # the first shard is not the last
    (a.amax.default, (t(4, 6), [1]), parse_rule("ab -> a")),  # maxima do not add up
    (a.scaled_dot_product_attention.default, (t(2, 3, 4, 5),) * 3, parse_rule("bhqD, bhkD, bhkE -> bhqE")),
    (a.embedding.default, (t(9, 4), ints(9, 5)), parse_rule("vd, ... -> ...d")),  # indices count from the shard's start
    (a.repeat.default, (t(4, 6), [2, 1]), parse_rule("ab -> ab")),  # sizes differ
]


@pytest.mark.parametrize(("op", "args", "wrong"), MISTAKES, ids=lambda value: str(value) if callable(value) else "")
def test_mistakes_are_noticed(monkeypatch: pytest.MonkeyPatch, op: Any, args: tuple[Any, ...], wrong: Rule) -> None:
    monkeypatch.setattr(rule_table, "_find", lambda call: wrong)
    with pytest.raises(WhaleError, match="is wrong"):
        check_call(op, args)


TWO_LEVELS = [
    (a.linear.default, (t(5, 6, 7), t(4, 7), t(4))),
    (a.matmul.default, (t(4, 5, 6), t(4, 6, 4))),
    (a.scaled_dot_product_attention.default, (t(4, 6, 5, 3), t(4, 6, 5, 3), t(4, 6, 5, 3))),
    (a.reshape.default, (t(4, 5, 24), [4, 5, 4, 6])),
    (a.split_with_sizes.default, (t(4, 6, 12), [6, 3, 3], 2)),
    (a.embedding.default, (t(9, 4), ints(9, 4, 5), 2)),
    (a.sum.dim_IntList, (t(4, 6, 5), [1])),
    (a.mean.default, (t(4, 6),)),
    (a.conv2d.default, (t(4, 8, 5, 5), t(12, 2, 3, 3), t(12), [1, 1], [0, 0], [1, 1], 4)),
    (a.index_add.default, (t(4, 6, 5), 1, ints(6, 7), t(4, 7, 5))),
    (a.cross_entropy_loss.default, (t(6, 9), ints(9, 6), None, 2)),
]


@pytest.mark.parametrize(("op", "args"), TWO_LEVELS, ids=lambda value: str(value) if callable(value) else "")
def test_options_of_two_levels_stand_together(op: Any, args: tuple[Any, ...]) -> None:
    one = one_operator(op, [x.requires_grad_() if _floats(x) else x for x in args], {})
    rule = rule_of(Call(one.program.nodes[one.index]))
    pairs = list(two_level_modes(one))
    assert rule is not None and pairs
    for modes in pairs:
        refuse_difference(Trial(one, ((2, 1), (1, 3)), modes), rule, f"{modes}")


def _floats(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


sizes = st.integers(1, 6)
shares = st.lists(st.integers(0, 4), min_size=2, max_size=4).filter(any).map(tuple)


@settings(max_examples=25, deadline=None)
@given(st.lists(sizes, max_size=2), sizes, sizes, st.booleans(), shares)
def test_linear_of_any_shape_at_any_shares(lead: list[int], k: int, n: int, bias: bool, weights: Any) -> None:
    check_call(a.linear.default, (t(*lead, k), t(n, k), t(n) if bias else None), shares=[weights])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4), st.randoms(use_true_random=False), shares)
def test_reshape_of_any_factors_at_any_shares(factors: list[int], random: Any, weights: Any) -> None:
    def grouped() -> list[int]:
        made: list[int] = []
        for factor in factors:
            if made and random.random() < 0.5:
                made[-1] *= factor
            else:
                made.append(factor)
        return made

    check_call(a.reshape.default, (t(*grouped()), grouped()), shares=[weights])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(sizes, st.booleans(), st.booleans()), min_size=1, max_size=3), shares)
def test_broadcasting_of_any_shape_at_any_shares(dims: list[tuple[int, bool, bool]], weights: Any) -> None:
    left = [size if keep else 1 for size, keep, _ in dims]
    right = [size if keep else 1 for size, _, keep in dims]
    check_call(a.div.Tensor, (t(*left), u(*right)), shares=[weights])
    check_call(a.add.Tensor, (t(*left), u(*right[1:])), shares=[weights])


@settings(max_examples=25, deadline=None)
@given(st.lists(sizes, min_size=1, max_size=3), st.data(), st.booleans(), shares)
def test_reductions_over_any_dims_at_any_shares(shape: list[int], data: Any, keepdim: bool, weights: Any) -> None:
    dims = data.draw(st.lists(st.sampled_from(range(-len(shape), len(shape))), unique_by=lambda d: d % len(shape)))
    for op in (a.sum.dim_IntList, a.mean.dim):
        check_call(op, (t(*shape), dims, keepdim), shares=[weights])
