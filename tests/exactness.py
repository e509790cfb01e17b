"""Distributed equals local: a training run on several ranks against the same run in one process.

A quantity `a` equals `b` when |a - b| <= tolerance x the largest absolute value of that quantity over the whole model:
1e-9 in float64 with AdamW, 1e-5 in float32 with SGD and momentum (AdamW in float32 amplifies rounding: 8e-4 in one
process). Losses: 1e-9 and 1e-6, relative.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import whalepy
from tests.pool import Pool
from whalepy.runtime.parallel import ParallelModel

LOSS_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-6}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@dataclass(frozen=True)
class Run:
    """What is trained, and how."""

    make: Callable[[], tuple[nn.Module, list[Any]]]
    """The model and its global batches (dicts or tuples); steps take them in turn."""
    annotations: Callable[[], Mapping[str, Any]]
    world: int
    spec: str | None = None
    """Cluster; equal CPUs where None."""
    steps: int = 3
    dtype: torch.dtype = torch.float64
    loss_fn: Callable[..., Tensor] | None = None
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    """None: AdamW in float64, SGD with momentum in float32."""
    accumulate: int = 1
    """train_step calls before each optimizer step."""
    clip: tuple[float, float] | None = None
    """max_norm, norm_type"""
    evaluate: bool = False
    """Whether eval_step is compared too."""
    output: Callable[[Any], Tensor] | None = None
    """The tensor of the model's output whose rows are compared; None: no output is."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Further arguments of compile."""
    inject: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
    """A fault that is there while the distributed run is."""


@dataclass
class Outcome:
    """What one rank saw: every difference as a sentence, and what must have the same bits on all ranks."""

    wrong: list[str] = field(default_factory=list[str])
    shared: list[float] = field(default_factory=list[float])
    microbatches: int = 1
    notes: tuple[str, ...] = ()
    """What the plan says of itself."""


def compare(workers: Pool, run: Run, *, timeout_s: float = 120.0) -> None:
    """Fails with the list of what differs between the distributed run and the local one."""
    found = differences(workers, run, timeout_s=timeout_s)
    assert not found, "\n".join(found)


def differences(workers: Pool, run: Run, *, timeout_s: float = 120.0) -> list[str]:
    """A sentence for each thing that differs from the local run, on any rank."""
    return wrong_in(workers.run(run.world, outcome, run, timeout_s=timeout_s))


def wrong_in(outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence for each thing that any rank saw differ."""
    found = [f"rank {rank}: {text}" for rank, one in enumerate(outcomes) for text in one.wrong]
    if any(one.shared != outcomes[0].shared for one in outcomes):
        found.append(f"ranks disagree on losses or norms: {[one.shared for one in outcomes]}")
    return found


def outcome(run: Run) -> Outcome:
    """Both runs on this rank."""
    found = Outcome()
    with _literals_as(run.dtype), (run.inject or contextlib.nullcontext)():
        model, batches = run.make()
        model, batches = model.to(run.dtype), [_promoted(batch, run.dtype) for batch in batches]
        local = copy.deepcopy(model)
        whalepy.annotate(model, run.annotations())
        spec = run.spec or f"{run.world}xcpu"
        parallel = whalepy.compile(model, spec, batches[0], loss_fn=run.loss_fn, **run.options)
        found.microbatches, found.notes = parallel.plan.microbatches, parallel.plan.notes
        Training(run, parallel, local, batches, found).run()
    return found


@dataclass
class Training:
    """The two runs side by side."""

    run_of: Run
    parallel: ParallelModel
    local: nn.Module
    batches: list[Any]
    found: Outcome

    def run(self) -> None:
        run, found = self.run_of, self.found
        plan = self.parallel.plan
        asked = run.options.get("microbatches", None if len(plan.stages) > 1 else 1)  # pipelines choose a number
        if asked not in (None, plan.microbatches):
            found.wrong.append(f"the plan has {self.parallel.plan.microbatches} microbatches")
        found.wrong += _names(self.parallel, self.local)
        found.wrong += self._values("initial value", self._state(), self.local.state_dict())
        before = {name: p.detach().clone() for name, p in self.local.named_parameters()}
        optimizers = [(run.optimizer or _optimizer(run.dtype))(model) for model in (self.parallel, self.local)]
        for step in range(run.steps):
            for part in range(run.accumulate):
                self._backward(step, self.batches[(step * run.accumulate + part) % len(self.batches)])
            if step == 0 or run.dtype == torch.float64:
                self._compare_gradients(step)
            self._clip(step)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        after = self._state()
        changes = {name: after[name] - before[name] for name in before}
        own = {name: p.detach() - before[name] for name, p in self.local.named_parameters()}
        found.wrong += self._values("change", changes, own)
        buffers = {name: value for name, value in self.local.state_dict().items() if name not in before}
        found.wrong += self._values("buffer", {name: after[name] for name in buffers}, buffers)
        self._compare_inference()

    def _state(self) -> dict[str, Tensor]:
        return self.parallel.full_state_dict()

    def _backward(self, step: int, batch: Any) -> None:
        args, kwargs = _as_arguments(self.parallel.local_batch(batch))
        loss = self.parallel.train_step(*args, **kwargs)
        expected = local_loss(self.local, batch, self.run_of.loss_fn)
        expected.backward()
        self.found.shared.append(float(loss))
        self._compare_loss(f"loss of step {step}", loss, expected)

    def _compare_loss(self, what: str, loss: Tensor, expected: Tensor) -> None:
        tolerance = LOSS_TOLERANCE[self.run_of.dtype]
        if loss.requires_grad or loss.dtype != expected.dtype:
            self.found.wrong.append(f"{what} is no detached {expected.dtype}: {loss}")
        if not _near(float(loss), expected.item(), tolerance):
            self.found.wrong.append(f"{what}: {float(loss)!r}, locally {expected.item()!r}")

    def _compare_gradients(self, step: int) -> None:
        gradients = self.parallel.full_gradients()
        own = {name: p.grad for name, p in self.local.named_parameters()}
        for name in own:
            if (own[name] is None) != (gradients[name] is None):
                self.found.wrong.append(f"step {step}: gradient of {name} is {gradients[name]}, locally {own[name]}")
        there = {name: g for name, g in own.items() if g is not None}
        theirs = {name: g for name in there if (g := gradients[name]) is not None}
        self.found.wrong += self._values(f"step {step}: gradient", theirs, there)

    def _clip(self, step: int) -> None:
        if self.run_of.clip is None:
            return
        limit, kind = self.run_of.clip
        norm = self.parallel.clip_grad_norm_(limit, norm_type=kind)
        expected = nn.utils.clip_grad_norm_(self.local.parameters(), limit, norm_type=kind)
        self.found.shared.append(float(norm))
        if not _near(float(norm), float(expected), TOLERANCE[self.run_of.dtype]):
            self.found.wrong.append(f"step {step}: norm {float(norm)!r}, locally {float(expected)!r}")

    def _values(self, what: str, values: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
        tolerance = TOLERANCE[self.run_of.dtype]
        scale = max((float(value.abs().max()) for value in expected.values() if value.numel()), default=0.0)
        wrong: list[str] = []
        for name, value in values.items():
            if value.shape != expected[name].shape:
                wrong.append(f"{what} of {name} has shape {list(value.shape)}, locally {list(expected[name].shape)}")
                continue
            difference = float((value - expected[name]).abs().max()) if value.numel() else 0.0
            if not difference <= tolerance * scale:
                wrong.append(f"{what} of {name} differs by {difference:.3e}; the largest of the model is {scale:.3e}")
        return wrong

    def _compare_inference(self) -> None:
        run, batch = self.run_of, self.batches[0]
        args, kwargs = _as_arguments(self.parallel.local_batch(batch))
        with torch.no_grad():
            if run.evaluate:
                loss = self.parallel.eval_step(*args, **kwargs)
                self.local.eval()
                self._compare_loss("loss in evaluation", loss, local_loss(self.local, batch, run.loss_fn))
                self.local.train()
            if run.output is not None:
                self._compare_output(run.output, args, kwargs, batch)

    def _compare_output(
        self, output: Callable[[Any], Tensor], args: tuple[Any, ...], kwargs: dict[str, Any], batch: Any
    ) -> None:
        targets = _target_count(self.run_of.loss_fn)
        given = self.parallel(*args[: len(args) - targets], **kwargs)
        last = len(self.parallel.plan.stages) - 1
        if last not in self.parallel.plan.stages_of(self.parallel._host.position):
            self.found.wrong += [] if given is None else [f"output outside the last stage: {given}"]
            return
        theirs = output(given)
        own_args, own_kwargs = _as_arguments(batch)
        whole = output(self.local(*own_args[: len(own_args) - targets], **own_kwargs))
        (rows,) = self.parallel.local_batch((torch.arange(len(whole)),))
        self.found.wrong += self._values("output", {"these rows": theirs}, {"these rows": whole[rows]})


def local_loss(model: nn.Module, batch: Any, loss_fn: Callable[..., Tensor] | None) -> Tensor:
    """What the local model returns for a whole batch."""
    args, kwargs = _as_arguments(batch)
    if loss_fn is None:
        output = model(*args, **kwargs)
        return output if isinstance(output, Tensor) else output.loss
    count = len(args) - _target_count(loss_fn)
    return loss_fn(model(*args[:count], **kwargs), *args[count:])


def _target_count(loss_fn: Callable[..., Tensor] | None) -> int:
    return 0 if loss_fn is None else len(inspect.signature(loss_fn).parameters) - 1


def _as_arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), batch) if isinstance(batch, dict) else (tuple(batch), {})


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    """SGD, which does not make a large change of a gradient that is rounding alone."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """The usual one, for float64."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)  # with 1e-8, rounding of gradients that are 0 shows


def _optimizer(dtype: torch.dtype) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return adamw if dtype == torch.float64 else momentum


def _names(parallel: ParallelModel, local: nn.Module) -> list[str]:
    """Names and numbers of dims are the local model's, tied parameters once; a rank of a pipeline has some of them."""
    theirs = {name: (p.ndim, p.requires_grad) for name, p in parallel.named_parameters()}
    own = {name: (p.ndim, p.requires_grad) for name, p in local.named_parameters()}
    partial = len(parallel.plan.stages) > 1 or bool(parallel.plan.idle)
    alike = theirs.items() <= own.items() and bool(theirs) if partial else theirs == own
    wrong = [] if alike else [f"parameters are {theirs}, locally {own}"]
    keys, own_keys = set(parallel.full_state_dict()), set(local.state_dict())  # type: ignore[operator]
    return wrong if keys == own_keys else [*wrong, f"state has keys {sorted(keys)}, locally {sorted(own_keys)}"]


def _near(value: float, expected: float, tolerance: float) -> bool:
    return abs(value - expected) <= tolerance * abs(expected)


def _promoted(batch: Any, dtype: torch.dtype) -> Any:
    return pytree.tree_map(lambda v: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v, batch)


@contextlib.contextmanager
def _literals_as(dtype: torch.dtype) -> Iterator[None]:
    """Losses and norms of transformers compute in float32 whatever the model's dtype: `x.float()`,
    `x.to(torch.float32)`. In a float64 run these literals are float64, in the eager model and, since capture traces the
    calls, in the captured graph."""
    if dtype != torch.float64:
        yield
        return
    original = torch.Tensor.to

    def to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        double = [dtype if value is torch.float32 else value for value in (*args, *kwargs.values())]
        return original(tensor, *double[: len(args)], **dict(zip(kwargs, double[len(args) :], strict=True)))

    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double), mock.patch.object(torch.Tensor, "to", to):
        yield
