"""A model that cannot be captured, trained whole: one replicate level, unequal shares, weighted losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import _pytree as pytree

from whalepy.errors import WhaleError
from whalepy.planner.plan import Plan
from whalepy.program.capture_inputs import batch_dims, flatten_inputs
from whalepy.program.capture_wrapper import check_loss, find_loss, loss_call
from whalepy.runtime.arguments import Arguments, as_arguments, leaf_names, normal
from whalepy.runtime.build import Recipe
from whalepy.runtime.groups import Group
from whalepy.runtime.kernels import convert
from whalepy.runtime.parallel import ParallelModel
from whalepy.runtime.rows import rows_of
from whalepy.runtime.storage import broadcast, reduce_over

LossWeight = Callable[..., Any]


class WholeModel(ParallelModel):
    """A ParallelModel that runs the user's own module on every rank.

    The local loss must be a weighted mean over rows whose weights `loss_weight(*args, **kwargs)` sums: the number of
    rows (the default), or of targets that count. Then sum_r w_r loss_r / sum_r w_r is the loss of the global batch.
    """

    def __init__(
        self, recipe: Recipe, device: torch.device, host: Group, planner: Callable[[], Plan], weight: LossWeight | None
    ) -> None:
        super().__init__(recipe, device, host)
        self._planner = planner
        self._weight = weight

    def start(self, example: Arguments | None = None) -> None:
        """Place this rank and take over rank 0's values. Collective; once."""
        self._take_place(self._planner())
        model = self._recipe.model.to(self._device)
        for value in (*model.parameters(), *model.buffers()):
            value.data.copy_(broadcast(self._host, value.data))
        self._modules.update(model._modules)
        self._parameters.update(model._parameters)
        self._buffers.update(model._buffers)
        if example is not None:
            self._remember(example)

    def local_batch(self, global_batch: Any) -> Any:
        """This rank's rows of a global batch; the same structure and keys on every rank."""
        self._remember(as_arguments(global_batch))
        return super().local_batch(global_batch)

    def _remember(self, example: Arguments) -> None:
        leaves, _ = flatten_inputs(self._recipe.model.forward, *example)
        self._batch_dims.update(zip(leaf_names(example), batch_dims(leaves, self._recipe.batch_dim), strict=True))

    def train_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of the global batch, on every rank; adds to `.grad`."""
        example, weight, total = self._weighed(args, kwargs, training=True)
        parameters = [p for p in self._recipe.model.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        if weight > 0:
            self._recipe.model.train()
            own = self._loss(example) * (weight / total)
            own.backward()
            loss = own.detach().double()
        gradients = reduce_over(self._group, [p.grad for p in parameters], parameters)
        for p, old, new in zip(parameters, before, gradients, strict=True):
            p.grad = new if old is None else old if new is None else old + new
        self._average_buffers(weight / total)
        self._step += 1
        return self._sum(loss).to(self._dtype())

    def eval_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of the global batch in evaluation mode, on every rank."""
        example, weight, total = self._weighed(args, kwargs, training=False)
        model = self._recipe.model
        was_training = model.training
        model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        with torch.no_grad():
            if weight > 0:
                loss = self._loss(example).double() * (weight / total)
        model.train(was_training)
        return self._sum(loss).to(self._dtype())

    def _outputs(self, *args: Any, **kwargs: Any) -> Any:
        return self._recipe.model(*args, **kwargs)

    @property
    def _group(self) -> Group:
        return self._placement.groups[0]

    def _weighed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool
    ) -> tuple[Arguments, float, float]:
        """The arguments on the device, this rank's weight and that of all ranks."""
        example = normal(args, kwargs)
        leaves, dims, _ = self._agree(example, (training, "loss"))
        example = pytree.tree_unflatten(leaves, pytree.tree_structure(example))
        rows = rows_of(leaves, dims)
        weight = float(rows if self._weight is None else self._weight(*example[0], **example[1])) if rows else 0.0
        total = float(self._sum(torch.tensor(weight, dtype=torch.float64, device=self._device)))
        if not total > 0:
            raise WhaleError("loss_weight is zero on every rank", fix="return the number of rows or targets that count")
        return example, weight, total

    def _sum(self, value: torch.Tensor) -> torch.Tensor:
        return convert(value, "P", "R", self._group)

    def _loss(self, example: Arguments) -> torch.Tensor:
        recipe = self._recipe
        if recipe.loss_fn is None:
            return find_loss(recipe.model(*example[0], **example[1]))
        call = loss_call(recipe.loss_fn, *example)
        args, kwargs = call.model_inputs(*example)
        targets, named = call.targets(*example)
        return check_loss(recipe.loss_fn(recipe.model(*args, **kwargs), *targets, **named), "what loss_fn returns")

    def _dtype(self) -> torch.dtype:
        floating = [p.dtype for p in self._recipe.model.parameters() if p.dtype.is_floating_point]
        return torch.float64 if torch.float64 in floating else torch.float32

    def _average_buffers(self, share: float) -> None:
        """Buffers that the step wrote: averaged by weight where they are floats, rank 0's where they count."""
        for buffer in self._recipe.model.buffers():
            with torch.no_grad():
                if buffer.dtype.is_floating_point:
                    buffer.copy_(self._sum(buffer.detach() * share))
                elif self._host.size > 1:
                    dist.broadcast(buffer, src=0)
