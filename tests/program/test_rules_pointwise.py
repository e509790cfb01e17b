from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.rule_cases import Row, call, letters_of, mask, name_of, t, u

a = torch.ops.aten

# call -> letters that its rule leaves free; None: no rule, so it runs replicated
ROWS: list[Row] = [
    (lambda: call(a.add.Tensor, t(4, 6, 5), t(5)), ".2 .1 .0"),
    (lambda: call(a.add.Tensor, t(4, 6, 5), 1.0), ".2 .1 .0"),
    (lambda: call(a.add.Tensor, t(4, 6, 5), t(6, 1), alpha=2), ".2 .1 .0"),
    (lambda: call(a.sub.Tensor, t(4, 1), t(1, 5)), ".1 .0"),
    (lambda: call(a.rsub.Scalar, t(4, 6, 5), 1.0), ".2 .1 .0"),
    (lambda: call(a.mul.Tensor, t(4, 6, 5), t(6, 5)), ".2 .1 .0"),
    (lambda: call(a.div.Tensor, t(4, 6, 5), u(5)), ".2 .1 .0"),
    (lambda: call(a.div.Tensor_mode, t(4, 6, 5), u(5), rounding_mode="floor"), ".2 .1 .0"),
    (lambda: call(a.where.self, mask(4, 6, 5), t(4, 6, 5), t(5)), ".2 .1 .0"),
    (lambda: call(a.where.ScalarOther, mask(4, 5), t(5), 1.0), ".1 .0"),
    (lambda: call(a.where.ScalarSelf, mask(4, 5), 1.0, t(5)), ".1 .0"),
    (lambda: call(a.where.Scalar, mask(4, 5), 1.0, 0.0), ".1 .0"),
    (lambda: call(a.masked_fill.Scalar, t(4, 6, 5), mask(6, 5), 1.0), ".2 .1 .0"),
    (lambda: call(a.masked_fill.Tensor, t(4, 6, 5), mask(6, 5), t()), ".2 .1 .0"),
    (lambda: call(a.dropout.default, t(4, 6, 5), 0.5, True), ".2 .1 .0"),
    (lambda: call(a.native_dropout.default, t(4, 6, 5), 0.5, True), ".2 .1 .0"),
    (lambda: call(a.feature_dropout.default, t(4, 6, 5), 0.5, True), "n c"),
    (lambda: call(a.to.dtype, t(4, 6, 5), torch.float32), ".2 .1 .0"),
    (lambda: call(a.to.dtype, t(4, 6, 5), torch.bool), ".2 .1 .0"),
    (lambda: call(a.to.other, t(4, 6, 5), torch.ones(3)), ".2 .1 .0"),
    (lambda: call(a.type_as.default, t(4, 6, 5), torch.ones(2, 3, 2)), ".2 .1 .0"),
    (lambda: call(a.prelu.default, t(4, 6, 5), t(6)), "n c a"),
    (lambda: call(a.prelu.default, t(4, 6, 5), t(1)), ".2 .1 .0"),
    (lambda: call(a.frexp.Tensor, t(4, 6, 5)), ".2 .1 .0"),
    (lambda: call(a.clamp.Tensor, t(4, 6, 5), t(5)), ".2 .1 .0"),
    (lambda: call(a.clamp.default, t(4, 6, 5), 0.0, 1.0), ".2 .1 .0"),
    (lambda: call(a.pow.Scalar, 2.0, t(4, 6, 5)), ".2 .1 .0"),
    (lambda: call(a.view_as_real.default, torch.randn(3, 4, dtype=torch.complex128)), ".1 .0"),
    (lambda: call(a.view_as_complex.default, t(3, 4, 2)), ".1 .0"),
    (lambda: call(a.zeros_like.default, t(4, 6, 5)), ".2 .1 .0"),
    (lambda: call(a.rrelu.default, t(4, 6, 5), 0.1, 0.3, True), ".2 .1 .0"),
    (lambda: call(a.bernoulli.default, u(4, 5)), ".1 .0"),
    (lambda: call(a.lerp.Tensor, t(4, 6, 5), t(4, 6, 5), t(5)), ".2 .1 .0"),
    (lambda: call(a.addcmul.default, t(4, 6, 5), t(5), t(6, 1)), ".2 .1 .0"),
    (lambda: call(a.detach.default, t(4, 6, 5)), ".2 .1 .0"),
    (lambda: call(a.neg.default, t(4, 6, 5)), ".2 .1 .0"),
    (lambda: call(a.logical_and.default, mask(3, 4), mask(4)), ".1 .0"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("row", "letters"), ROWS, ids=name_of)
def test_split_run_and_recombined_equals_the_operator(row: Callable[[], Any], letters: str | None) -> None:
    assert letters_of(row) == letters
