"""torch.export of the wrapped model with every dim free, and its errors in sentences."""

from __future__ import annotations

import contextlib
import inspect
import logging
import warnings
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from whalepy.errors import CaptureError, WhaleError
from whalepy.primitives.recording import recording
from whalepy.program.capture_checks import UnansweredError
from whalepy.program.capture_inputs import Leaf, capture_rows, stand_ins
from whalepy.program.capture_places import place_of_error
from whalepy.program.capture_recorder import SizesTooComplexError
from whalepy.program.capture_wrapper import TRAIN_WHOLE, CaptureWrapper, data_dependent


def export_freely(
    wrapper: CaptureWrapper, leaves: Sequence[Leaf], dims: Sequence[int | None], *, training: bool
) -> ExportedProgram:
    """The exported wrapper, training IR, every input dim free that can be. CaptureError: it cannot be exported."""
    model = wrapper.model
    device = _device_of(model)
    taken = frozenset(size for parameter in model.parameters() for size in parameter.shape)
    rows = capture_rows(leaves, dims, taken)
    with _mode(model, training), _attributes_kept(model), torch.enable_grad(), _quiet():
        try:
            return _export_rows(wrapper, leaves, dims, rows, device)
        except SizesTooComplexError as error:
            wrapper.seen.sizes_fixed_at = error.place
            return _export_rows(wrapper, leaves, dims, rows, device)


def _export_rows(
    wrapper: CaptureWrapper, leaves: Sequence[Leaf], dims: Sequence[int | None], rows: int | None, device: torch.device
) -> ExportedProgram:
    """Exports with so many rows; failing that with those of the example.

    The model may fix its number of rows; the check that batch dims came out free then says so in better words.
    """
    try:
        return _export(wrapper, stand_ins(leaves, dims, rows, device), device)
    except (WhaleError, SizesTooComplexError):
        raise
    except Exception as error:
        if rows is None:
            raise _explained(error) from error
        return _export_rows(wrapper, leaves, dims, None, device)


def _export(wrapper: CaptureWrapper, tensors: list[torch.Tensor], device: torch.device) -> ExportedProgram:
    free = [_free_dims(wrapper, tensor, dim) for tensor, dim in zip(tensors, wrapper.batch_dims, strict=True)]
    # On meta, tensors which the model creates must be there too; elsewhere they follow the user's code.
    default = torch.device(device) if device.type == "meta" else contextlib.nullcontext()
    while True:
        wrapper.checks.begin()
        try:
            with recording(), default, _without_stack_traces():
                program = torch.export.export(wrapper, (tensors,), strict=False, dynamic_shapes=(free,))
        except (Exception, UnansweredError) as error:
            if not wrapper.checks.on_trial(error):
                raise
        else:
            if not wrapper.checks.on_trial(None):
                return program


@contextlib.contextmanager
def _without_stack_traces() -> Generator[None]:
    """torch keeps no stack for every node, a fifth of the time of a capture: the recorder notes the user's lines."""
    known: Any = getattr(torch.fx, "config", None)
    before = getattr(known, "do_not_emit_stack_traces", None)
    if before is None:
        yield
        return
    known.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        known.do_not_emit_stack_traces = before


def _free_dims(wrapper: CaptureWrapper, tensor: torch.Tensor, batch_dim: int | None) -> dict[int, Any]:
    if wrapper.seen.sizes_fixed_at is not None:
        return {} if batch_dim is None else {batch_dim: Dim.AUTO}
    return dict.fromkeys(range(tensor.dim()), Dim.AUTO)


_NOISY = ("torch._subclasses.fake_tensor", "torch._export.non_strict_utils", "torch.fx.experimental.symbolic_shapes")


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Without what torch logs about errors and sizes of 1, and warns about attributes: our errors say it."""
    loggers = [logging.getLogger(name) for name in _NOISY]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The tensor attribute")
        for logger in loggers:
            logger.addFilter(_refuse)
        try:
            yield
        finally:
            for logger in loggers:
                logger.removeFilter(_refuse)


def _refuse(_: logging.LogRecord) -> bool:
    return False


def _device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; cpu if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


@contextlib.contextmanager
def _mode(model: nn.Module, training: bool) -> Generator[None]:
    """The model in training or evaluation mode; a model in training keeps the modules that were set apart."""
    before = {module: module.training for module in model.modules()}
    if model.training != training:
        model.train(training)
    try:
        yield
    finally:
        for module, was in before.items():
            module.training = was


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Generator[None]:
    """Puts back buffers and attributes that hold tensors if the forward assigns them."""
    buffers = {module: dict(module._buffers) for module in model.modules()}
    tensors = {module: _tensor_attributes(module) for module in model.modules()}
    try:
        yield
    finally:
        for module, kept in buffers.items():
            module._buffers.update(kept)
        for module, kept in tensors.items():
            for name in _tensor_attributes(module).keys() - kept.keys():
                delattr(module, name)
            module.__dict__.update(kept)


def _tensor_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, torch.Tensor)}


def check_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], targets: int) -> None:
    """CaptureError: the model's forward cannot be called like this, `targets` inputs having gone to loss_fn."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = type(model).__name__
        without = f" without the {targets} which loss_fn takes" if targets else ""
        raise CaptureError(
            f"{name}.forward cannot be called with the example inputs{without}: {error}",
            fix=f"give what it takes: {name}{signature}",
        ) from error


def _explained(error: Exception) -> CaptureError:
    """`error` as a CaptureError with the user's line."""
    if isinstance(error, GuardOnDataDependentSymNode):  # one which torch meets after the forward
        return data_dependent(error)
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    return CaptureError(
        f"the model cannot be captured: {type(error).__name__}: {reason}",
        at=place_of_error(error),
        fix=f"change that line, {TRAIN_WHOLE}",
    )
