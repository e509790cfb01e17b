"""The compiled model as a user sees it: rows, whole values, norms, plan; what runs a step is in its two kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils import _pytree as pytree

from whalepy.errors import BatchError, WhaleError
from whalepy.planner.plan import Plan
from whalepy.runtime.agreement import Told, agree, gather_objects
from whalepy.runtime.arguments import (
    Arguments,
    Shape,
    as_arguments,
    constants_of,
    global_shapes,
    leaf_names,
    leaf_shapes,
    missing_rows,
    structure_of,
)
from whalepy.runtime.build import Recipe
from whalepy.runtime.extents import Grid
from whalepy.runtime.groups import Group, make_groups
from whalepy.runtime.initialise import initial_values
from whalepy.runtime.norms import Placement, gradient_norm
from whalepy.runtime.rows import RowSampler, local_rows
from whalepy.runtime.storage import Stored, broadcast


class _Holder(nn.Module):
    """A node of the local model's module tree: parameters and buffers under their own names."""


def _raise_different(given: Sequence[dict[str, str]]) -> NoReturn:
    """Names the first input that ranks were not given alike: there or not, dtype, or constant."""
    for rank, own in enumerate(given):
        for name in {**given[0], **own}:
            here, first = own.get(name, "nothing"), given[0].get(name, "nothing")
            if here != first:
                raise BatchError(
                    f"{name} is {here} on rank {rank} and {first} on rank 0",
                    fix="give every rank the same inputs, each with its own rows",
                )
    raise BatchError("ranks call different steps", fix="call train_step, eval_step and the model alike on every rank")


class ParallelModel(nn.Module, ABC):
    """The distributed program of one rank; an `nn.Module` with the local model's parameter names."""

    def __init__(self, recipe: Recipe, device: torch.device, host: Group) -> None:
        super().__init__()
        self._recipe = recipe
        self._device = device
        self._host = host
        self._plan: Plan | None = None
        self._step = 0
        self._batch_dims: dict[str, int | None] = {}
        self._ties: dict[str, str] = {}
        self._stored: dict[str, Stored] = {}
        self._unknown: set[str] = set()

    @abstractmethod
    def start(self, example: Arguments) -> None:
        """Plan for inputs like these, open the plan's groups and cut the parameters. Collective; once."""

    @abstractmethod
    def train_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss that the local model would return for the global batch, on every rank; adds to `.grad`.

        `args` and `kwargs` are this rank's rows, as `local_batch` gives them. Raises BatchError on all ranks alike.
        """

    @abstractmethod
    def eval_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss in evaluation mode for the global batch, on every rank; changes nothing."""

    @abstractmethod
    def _outputs(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for this rank's rows."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output for this rank's rows, under no_grad."""
        if torch.is_grad_enabled():
            raise WhaleError(
                "parallel(...) with gradients is not there yet",
                fix="call parallel.train_step(...) to train, or wrap the call in torch.no_grad()",
            )
        return self._outputs(*args, **kwargs)

    @property
    def plan(self) -> Plan:
        """The plan that all ranks run."""
        return self._started()

    def _started(self) -> Plan:
        if self._plan is None:
            raise WhaleError(
                "the model is not captured yet: compile was given no example_inputs",
                fix="give compile example_inputs=, or call parallel.local_batch(global_batch) first",
            )
        return self._plan

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The local model's names; one parameter per stored box, ties once."""
        self._started()
        return super().named_parameters(*args, **kwargs)

    def _take_place(self, plan: Plan) -> None:
        """Open the plan's groups, in one order on every rank."""
        self._plan = plan
        coordinates = plan.coordinates_of(self._host.position)
        groups = make_groups(plan.mesh, plan.rank_of, self._host.position, self._device)
        self._placement = Placement(self._device, self._host, groups, coordinates)
        self._grid = Grid(plan.mesh, plan.cuts, plan.row_cuts)

    # -- values

    def _store_parameters(self) -> None:
        """Cut every value of the local model to this rank's box, one at a time; rank 0's values win."""
        trainable = {name: p.requires_grad for name, p in self._recipe.model.named_parameters()}
        for name, own, known in initial_values(self._recipe.model, self._device):
            whole = broadcast(self._host, own)
            entry = self._stored.get(name)
            box = (whole if entry is None else entry.box(whole)).clone()
            if not known:
                self._unknown.add(name)
            self._attach(name, nn.Parameter(box, trainable[name]) if name in trainable else box)

    def _attach(self, name: str, value: torch.Tensor) -> None:
        """Keep a value under its name in the local model, also where a method of this class has the same name."""
        *path, last = name.split(".")
        holder: nn.Module = self
        for part in path:
            child = holder._modules.setdefault(part, _Holder())
            assert child is not None
            holder = child
        if isinstance(value, nn.Parameter):
            holder._parameters[last] = value
        else:
            holder._buffers[last] = value

    # -- arguments of a step

    def _agree(self, example: Arguments, key: tuple[Any, ...]) -> tuple[list[Any], tuple[int | None, ...], list[Shape]]:
        """Leaves on the device, their batch dims, and the shapes of the whole step that all ranks agreed on."""
        self._started()
        if self._unknown:
            raise WhaleError(
                f"nothing initialised {', '.join(sorted(self._unknown))}: the model is on the meta device",
                fix="give its modules reset_parameters(), or call parallel.load_full_state_dict(...) first",
            )
        leaves = pytree.tree_leaves(example)
        names = leaf_names(example)
        dims = tuple(self._row_dim(name, leaf) for name, leaf in zip(names, leaves, strict=True))
        structure = structure_of((*key, pytree.tree_structure(example), constants_of(leaves)))
        told = Told(self._step, structure, tuple(leaf_shapes(example)), missing_rows(names, leaves, dims))
        everyone = agree(self._host, told)
        if len({other.structure for other in everyone}) > 1:
            _raise_different(gather_objects(self._host, dict(zip(names, constants_of(leaves), strict=True))))
        shapes = global_shapes(everyone, dims, self.plan, names)
        return [v.to(self._device) if isinstance(v, torch.Tensor) else v for v in leaves], dims, shapes

    def _row_dim(self, name: str, leaf: Any) -> int | None:
        """The batch dim of an input: as at capture, or for one not seen there by `batch_dim`."""
        if name in self._batch_dims or not isinstance(leaf, torch.Tensor):
            return self._batch_dims.get(name)
        dim = self._recipe.batch_dim if isinstance(self._recipe.batch_dim, int) else None
        return dim if dim is not None and leaf.ndim > dim else None

    # -- rows

    def local_batch(self, global_batch: Any) -> Any:
        """This rank's rows of a global batch: a tuple, dict or tensor; the same structure and keys on every rank."""
        args, kwargs = as_arguments(global_batch)
        if self._plan is None:
            self.start((args, kwargs))
        names = leaf_names((args, kwargs))
        leaves = pytree.tree_leaves((args, kwargs))
        dims = tuple(self._row_dim(name, leaf) for name, leaf in zip(names, leaves, strict=True))
        args, kwargs = local_rows((args, kwargs), dims, self._grid, self._placement.coordinates)
        if isinstance(global_batch, dict):
            return {name: kwargs[name] for name in global_batch}
        return args if isinstance(global_batch, tuple) else (list(args) if isinstance(global_batch, list) else args[0])

    def sampler(
        self, dataset: Sized, *, batch_size: int | None = None, shuffle: bool = False, seed: int = 0
    ) -> RowSampler:
        """A batch sampler of this rank's rows; `batch_size` is global and defaults to the example's."""
        size = self._started().rows if batch_size is None else batch_size
        return RowSampler(dataset, self._grid, self._placement.coordinates, size, shuffle, seed)

    # -- whole values

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The local model's state: exactly its keys, whole values. Collective."""
        return self._full(self._recipe.model.state_dict(keep_vars=True), gradients=False)

    def full_gradients(self) -> dict[str, torch.Tensor | None]:
        """The local model's gradients by name, whole; None where the local model's is. Collective."""
        parameters = dict(self.named_parameters())
        return {name: None if p.grad is None else self._whole_value(name, p.grad) for name, p in parameters.items()}

    def _full(self, keys: Mapping[str, torch.Tensor], *, gradients: bool) -> dict[str, torch.Tensor]:
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        first = self._ties
        return {key: self._whole_value(first.get(key, key), own[first.get(key, key)].detach()) for key in keys}

    def _whole_value(self, name: str, box: torch.Tensor) -> torch.Tensor:
        entry = self._stored.get(name)
        return box.detach().clone() if entry is None else entry.whole(box.detach()).clone()

    def load_full_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over a local model's state; rank 0's values win. Collective. Raises WhaleError for other keys."""
        expected = set(self._recipe.model.state_dict(keep_vars=True))
        if set(state) != expected:
            missing, extra = sorted(expected - set(state)), sorted(set(state) - expected)
            raise WhaleError(f"the state does not fit the model: missing {missing}, unexpected {extra}")
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        with torch.no_grad():
            for key in sorted(expected - set(self._ties)):  # one order on all ranks: each key is a broadcast
                whole = broadcast(self._placement.host, state[key].to(self._placement.device, own[key].dtype))
                entry = self._stored.get(key)
                own[key].copy_(whole if entry is None else entry.box(whole))
        self._unknown -= expected

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """The norm of the whole gradient before clipping it to `max_norm`; the same bits on every rank. Collective."""
        total = gradient_norm(dict(self.named_parameters()), self._stored, self._placement, norm_type)
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))
        return total

    # -- looking inside

    def program(self, rank: int) -> Any:
        """The program that `rank` runs; `str` of it shows every operator, bridge and layout."""
        return self.plan.program(rank)

    def explain(self) -> str:
        """What runs replicated for want of a rule, and why this plan."""
        return self.plan.explain()
