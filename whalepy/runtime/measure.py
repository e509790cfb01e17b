"""Measuring the device at hand: products, operators bound by memory, launches and the link to the host.

The branches for CUDA are written after its documentation and have not run yet.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from whalepy.hardware.measured import Measured, Point
from whalepy.runtime.measure_kinds import KINDS, Kind

_WINDOWS = 5
# The width of what is normalised: hidden sizes of models of a few hundred million parameters.
_COLUMNS = 1024
_IMAGE = (64, 4, 4)  # as many elements, with channels
_MIB = 2**20


@dataclass(frozen=True)
class Effort:
    """Which sizes are measured, and for how long each."""

    seconds_per_point: float
    sides: tuple[int, ...]  # of square matrices
    dtypes: tuple[str, ...]
    tensor_bytes: tuple[int, ...]  # of one operand of an elementwise operator
    operators: tuple[str, ...] = ("add", "copy", "layer_norm", "softmax", "batch_norm", "silu", "exp", "tanh")
    kinds_in: str = "float32"  # the dtype of the operators that are measured apart
    rows: tuple[int, ...] = ()  # of the batches that these are given


EFFORTS: dict[tuple[str, bool], Effort] = {
    # Quick: one second, for `compile` without a cluster.
    ("cpu", True): Effort(0.07, (64, 256, 512), ("float32",), (2**14, 2**22), ("add", "layer_norm", "softmax")),
    ("cuda", True): Effort(0.05, (512, 2048, 4096), ("float32", "bfloat16"), (2**16, 2**24, 2**27)),
    ("cpu", False): Effort(
        0.3,
        (32, 64, 128, 256, 512, 1024),
        ("float32", "float64", "bfloat16"),
        # The last two lie on both sides of what the C library takes from the system for every tensor anew.
        (2**12, 2**14, 2**18, 2**22, 2**24, 2**26),
        rows=(1, 4, 16),
    ),
    ("cuda", False): Effort(
        0.3,
        (128, 256, 512, 1024, 2048, 4096, 8192),
        ("float32", "tf32", "float64", "float16", "bfloat16"),
        (2**14, 2**16, 2**18, 2**20, 2**24, 2**28),
        kinds_in="bfloat16",
        rows=(1, 8, 64),
    ),
}


@dataclass(frozen=True)
class Step:
    """One thing to measure; `run` gives the seconds of one call, or None where the device cannot."""

    kind: str  # product, memory, launch, host, apart
    name: str  # the dtype or the operator
    size: float
    run: Callable[[], float | None]

    def __str__(self) -> str:
        return f"{self.kind} {self.name}".strip()


def measure_device(
    device: torch.device,
    *,
    quick: bool = False,
    effort: Effort | None = None,
    watch: Callable[[list[Step]], Iterable[Step]] = iter,
) -> Measured:
    """What the device does, every kernel alone. `watch` may show the steps as they pass.

    Ranks that share a host measure at the same time, so each gets what it will have in training. A dtype or a size that
    the device refuses is left out; sizes end where one call takes longer than its part of the time.
    """
    found: dict[str, dict[str, list[Point]]] = {"product": {}, "memory": {}, "apart": {}}
    single: dict[str, float] = {}
    effort = effort or EFFORTS["cuda" if device.type == "cuda" else "cpu", quick]
    too_slow: set[str] = set()
    for step in watch(list(_steps(device, effort))):
        seconds = None if step.name in too_slow else step.run()
        if seconds is None:
            continue
        if step.kind in ("launch", "host"):
            single[step.name] = seconds
            continue
        found[step.kind].setdefault(step.name, []).append(Point(step.size, seconds))
        if seconds > effort.seconds_per_point:
            too_slow.add(step.name)
    links = [_LINK_BYTES / single[name] for name in ("to device", "to host") if name in single]
    return Measured(
        products={dtype: tuple(points) for dtype, points in found["product"].items()},
        memory={name: tuple(points) for name, points in found["memory"].items()},
        apart={name: tuple(points) for name, points in found["apart"].items()},
        apart_in=effort.kinds_in,
        launch_s=single.get("launch"),
        host_bandwidth=min(links) if links else None,
    )


def seconds_of(call: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Seconds of one call: the best of five windows of `seconds` together; one call where it takes longer.

    What else the machine does only ever adds; what runs all the time, such as another rank, is in every window.
    """
    call()  # first use: libraries load, caches fill
    once = _timed(call, 1, device)
    calls = max(1, min(100_000, int(seconds / _WINDOWS / max(once, 1e-7))))
    if once > seconds:
        return once
    return min(_timed(call, calls, device) for _ in range(_WINDOWS))


def _timed(call: Callable[[], Any], calls: int, device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- what is measured ---------------------------------------------------------------------------------------------


def _steps(device: torch.device, effort: Effort) -> Iterator[Step]:
    time_s = effort.seconds_per_point
    yield Step("launch", "launch", 1, lambda: _launch(device, time_s))
    for dtype in effort.dtypes:
        for side in effort.sides:
            yield Step("product", dtype, 2.0 * side**3, lambda d=dtype, n=side: _product(d, n, device, time_s))
    for nbytes in effort.tensor_bytes:
        for name in effort.operators:
            moved = nbytes * (3 if name == "add" else 2)  # operands and result, each once
            yield Step("memory", name, moved, lambda o=name, n=nbytes: _elementwise(o, n, device, time_s))
    dtype = getattr(torch, effort.kinds_in)
    for name, kind in KINDS.items():
        for rows in effort.rows:
            yield Step("apart", name, kind.flops(rows), lambda k=kind, r=rows: _apart(k, r, dtype, device, time_s))
    if device.type == "cuda":
        yield Step("host", "to device", _LINK_BYTES, lambda: _host_copy(device, time_s, upwards=True))
        yield Step("host", "to host", _LINK_BYTES, lambda: _host_copy(device, time_s, upwards=False))


def _launch(device: torch.device, seconds: float) -> float:
    one = torch.ones(1, device=device, requires_grad=True)  # as in training: autograd takes note of every operator
    return seconds_of(lambda: one + one, device, seconds)


def _product(dtype: str, side: int, device: torch.device, seconds: float) -> float | None:
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    with _precision("high" if dtype == "tf32" else "highest"):
        return _where_possible(lambda: _product_of(kind, side, device, seconds))


def _product_of(dtype: torch.dtype, side: int, device: torch.device, seconds: float) -> float:
    calls: list[Callable[[], Tensor]] = []
    for _ in range(_sets(2 * side**2 * dtype.itemsize)):
        a, b = (torch.rand(side, side, device=device).to(dtype) for _ in range(2))
        # As in training: forward with a transposed weight, then the gradients of both operands.
        calls += [lambda a=a, b=b: a @ b.t(), lambda a=a, b=b: a @ b, lambda a=a, b=b: a.t() @ b]
    return seconds_of(_in_turn(calls), device, seconds)


def _elementwise(operator: str, nbytes: int, device: torch.device, seconds: float) -> float | None:
    return _where_possible(lambda: _elementwise_of(operator, nbytes, device, seconds))


def _elementwise_of(operator: str, nbytes: int, device: torch.device, seconds: float) -> float:
    sets = range(_sets(2 * nbytes))
    shape = (max(1, nbytes // 4 // _COLUMNS), _COLUMNS)
    operands = [(torch.rand(shape, device=device), torch.rand(shape, device=device)) for _ in sets]
    call = _ELEMENTWISE[operator]
    return seconds_of(_in_turn([lambda x=x, y=y: call(x, y) for x, y in operands]), device, seconds)


_ELEMENTWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # results are new each time, as in training
    "add": lambda x, y: x + y,
    "copy": lambda x, y: x.clone(),
    "layer_norm": lambda x, y: torch.nn.functional.layer_norm(x, (_COLUMNS,)),
    "softmax": lambda x, y: torch.softmax(x, -1),
    "silu": lambda x, y: torch.nn.functional.silu(x),
    "exp": lambda x, y: torch.exp(x),
    "tanh": lambda x, y: torch.tanh(x),
    "batch_norm": lambda x, y: torch.nn.functional.batch_norm(x.view(-1, *_IMAGE), None, None, training=True),
}

# Operands come from memory, as in a step, which has more of them than caches hold.
_BEYOND_CACHES = 128 * _MIB
_MOST_SETS = 512


def _sets(nbytes: int) -> int:
    """How many sets of operands of so many bytes to go through in turn."""
    return max(2, min(_MOST_SETS, _BEYOND_CACHES // nbytes))


def _in_turn(calls: Sequence[Callable[[], Any]]) -> Callable[[], Any]:
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def _apart(kind: Kind, rows: int, dtype: torch.dtype, device: torch.device, seconds: float) -> float | None:
    def mean() -> float:
        calls = kind.calls(rows, dtype, device)
        all_shapes = seconds_of(lambda: [call() for call in calls], device, seconds)
        return all_shapes / len(calls)

    return _where_possible(mean)


_LINK_BYTES = 64 * _MIB


def _host_copy(device: torch.device, seconds: float, *, upwards: bool) -> float | None:
    return _where_possible(lambda: _host_copy_of(device, seconds, upwards))


def _host_copy_of(device: torch.device, seconds: float, upwards: bool) -> float:
    host = torch.empty(_LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    card = torch.empty(_LINK_BYTES, dtype=torch.uint8, device=device)
    target, origin = (card, host) if upwards else (host, card)
    return seconds_of(lambda: target.copy_(origin, non_blocking=True), device, seconds)


def _where_possible(run: Callable[[], float]) -> float | None:
    """None where the device lacks the dtype or the memory: torch says both by RuntimeError."""
    try:
        return run()
    except RuntimeError:
        return None


@contextmanager
def _precision(wanted: str) -> Generator[None, None, None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
