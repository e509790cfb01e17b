from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.rule_cases import ints, letters_of, mask, t, u
from whalepy.program import (
    functional_ops,
    rules_index,
    rules_nn,
    rules_pointwise,
    rules_product,
    rules_reduce,
    rules_shape,
)
from whalepy.program.rule_table import LINES, MAKERS, POINTWISE
from whalepy.program.rules import parse_rule

aten = torch.ops.aten

# Pointwise operators whose arguments no generic call below meets.
PARTICULAR: dict[str, Any] = {
    "addcdiv": lambda: (aten.addcdiv.default, (u(3, 4), u(4), u(3, 1)), {}),
    "addcmul": lambda: (aten.addcmul.default, (u(3, 4), u(4), u(3, 1)), {}),
    "clamp_max": lambda: (aten.clamp_max.Tensor, (t(3, 4), t(4)), {}),
    "clamp_min": lambda: (aten.clamp_min.default, (t(3, 4), 0.5), {}),
    "clamp": lambda: (aten.clamp.default, (t(3, 4), -0.5, 0.5), {}),
    "clip": lambda: (aten.clip.default, (t(3, 4), -0.5, 0.5), {}),
    "copy": lambda: (aten.copy.default, (ints(9, 3, 4), ints(9, 4)), {}),
    "dropout": lambda: (aten.dropout.default, (t(3, 4), 0.0, True), {}),
    "alpha_dropout": lambda: (aten.alpha_dropout.default, (t(3, 4), 0.5, True), {}),
    "native_dropout": lambda: (aten.native_dropout.default, (t(3, 4), 0.5, True), {}),
    "fill": lambda: (aten.fill.Scalar, (t(3, 4), 2.0), {}),
    "full_like": lambda: (aten.full_like.default, (t(3, 4), 2.0), {}),
    "hinge_embedding_loss": lambda: (aten.hinge_embedding_loss.default, (t(3, 4), t(3, 4).sign(), 1.0, 0), {}),
    "igamma": lambda: (aten.igamma.default, (u(3, 4).float(), u(4).float().requires_grad_()), {}),
    "igammac": lambda: (aten.igammac.default, (u(3, 4).float(), u(4).float().requires_grad_()), {}),
    "lerp": lambda: (aten.lerp.Tensor, (t(3, 4), t(3, 4), u(4)), {}),
    "log_sigmoid": lambda: (aten.log_sigmoid.default, (t(3, 4),), {}),
    "margin_ranking_loss": lambda: (aten.margin_ranking_loss.default, (t(3, 4), t(3, 4), t(3, 4).sign(), 0.0, 0), {}),
    "masked_fill": lambda: (aten.masked_fill.Scalar, (t(3, 4), mask(4), 1.0), {}),
    "mvlgamma": lambda: (aten.mvlgamma.default, (u(3, 4) + 3, 2), {}),
    "poisson_nll_loss": lambda: (aten.poisson_nll_loss.default, (t(3, 4), u(3, 4), True, False, 1e-8, 0), {}),
    "polygamma": lambda: (aten.polygamma.default, (1, u(3, 4) + 1), {}),
    "randint_like": lambda: (aten.randint_like.default, (ints(9, 3, 4), 5), {}),
    "soft_margin_loss": lambda: (aten.soft_margin_loss.default, (t(3, 4).requires_grad_(), t(3, 4).sign(), 0), {}),
    "special_zeta": lambda: (aten.special_zeta.default, (u(3, 4) + 2, u(4).requires_grad_()), {}),
    "threshold": lambda: (aten.threshold.default, (t(3, 4), 0.1, 2.0), {}),
    "to": lambda: (aten.to.dtype, (t(3, 4), torch.float32), {}),
    "where": lambda: (aten.where.self, (mask(3, 4), t(4), t(3, 1)), {}),
    "ldexp": lambda: (aten.ldexp.Tensor, (t(3, 4), ints(3, 4)), {}),
    "mse_loss": lambda: loss_call("mse_loss"),
    "l1_loss": lambda: loss_call("l1_loss"),
    "smooth_l1_loss": lambda: loss_call("smooth_l1_loss"),
    "huber_loss": lambda: loss_call("huber_loss"),
    "kl_div": lambda: loss_call("kl_div"),
    "binary_cross_entropy": lambda: loss_call("binary_cross_entropy", None),
    "binary_cross_entropy_with_logits": lambda: loss_call("binary_cross_entropy_with_logits", None, None),
    "complex": lambda: (aten.complex.default, (t(3, 4), t(3, 4)), {}),
    "polar": lambda: (aten.polar.default, (u(3, 4), u(3, 4)), {}),
}
UNSPECIFIED = {"aten.empty_like"}  # whose values nothing promises


def loss_call(name: str, *weights: None) -> Any:
    return getattr(aten, name).default, (u(3, 4), u(3, 4), *weights, 0), {}


OPERANDS = [
    lambda: (u(3, 4),),
    lambda: (u(3, 4), u(4)),
    lambda: (ints(5, 3, 4) + 1,),
    lambda: (ints(5, 3, 4) + 1, ints(5, 4) + 1),
    lambda: (mask(3, 4),),
    lambda: (torch.randn(3, 4, dtype=torch.complex128),),
]


def generic_call(name: str) -> Any:
    """The first overload and operands that torch accepts, the backward pass included."""
    packet = getattr(aten, name)
    for overload, operands in itertools.product(packet.overloads(), OPERANDS):
        op = getattr(packet, overload)
        if op._schema.is_mutable or "out" in overload:
            continue
        torch.manual_seed(0)
        args = [x.requires_grad_() if x.is_floating_point() else x for x in operands()]
        try:
            result = op(*args)
            tensors = [r for r in ([result] if isinstance(result, torch.Tensor) else result) if r.requires_grad]
            if tensors:
                torch.autograd.grad([r.sum() for r in tensors], [x for x in args if x.requires_grad])
        except (RuntimeError, TypeError, NotImplementedError):
            continue
        return lambda: (op, operands(), {})
    raise AssertionError(f"no operands for {name}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(n.removeprefix("aten.") for n in POINTWISE - UNSPECIFIED))
def test_each_pointwise_operator_is_elementwise(name: str) -> None:
    assert letters_of(PARTICULAR.get(name) or generic_call(name)) == ".1 .0"


@pytest.mark.parametrize("name", sorted({*LINES, *MAKERS, *POINTWISE, *rules_pointwise.LINEAR}))
def test_every_name_is_an_operator(name: str) -> None:
    library, _, rest = name.rpartition(".")
    if library == "aten":
        assert hasattr(aten, rest)
    else:
        assert library == functional_ops.__name__ and hasattr(functional_ops, rest)


def test_no_operator_has_two_rules() -> None:
    tables = [LINES, POINTWISE]
    modules = (rules_pointwise, rules_shape, rules_reduce, rules_index, rules_product, rules_nn)
    tables += [module.MAKERS for module in modules]  # type: ignore[list-item]
    for one, other in itertools.combinations(tables, 2):
        assert not set(one) & set(other) - {"aten.to"}  # "to" is pointwise for every overload but one


def test_every_line_parses() -> None:
    for line, linear in LINES.values():
        assert parse_rule(line, linear=linear).inputs


# Operators that a careless table would call elementwise, or that read more than their own element.
DOUBTFUL = [
    *(
        "masked_scatter",
        "index_put",
        "masked_select",
        "nonzero",
        "embedding_bag",
        "histc",
        "bincount",
        "unique_consecutive",
    ),
    *("renorm", "fractional_max_pool2d", "ctc_loss", "trace", "quantile", "as_strided", "sum_to_size", "multinomial"),
]


@pytest.mark.parametrize("name", DOUBTFUL)
def test_doubtful_operators_run_replicated(name: str) -> None:
    assert f"aten.{name}" not in {*LINES, *MAKERS, *POINTWISE}
