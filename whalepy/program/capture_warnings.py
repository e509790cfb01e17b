"""What a capture changes without failing, and what it would change in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from whalepy.errors import CaptureError
from whalepy.program.capture_wrapper import Seen


def warnings_of(model: nn.Module, seen: Seen) -> tuple[str, ...]:
    """Sentences on what the captured graph does not keep of the model."""
    return (*_checkpointing(model, seen), *_assignments(seen), *_fixed_sizes(seen), *_checks(seen), *_sparse(seen))


def _checkpointing(model: nn.Module, seen: Seen) -> Iterator[str]:
    """One sentence if the model recomputes its forward, by a flag of a module or by a call."""
    dropped = "the captured graph does not keep it, and compile(recompute=...) is not there yet"
    modules = model.named_modules()
    flagged = [name or "the model" for name, m in modules if getattr(m, "gradient_checkpointing", False) is True]
    if flagged:
        yield f"gradient checkpointing is on in {flagged[0]} ({len(flagged)} in all); {dropped}"
    elif seen.checkpoint_places:
        yield f"torch.utils.checkpoint runs {seen.checkpoint_places[0]}; {dropped}"


def _assignments(seen: Seen) -> Iterator[str]:
    for name in seen.lost:
        yield f"the forward assigns {name}: the graph keeps neither the new value nor what it read"


def _fixed_sizes(seen: Seen) -> Iterator[str]:
    if seen.sizes_fixed_at:
        yield (
            f"sizes other than the number of rows are fixed to those of the example: {seen.sizes_fixed_at} computes"
            " with them at such length that a capture with free sizes would take minutes"
        )


def _checks(seen: Seen) -> Iterator[str]:
    for place in seen.checks_passed:
        yield f"{place} raises an error for some values in tensors: the captured graph does not look"


def _sparse(seen: Seen) -> Iterator[str]:
    for place in seen.sparse_gradients:
        yield f"{place} asks for sparse gradients: they are dense here"


def check_backwards(functions: Mapping[str, str | None]) -> None:
    """CaptureError: export would drop the backward of these autograd functions."""
    if "CheckpointFunction" in functions:
        raise CaptureError(
            "the model uses torch.utils.checkpoint with use_reentrant=True, whose gradient is lost in the capture",
            at=functions["CheckpointFunction"],
            fix="give it use_reentrant=False",
        )
    if functions:
        raise CaptureError(
            f"the model uses torch.autograd.Function ({', '.join(functions)}), whose backward is lost in the capture",
            at=next(iter(functions.values())),
            fix="make it a torch.library.custom_op with register_autograd,"
            " or give capture=False and loss_weight= to train the model whole",
        )
