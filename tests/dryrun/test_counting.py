"""What is noted of an operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from whalepy.dryrun.counting import UNALIGNED, Counter
from whalepy.dryrun.rehearse import fused_attention
from whalepy.hardware.devices import profile_table
from whalepy.hardware.measured import Measured, Point, refined
from whalepy.program.functional_ops import grouped_linear

META = torch.device("meta")


@pytest.mark.parametrize(("width", "kind"), [(64, ""), (112, ""), (150, UNALIGNED), (108, UNALIGNED), (128, "")])
def test_heads_whose_rows_start_anywhere(width: int, kind: str) -> None:
    """Rows of 150 half-precision numbers do not all start at a multiple of 16 bytes."""
    with Counter() as counter:
        queries, keys = (torch.empty(4, 32, width, dtype=torch.float16, device=META) for _ in range(2))
        scores = queries @ keys.transpose(1, 2)
        scores @ keys
    products = [event for event in counter.events if event.flops]
    assert [event.kind for event in products] == [kind, kind]


@pytest.mark.parametrize(("width", "kind"), [(64, ""), (150, UNALIGNED)])
def test_heads_of_one_row_start_anywhere_too(width: int, kind: str) -> None:
    """Of one row all heads are views of the same numbers: rows of 8 heads are aligned, most heads are not."""
    with Counter() as counter:
        queries, keys = (torch.empty(1, 32, 8 * width, dtype=torch.float16, device=META) for _ in range(2))
        heads, others = (x.unflatten(-1, (8, width)).transpose(1, 2) for x in (queries, keys))
        scores = heads @ others.transpose(2, 3)
        scores @ others
    products = [event for event in counter.events if event.flops]
    assert [event.kind for event in products] == [kind, kind]


def test_rows_by_the_matrix_of_their_group() -> None:
    """One product forward, and two of the same FLOPs backward."""
    import transformers.integrations.moe  # noqa: F401  # registers the operator

    rows, weight = (torch.empty(sizes, device=META, requires_grad=True) for sizes in ((6, 8), (3, 8, 5)))
    groups = torch.empty(6, dtype=torch.int64, device=META)
    with Counter() as counter:
        grouped_linear(rows, weight, groups, "transformers.grouped_mm_fallback").sum().backward()
    products = [event for event in counter.events if event.flops]
    assert [event.flops for event in products] == [2 * 6 * 8 * 5, 4 * 6 * 8 * 5]
    assert [event.outputs for event in products] == [6 * 5, 6 * 8]


def test_the_elements_that_products_make() -> None:
    rows, weight, bias = (torch.empty(sizes, device=META, requires_grad=True) for sizes in ((2, 3, 8), (5, 8), (5,)))
    with Counter() as counter:
        scores = F.linear(rows, weight, bias) @ torch.empty(2, 5, 7, device=META)
        scores.sum().backward()
    outputs = [event.outputs for event in counter.events if event.flops]
    assert outputs == [6 * 5, 6 * 7, 6 * 5, 6 * 8, 5 * 8]
    assert {event.outputs for event in counter.events if not event.flops} == {0}


def test_they_take_longer_on_matrix_units_alone() -> None:
    a100 = profile_table()["A100-SXM4-80GB"]
    assert a100.product_seconds(1e11, "float16", UNALIGNED) > 5 * a100.product_seconds(1e11, "float16")
    assert a100.product_seconds(1e11, "float32", UNALIGNED) == a100.product_seconds(1e11, "float32")


def _kinds(call: Callable[[torch.Tensor], object]) -> list[str]:
    x = torch.empty(4, 8, device=META, requires_grad=True)
    with Counter() as counter:
        call(x)
    return [event.kind for event in counter.events]


@pytest.mark.parametrize(
    ("call", "kinds"),
    [
        (torch.tanh, ["tanh"]),
        (lambda x: F.gelu(x, approximate="tanh"), ["tanh"]),
        (F.gelu, ["exponential"]),
        (F.silu, ["exponential"]),
        (torch.sigmoid, ["exponential"]),
        (lambda x: x.log_softmax(-1), ["normalise"]),
        (torch.relu, [""]),
        (lambda x: x * x, [""]),
        (lambda x: torch.autograd.grad(F.gelu(x), x, torch.empty_like(x)), ["exponential"] * 2),
        (lambda x: torch.autograd.grad(torch.tanh(x), x, torch.empty_like(x)), ["tanh", ""]),
    ],
)
def test_what_takes_longer_than_its_bytes(call: Callable[[torch.Tensor], object], kinds: list[str]) -> None:
    assert _kinds(call) == kinds


def test_what_was_measured_of_them_counts() -> None:
    points = {name: (Point(1e6, seconds),) for name, seconds in (("add", 1e-4), ("exp", 4e-4), ("tanh", 9e-4))}
    found = refined(profile_table()["A100-SXM4-80GB"], Measured({}, points))
    times = [found.memory_seconds(1e6, kind) for kind in ("", "exponential", "tanh")]
    assert times == pytest.approx([1e-4, 4e-4, 9e-4])


@pytest.mark.parametrize(("length", "part"), [(16, 1), (128, 1), (256, 3 / 4), (1024, 9 / 16), (1100, 10 / 18)])
def test_causal_attention_computes_the_blocks_up_to_the_diagonal(length: int, part: float) -> None:
    def flops(is_causal: bool) -> int:
        with Counter() as counter:
            q, k, v = (torch.empty(2, 4, length, 32, device=META, requires_grad=True) for _ in range(3))
            result = fused_attention(q, k, v, is_causal=is_causal)
            torch.autograd.grad(result, (q, k, v), torch.empty_like(result))
        assert [event.kind for event in counter.events if event.flops] == ["attention", "attention backward"]
        return sum(event.flops for event in counter.events)

    assert flops(is_causal=True) == pytest.approx(part * flops(is_causal=False), rel=1e-6)
