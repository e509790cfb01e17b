"""The compiled model as a user sees it: rows, whole values, norms, plan; what runs a step is in its two kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, NoReturn

import torch
import torch.distributed as dist
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
from whalepy.runtime.extents import Grid, grid_of
from whalepy.runtime.groups import Group, host_group, make_groups
from whalepy.runtime.initialise import initial_values
from whalepy.runtime.norms import Placement, gradient_norm
from whalepy.runtime.rows import RowSampler, local_rows, one_row, without_row
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
        self._holders: dict[str, tuple[nn.Module, str]] = {}
        """Which module has each parameter, and its name there."""
        self._grids: list[Grid] = []
        """Per stage."""
        self._places: dict[int, Placement] = {}
        """Per stage of this rank."""
        self._owners: dict[str, int] = {}
        """The stage that keeps each parameter, and each buffer that is written; without it, every stage does."""

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

    def _own_parameters(self) -> dict[str, nn.Parameter]:
        """Those of `named_parameters`, without a walk through all modules."""
        found = {name: holder._parameters[last] for name, (holder, last) in self._holders.items()}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def _take_place(self, plan: Plan) -> None:
        """Open the plan's groups, in one order on every rank."""
        self._plan = plan
        rank = self._host.position
        opened: dict[Any, tuple[tuple[Group, ...], Group | None]] = {}
        for k, stage in enumerate(plan.stages):
            self._grids.append(grid_of(plan, stage))
            if (stage.mesh, stage.rank_of) not in opened:
                groups = make_groups(stage.mesh, stage.rank_of, rank, self._device)
                opened[stage.mesh, stage.rank_of] = groups, host_group(stage.rank_of, self._host)
            groups, host = opened[stage.mesh, stage.rank_of]
            if host is not None:
                self._places[k] = Placement(self._device, host, groups, stage.coordinates_of(rank))

    # -- values

    def _store_parameters(self) -> None:
        """Cut every value of the local model to this rank's box, one at a time; rank 0's values win."""
        trainable = {name: p.requires_grad for name, p in self._recipe.model.named_parameters()}
        for name, own, known in initial_values(self._recipe.model, self._device):
            whole = broadcast(self._host, own)
            if not known:
                self._unknown.add(name)
            if name in trainable and not self._keeps(name):
                continue
            entry = self._stored.get(name)
            box = (whole if entry is None else entry.box(whole)).clone()
            self._attach(name, nn.Parameter(box, trainable[name]) if name in trainable else box)
        if trainable and not any(map(self._keeps, trainable)):  # optimizers refuse an empty list
            name, value = next(iter(self._recipe.model.named_parameters()))
            nothing = value.new_empty((0,) * value.ndim, device=self._device)
            self._attach(name, nn.Parameter(nothing, value.requires_grad))

    def _keeps(self, name: str) -> bool:
        """Whether this rank keeps a part of a value."""
        return name not in self._owners or self._owners[name] in self._places

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
            self._holders[name] = holder, last
        else:
            holder._buffers[last] = value

    # -- arguments of a step

    def _agree(
        self, example: Arguments, key: tuple[Any, ...], agree: Callable[[Group, Told], list[Told]] = agree
    ) -> tuple[list[Any], tuple[int | None, ...], list[Shape]]:
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
        if not self._has_share:
            leaves = without_row(leaves, dims)
        skips = not leaves and self._may_skip_inputs()
        structure = 0 if skips else structure_of((*key, pytree.tree_structure(example), constants_of(leaves)))
        told = Told(self._step, structure, tuple(leaf_shapes(leaves)), missing_rows(names, leaves, dims))
        everyone = agree(self._host, told)
        if len({other.structure for other in everyone} - {0}) != 1 or self._skipped_wrongly(everyone, key):
            _raise_different(gather_objects(self._host, dict(zip(names, constants_of(leaves), strict=True))))
        if skips:
            names, dims = tuple(self._batch_dims), tuple(self._batch_dims.values())
        shapes = global_shapes(everyone, dims, self._grids, self.plan, names)
        return [v.to(self._device) if isinstance(v, torch.Tensor) else v for v in leaves], dims, shapes

    def _may_skip_inputs(self) -> bool:
        """Whether this rank may be called without arguments."""
        return False

    def _skipped_wrongly(self, everyone: Sequence[Told], key: tuple[Any, ...]) -> bool:
        """Whether some rank was given no arguments although others have another structure than the example's."""
        return False

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
        args, kwargs = local_rows((args, kwargs), dims, self._row_pieces)
        if isinstance(global_batch, dict):
            return {name: kwargs[name] for name in global_batch}
        return args if isinstance(global_batch, tuple) else (list(args) if isinstance(global_batch, list) else args[0])

    def sampler(
        self, dataset: Sized, *, batch_size: int | None = None, shuffle: bool = False, seed: int = 0
    ) -> RowSampler:
        """A batch sampler of this rank's rows; `batch_size` is global and defaults to the example's.

        A DataLoader cannot collate nothing: a rank that never has rows gets one, which its steps leave out.
        Raises BatchError where any other rank would get no row of a batch.
        """
        size = self._started().rows if batch_size is None else batch_size
        pieces = self._row_pieces if self._has_share else one_row
        return RowSampler(dataset, self._grids, pieces, size, shuffle, seed)

    @property
    def _has_share(self) -> bool:
        """Whether this rank ever gets rows: not where it is idle, or its share is 0."""
        at = [(self._grids[k], place.coordinates) for k, place in self._places.items()]
        return any(grid.has_share(grid.row_coordinates(coordinates)) for grid, coordinates in at[:1])

    def _row_pieces(self, total: int) -> list[tuple[int, int]]:
        """This rank's rows of a global batch: (first, how many) per microbatch; none on an idle rank."""
        for k, place in self._places.items():
            return self._grids[k].row_pieces(total, place.coordinates)
        return [(0, 0)]

    # -- whole values

    def full_state_dict(self) -> dict[str, torch.Tensor]:
        """The local model's state: exactly its keys, whole values. Collective."""
        self._started()
        return self._full(self._recipe.model.state_dict(keep_vars=True))

    def full_gradients(self) -> dict[str, torch.Tensor | None]:
        """The local model's gradients by name, whole; None where the local model's is. Collective."""
        self._started()
        gradients = {name: p.grad for name, p in self.named_parameters() if self._keeps(name)}
        there = {name for name, gradient in gradients.items() if gradient is not None}
        anywhere = there if self._is_everywhere else set[str]().union(*gather_objects(self._host, there))
        return {
            name: self._whole_value(name, value, gradients.get(name)) if name in anywhere else None
            for name, value in self._recipe.model.named_parameters()
        }

    def _full(self, keys: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        first = self._ties
        return {
            key: self._whole_value(first.get(key, key), value, own.get(first.get(key, key)))
            for key, value in keys.items()
        }

    @property
    def _is_everywhere(self) -> bool:
        """Whether every rank keeps a part of every value."""
        one_stage = len(self.plan.stages) == 1 and len(self.plan.ranks) == self._host.size
        return one_stage or self._host.size == 1

    def _whole_value(self, name: str, like: torch.Tensor, box: torch.Tensor | None) -> torch.Tensor:
        """A value whole, on every rank, from the boxes of those that keep it. Collective."""
        entry = self._stored.get(name)
        mine = box is not None and self._keeps(name)
        whole = torch.empty(like.shape, dtype=like.dtype, device=self._device)
        if mine and box is not None:
            whole = box.detach().clone() if entry is None else entry.whole(box.detach()).clone()
        if self._is_everywhere or (name not in self._owners and len(self.plan.ranks) == self._host.size):
            return whole
        source = self.plan.stages[self._owners.get(name, 0)].rank_of[0]
        whole = whole.contiguous()
        dist.broadcast(whole, src=source)
        return whole

    def load_full_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over a local model's state; rank 0's values win. Collective. Raises WhaleError for other keys."""
        values = self._recipe.model.state_dict(keep_vars=True)
        expected = set(values)
        if set(state) != expected:
            missing, extra = sorted(expected - set(state)), sorted(set(state) - expected)
            raise WhaleError(f"the state does not fit the model: missing {missing}, unexpected {extra}")
        own = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        with torch.no_grad():
            for key in sorted(expected - set(self._ties)):  # one order on all ranks: each key is a broadcast
                whole = broadcast(self._host, state[key].to(self._device, values[key].dtype))
                if self._keeps(key):
                    entry = self._stored.get(key)
                    own[key].copy_(whole if entry is None else entry.box(whole))
        self._unknown -= expected

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
        """The norm of the whole gradient before clipping it to `max_norm`; the same bits on every rank. Collective."""
        total = gradient_norm(dict(self.named_parameters()), self._stored, self._place_of, self._host, norm_type).to(
            self._device
        )
        factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))
        return total

    def _place_of(self, name: str) -> Placement:
        """Where this rank stands in the stage that keeps a parameter."""
        return self._places[self._owners.get(name, 0)]

    # -- looking inside

    def program(self, rank: int) -> Any:
        """The program that `rank` runs; `str` of it shows every operator, bridge and layout."""
        return self.plan.program(rank)

    def explain(self) -> str:
        """What runs replicated for want of a rule, and why this plan."""
        return self.plan.explain()
