"""What a capture changes without failing, and what it would change in silence."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from whalepy.errors import CaptureError


def warnings_of(model: nn.Module, checkpoint_places: Sequence[str], lost: Sequence[str]) -> tuple[str, ...]:
    """Sentences on what the captured graph does not keep of the model."""
    dropped = "the captured graph does not keep it: give recompute= to compile"
    flagged = [
        name or "the model"
        for name, module in model.named_modules()
        if getattr(module, "gradient_checkpointing", False) is True
    ]
    flags = [f"gradient checkpointing is on in {flagged[0]} ({len(flagged)} in all); {dropped}"] if flagged else []
    calls = [f"torch.utils.checkpoint runs {place}; {dropped}" for place in checkpoint_places[: 0 if flagged else 1]]
    assigned = [f"the forward assigns {name}: the graph keeps neither the new value nor what it read" for name in lost]
    return (*flags, *calls, *assigned)


def check_backwards(functions: Sequence[str]) -> None:
    """CaptureError: export would drop the backward of these autograd functions."""
    if "CheckpointFunction" in functions:
        raise CaptureError(
            "the model uses torch.utils.checkpoint with use_reentrant=True, whose gradient is lost in the capture",
            fix="use_reentrant=False, or remove it and give recompute= to compile",
        )
    if functions:
        raise CaptureError(
            f"the model uses torch.autograd.Function ({', '.join(functions)}), whose backward is lost in the capture",
            fix="make it a torch.library.custom_op with register_autograd,"
            " or give capture=False and loss_weight= to train the model whole",
        )
