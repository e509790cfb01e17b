"""Measuring the CPU at hand. Figures are only compared with what any machine does."""

from __future__ import annotations

import pytest
import torch

from whalepy.runtime import measure
from whalepy.runtime.measure import Effort, Step, measure_device, seconds_of

CPU = torch.device("cpu")
TINY = Effort(0.05, (8, 16), ("float32", "bfloat16"), (2**12, 2**14))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "EFFORTS", {("cpu", True): TINY, ("cpu", False): TINY})


@pytest.mark.usefixtures("tiny")
def test_everything_is_measured_in_order_of_size() -> None:
    measured = measure_device(CPU)
    assert {name: [point.size for point in row] for name, row in measured.products.items()} == {
        "float32": [2 * 8**3, 2 * 16**3],
        "bfloat16": [2 * 8**3, 2 * 16**3],
    }
    sizes = {name: [point.size for point in row] for name, row in measured.memory.items()}
    # An addition reads two and writes one, the others read one and write one.
    assert sizes.pop("add") == [3 * 2**12, 3 * 2**14]
    others = ("copy", "layer_norm", "softmax", "batch_norm", "silu", "exp", "tanh")
    assert sizes == {name: [2 * 2**12, 2 * 2**14] for name in others}
    assert measured.launch_s
    assert measured.host_bandwidth is None
    points = [point for row in (*measured.products.values(), *measured.memory.values()) for point in row]
    assert all(point.seconds > 0 for point in points)


@pytest.mark.usefixtures("tiny")
def test_steps_can_be_watched() -> None:
    seen: list[str] = []

    def watch(steps: list[Step]) -> list[Step]:
        seen.extend(map(str, steps))
        return steps

    measure_device(CPU, quick=True, watch=watch)
    assert seen[:3] == ["launch launch", "product float32", "product float32"]


@pytest.mark.usefixtures("tiny")
def test_a_dtype_that_the_device_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure._product_of

    def refusing(dtype: torch.dtype, side: int, device: torch.device, seconds: float) -> float:
        if dtype == torch.bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return whole(dtype, side, device, seconds)

    monkeypatch.setattr(measure, "_product_of", refusing)
    assert list(measure_device(CPU).products) == ["float32"]


@pytest.mark.usefixtures("tiny")
def test_sizes_end_where_a_call_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "seconds_of", lambda call, device, seconds: 1.0)
    measured = measure_device(CPU)
    assert [len(row) for row in (*measured.products.values(), *measured.memory.values())] == [1] * 10


def test_a_slow_call_runs_twice_and_no_more() -> None:
    calls: list[int] = []
    assert seconds_of(lambda: calls.append(1), CPU, seconds=0.0) > 0
    assert len(calls) == 2


def test_the_precision_of_products_is_as_before() -> None:
    before = torch.get_float32_matmul_precision()
    measure._product("tf32", 8, CPU, 0.001)
    assert torch.get_float32_matmul_precision() == before
