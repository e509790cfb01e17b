"""A model that cannot be captured, trained whole: one replicate level, unequal shares, weighted losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
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
        model = self._recipe.model
        _check_values(model)
        model.to(self._device)
        for value in (*model.parameters(), *model.buffers()):
            value.data.copy_(broadcast(self._host, value.data))
        self._modules.update(model._modules)
        self._parameters.update(model._parameters)
        self._buffers.update(model._buffers)
        first = {id(value): name for name, value in (*model.named_parameters(), *model.named_buffers())}
        keys = model.state_dict(keep_vars=True)
        self._ties = {key: first[id(value)] for key, value in keys.items() if first.get(id(value), key) != key}
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
        example, weights = self._weighed(args, kwargs, training=True)
        share = weights[self._group.position] / sum(weights)
        model = self._recipe.model
        kept = _Kept.of(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        if share > 0:
            if not model.training:
                model.train()
            own = self._loss(example) * share
            if own.requires_grad:
                own.backward()
            loss = own.detach().double()
        gradients = reduce_over(self._group, [p.grad for p in parameters], parameters)
        for p, old, new in zip(parameters, before, gradients, strict=True):
            p.grad = new if old is None else old if new is None else old + new
        self._average_buffers(kept, weights)
        self._step += 1
        return self._sum(loss).to(self._dtype())

    def eval_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss of the global batch in evaluation mode, on every rank."""
        example, weights = self._weighed(args, kwargs, training=False)
        share = weights[self._group.position] / sum(weights)
        model = self._recipe.model
        modes = {module: module.training for module in model.modules()}
        model.eval()
        loss = torch.zeros((), dtype=torch.float64, device=self._device)
        with torch.no_grad():
            if share > 0:
                loss = self._loss(example).double() * share
        for module, was in modes.items():
            module.training = was
        return self._sum(loss).to(self._dtype())

    def _outputs(self, *args: Any, **kwargs: Any) -> Any:
        return self._recipe.model(*args, **kwargs)

    @property
    def _group(self) -> Group:
        return self._places[0].groups[0]

    def _weighed(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool
    ) -> tuple[Arguments, list[float]]:
        """The arguments on the device, and the weight of every position of the level."""
        example = normal(args, kwargs)
        leaves, dims, _ = self._agree(example, (training, "loss"))
        example = pytree.tree_unflatten(leaves, pytree.tree_structure(example))
        rows = rows_of(leaves, dims)
        weight = float(rows if self._weight is None else self._weight(*example[0], **example[1])) if rows else 0.0
        own = torch.zeros(self._group.size, dtype=torch.float64, device=self._device)
        own[self._group.position] = weight
        weights: list[float] = self._sum(own).tolist()
        if not sum(weights) > 0:
            raise WhaleError("loss_weight is zero on every rank", fix="return the number of rows or targets that count")
        return example, weights

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

    def _average_buffers(self, kept: _Kept, weights: Sequence[float]) -> None:
        """Buffers that the step wrote, on whichever rank: averaged by weight, whole numbers from the first that ran."""
        if not kept.buffers:
            return
        position = self._group.position
        first = next(k for k, weight in enumerate(weights) if weight > 0)
        own = torch.tensor(kept.written(self._recipe.model), dtype=torch.int64, device=self._device)
        values = kept.put_back(self._recipe.model)
        for buffer, value, written in zip(kept.buffers.values(), values, self._sum(own).tolist(), strict=True):
            if not written:
                continue
            if buffer.dtype.is_floating_point or buffer.dtype.is_complex:
                part = value * (weights[position] / sum(weights)) if weights[position] > 0 else torch.zeros_like(value)
            else:
                part = value.long() if position == first else torch.zeros_like(value, dtype=torch.int64)
            with torch.no_grad():
                buffer.copy_(self._sum(part.contiguous()))


@dataclass(frozen=True)
class _Kept:
    """The buffers of a model before a step: a forward may write them, or put others in their place."""

    buffers: Mapping[str, torch.Tensor]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, model: nn.Module) -> _Kept:
        buffers = dict(model.named_buffers())
        return cls(buffers, tuple(buffer._version for buffer in buffers.values()))

    def written(self, model: nn.Module) -> list[bool]:
        """Per buffer: the model has written or replaced it since."""
        pairs = zip(self.buffers.items(), self.versions, strict=True)
        return [model.get_buffer(name) is not old or old._version != version for (name, old), version in pairs]

    def put_back(self, model: nn.Module) -> list[torch.Tensor]:
        """The values as the step left them; the model has its own tensors again."""
        values = [model.get_buffer(name).detach() for name in self.buffers]
        for name, old in self.buffers.items():
            path, _, last = name.rpartition(".")
            model.get_submodule(path)._buffers[last] = old
        return values


def _check_values(model: nn.Module) -> None:
    """WhaleError: a value is on the meta device."""
    state = (*model.named_parameters(), *model.named_buffers())
    missing = [name for name, value in state if value.device.type == "meta"]
    if missing:
        raise WhaleError(
            f"capture=False needs the values of the model: {missing[0]} is on the meta device ({len(missing)} in all)",
            fix="build the model on the cpu, or call model.to_empty(device='cpu') and initialise it",
        )
