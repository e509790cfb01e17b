"""What a capture changes without failing, and what it would change in silence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import fx, nn

from whalepy.errors import CaptureError
from whalepy.program.capture_places import code_lines

_CHECKPOINT_CALL = re.compile(r"\bcheckpoint\w*\(")


def warnings_of(model: nn.Module, graph: fx.Graph) -> tuple[str, ...]:
    """Sentences on what the captured graph does not keep of the model."""
    return tuple(_checkpointing(model, graph))


def _checkpointing(model: nn.Module, graph: fx.Graph) -> Iterator[str]:
    flagged = [
        name or "the model"
        for name, module in model.named_modules()
        if getattr(module, "gradient_checkpointing", False) is True
    ]
    lost = "the captured graph does not keep it: give recompute= to compile"
    if flagged:
        yield f"gradient checkpointing is on in {flagged[0]} ({len(flagged)} modules); {lost}"
    places = {node.meta.get("where") for node in graph.nodes if _calls_checkpoint(node)}
    for place in sorted(filter(None, places)):
        yield f"torch.utils.checkpoint is called around {place}; {lost}"


def _calls_checkpoint(node: fx.Node) -> bool:
    return any(_CHECKPOINT_CALL.search(line) for line in code_lines(node.meta.get("stack_trace")))


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
