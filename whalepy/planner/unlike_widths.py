"""Stages of unlike widths: each on like devices, so many for parts of its rows, so many for each of those to be split.

Before:  6 x A100, 4 x T4        as many stages on copies of one chain: 2 x (A100, A100, A100, T4, T4)
After:   A100 x 6 | T4 x 4       two stages, of which the first has its rows in six parts and the second in four

Source: PipeDream (Narayanan et al., SOSP 2019, section 3.1) gives each stage replicas of its own.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from whalepy.planner.block_table import Way
from whalepy.planner.form import Form, Groups, Limits, Width
from whalepy.planner.loads import LoadTable, Numbers, Whole
from whalepy.planner.stage_cost import StageCosts
from whalepy.planner.units import Unit, orders_of

Chain = tuple[Width, ...]
"""The widths of stages that follow one another, on devices of one kind."""


@dataclass(frozen=True)
class Unlike:
    """Kinds of device in the order of the stages, and the widths of those on each."""

    bound_s: float
    microbatches: int
    kinds: tuple[int, ...]
    chains: tuple[Chain, ...]
    """Per kind."""

    @property
    def widths(self) -> Chain:
        """Of each group of devices."""
        return tuple(itertools.chain.from_iterable(self.chains))


class UnlikeWidths:
    """What there is to look at of such stages, for one model on one cluster."""

    def __init__(self, costs: StageCosts, limits: Limits, loads: LoadTable) -> None:
        self.costs, self.limits, self.table, self._loads = costs, limits, costs.table, loads
        self._counts = np.array(limits.counts(self.table.rows, 1), dtype=np.int64)
        self._chains: dict[int, list[Chain]] = {}
        self._known_rooms: dict[tuple[int, Width, int, int, str], Whole] = {}
        self._forms: dict[tuple[tuple[int, ...], tuple[Chain, ...], int, str], Form | None] = {}

    def leads(self, zero: int, recompute: str, limit: float) -> Iterator[Unlike]:
        """In the order of seconds that hardly any cut of them beats, below a limit."""
        if not len(self._counts):
            return
        found: list[_Bounded] = []
        if self.limits.widths is not None:
            for kinds in self._chosen(itertools.permutations):
                for chains in itertools.islice(self._cut(self.limits.widths, kinds), _MOST_TRIED):
                    found += self._bounded(kinds, [[chain] for chain in chains], zero, recompute, limit)
        elif self.is_free:
            for kinds in self._chosen(itertools.combinations):
                found += self._bounded(kinds, self._all_chains(kinds), zero, recompute, limit)
        for bound, count, kinds, chains in sorted(found):
            at = dict(zip(kinds, chains, strict=True))
            for order in (kinds,) if self.limits.widths is not None else orders_of(self.costs.kinds, kinds):
                unlike = Unlike(bound, count, order, tuple(at[kind] for kind in order))
                if self._has_room(unlike, zero, recompute):
                    yield unlike

    @property
    def is_free(self) -> bool:
        """Whether nothing that was forced says how wide stages are."""
        limits = self.limits
        return limits.unlike and limits.replicate is limits.split is limits.shares is None and not limits.equal

    def form_of(self, unlike: Unlike, zero: int, recompute: str) -> Form | None:
        """The stages on units of devices; None where a node has too few left."""
        key = unlike.kinds, unlike.chains, zero, recompute
        if key not in self._forms:
            made = [self._taken(kind, chain) for kind, chain in zip(unlike.kinds, unlike.chains, strict=True)]
            groups = tuple(group for own in made for group in own or ())
            stages = len(groups) * self.limits.chunks
            self._forms[key] = None if None in made else Form(recompute, zero, stages, groups, 1, self.costs)
        return self._forms[key]

    def _taken(self, kind: int, chain: Chain) -> Groups | None:
        if len({width.split for width in chain}) == 1:
            own = self.costs.units(chain[0].split)[kind]
            units = iter(own)
            few = len(own) < sum(width.replicate for width in chain)
            return None if few else tuple(tuple(itertools.islice(units, width.replicate)) for width in chain)
        left: dict[int, list[int]] = defaultdict(list)
        for unit in self.costs.units(1)[kind]:
            left[unit.node] += unit.devices
        groups: list[tuple[Unit, ...]] = []
        for width in chain:
            group: list[Unit] = []
            for _ in range(width.replicate):
                node = next((node for node, own in left.items() if len(own) >= width.split), None)
                if node is None:
                    return None
                group.append(Unit(kind, node, tuple(left[node][: width.split])))
                del left[node][: width.split]
            groups.append(tuple(group))
        return tuple(groups)

    # -- what there is

    def _chosen(self, some: Callable[[list[int], int], Iterable[tuple[int, ...]]]) -> Iterator[tuple[int, ...]]:
        """Kinds of device that may have stages; of many kinds none are left out."""
        there = [kind for kind, units in enumerate(self.costs.units(1)) if units]
        if len(there) > _MOST_KINDS:
            yield from orders_of(self.costs.kinds, there) if self.limits.widths is not None else ()
            return
        for size in range(1, len(there) + 1):
            yield from some(there, size)

    def _all_chains(self, kinds: Sequence[int]) -> list[list[Chain]]:
        """Per kind, the chains that use its devices; stages of one kind alone are unlike each other."""
        most = round(_MOST_TRIED ** (1 / len(kinds)))
        found = [self._chains_of(kind)[:most] for kind in kinds]
        return [[chain for chain in found[0] if len(set(chain)) > 1]] if len(kinds) == 1 else found

    def _chains_of(self, kind: int) -> list[Chain]:
        """Chains on the devices of one kind, those of few stages first."""
        if kind not in self._chains:
            number = len(self.costs.units(1)[kind])
            splits = [split for split in self.table.splits if self.costs.units(split)[kind]]
            every = number <= _FEW
            found = _every_chain(number, splits) if every else self._even_chains(kind, splits)
            blocks = len(self.table.order) // self.limits.chunks
            self._chains[kind] = sorted(
                {chain for chain in found if len(chain) <= blocks}, key=lambda chain: (len(chain), chain)
            )
        return self._chains[kind]

    def _even_chains(self, kind: int, splits: Sequence[int]) -> Iterator[Chain]:
        """Chains of like widths, which leave few of the devices idle."""
        number = len(self.costs.units(1)[kind])
        for split in splits:
            units = len(self.costs.units(split)[kind])
            degrees = {1 << k for k in range(units.bit_length())} | {units // stages for stages in range(1, _FEW)}
            for replicate in degrees - {0}:
                stages = units // replicate
                if stages * replicate * split >= number * (1 - _WASTED):
                    yield (Width(replicate, split),) * stages

    def _cut(self, widths: Chain, kinds: Sequence[int]) -> Iterator[tuple[Chain, ...]]:
        """Every way to cut widths into a chain for each kind of device that has enough of them."""
        first, *rest = kinds
        there = len(self.costs.units(1)[first])
        for size in range(1, len(widths) - len(rest) + 1):
            if sum(width.devices for width in widths[:size]) > there:
                return
            if not all(self.costs.units(width.split)[first] for width in widths[:size]):
                return
            if not rest and size == len(widths):
                yield (widths,)
            elif rest:
                yield from ((widths[:size], *others) for others in self._cut(widths[size:], rest))

    # -- bounds

    def _bounded(
        self, kinds: tuple[int, ...], chains: Sequence[Sequence[Chain]], zero: int, recompute: str, limit: float
    ) -> Iterator[_Bounded]:
        """Each choice of a chain per kind with each number of microbatches that may beat the limit, and may fit."""
        if not all(chains):
            return
        sums = [self._sums(kind, own, zero, recompute) for kind, own in zip(kinds, chains, strict=True)]
        pace, once, room, stages = sums[0]
        for other in sums[1:]:
            pace, room, stages = (
                _outer(np.add, a, b) for a, b in ((pace, other[0]), (room, other[2]), (stages, other[3]))
            )
            once = _outer(np.minimum, once, other[1])
        stages, blocks = stages * self.limits.chunks, len(self.table.order)
        turn = np.maximum(1 / np.maximum(pace, 1e-300), once / np.minimum(stages, self._counts))
        bound = once / self.limits.chunks + (self._counts - 1 / self.limits.chunks) * turn
        wanted = stages == self.limits.stages if self.limits.stages else (stages > 1) & (stages <= blocks)
        fits = (pace > 0) & (room * self.limits.chunks >= blocks) & (bound < limit) & wanted
        shape = [len(own) for own in chains]
        for choice, m in zip(*np.nonzero(fits), strict=True):
            at = np.unravel_index(int(choice), shape)
            chosen = tuple(own[int(k)] for own, k in zip(chains, at, strict=True))
            yield float(bound[choice, m]), int(self._counts[m]), kinds, chosen

    def _has_room(self, unlike: Unlike, zero: int, recompute: str) -> bool:
        """Whether the stages hold all blocks, with as many microbatches in flight as each has."""
        blocks, stages = 0, len(unlike.widths)
        left = stages
        for kind, chain in zip(unlike.kinds, unlike.chains, strict=True):
            for width, run in itertools.groupby(chain):
                count = len(list(run))
                held = self._held(kind, width, unlike.microbatches, zero, recompute)
                if self.limits.chunks == 1:
                    blocks += int(held[left] - held[left - count])
                else:
                    flying = min(2 * stages, unlike.microbatches)
                    blocks += count * self.limits.chunks * int(held[flying] - held[flying - 1])
                left -= count
        return blocks >= len(self.table.order)

    def _held(self, kind: int, width: Width, microbatches: int, zero: int, recompute: str) -> Whole:
        """Blocks that the last stages have room for, by their number, if all are on such devices."""
        key = kind, width, microbatches, zero, recompute
        if key not in self._known_rooms:
            way, rows = self._way(width, microbatches, recompute)
            room = self._loads.room(zero, width.replicate, way, kind, rows)
            flying = np.minimum(np.arange(len(room)), microbatches)
            self._known_rooms[key] = np.concatenate([[0], np.cumsum(room[flying][1:])])
        return self._known_rooms[key]

    def _way(self, width: Width, microbatches: int, recompute: str) -> tuple[Way, int]:
        rows = math.ceil(math.ceil(self.table.rows / microbatches) / width.replicate)
        return Way(width.split, recompute, adds=microbatches > 1), rows

    def _sums(self, kind: int, chains: Sequence[Chain], zero: int, recompute: str) -> tuple[Numbers, ...]:
        """Per chain and number of microbatches: parts of the model per second, seconds of one microbatch on the
        fastest stage, and blocks that there is room for, at most; the number of stages. No pace where ranks would be
        without rows."""
        widths = sorted({width for chain in chains for width in chain})
        at = {width: k for k, width in enumerate(widths)}
        own = np.array([[self._of_width(kind, w, int(m), zero, recompute) for m in self._counts] for w in widths])
        many = np.zeros((len(chains), len(widths)))
        for k, chain in enumerate(chains):
            for width in chain:
                many[k, at[width]] += 1
        there = many[:, :, None] > 0
        legal = np.where(there, own[None, :, :, 0] < math.inf, True).all(axis=1)
        pace = np.einsum("cw,wm->cm", many, 1 / own[:, :, 0])
        once = np.where(there, own[None, :, :, 0], math.inf).min(axis=1)
        room = np.einsum("cw,wm->cm", many, own[:, :, 1])
        stages = np.broadcast_to(many.sum(axis=1)[:, None], pace.shape)
        return np.where(legal, pace, -math.inf), np.where(legal, once, 0.0), room, stages

    def _of_width(self, kind: int, width: Width, microbatches: int, zero: int, recompute: str) -> tuple[float, float]:
        """Seconds of a microbatch through the whole model on one stage, and the blocks that this has room for."""
        if self.table.rows // microbatches < width.replicate or not self.costs.units(width.split)[kind]:
            return math.inf, 0.0
        way, rows = self._way(width, microbatches, recompute)
        room = self._loads.room(zero, width.replicate, way, kind, rows)
        return self._loads.whole_s(way, rows, kind)[1], float(room[1])


_Bounded = tuple[float, int, tuple[int, ...], tuple[Chain, ...]]
_MOST_KINDS = 4
_MOST_TRIED = 100_000
"""Choices of widths that are compared at once."""
_FEW = 8
"""Of up to so many devices of a kind, every chain is tried; of more, those of like widths within the kind."""
_WASTED = 0.1
"""Chains that leave more of the devices idle are not looked at."""


def _every_chain(number: int, splits: Sequence[int]) -> Iterator[Chain]:
    """Every chain that uses so many devices, or all but one."""
    known: dict[int, list[Chain]] = {0: [()]}
    for used in range(1, number + 1):
        wide = [Width(d // split, split) for d in range(1, used + 1) for split in splits if d % split == 0]
        known[used] = [(width, *rest) for width in wide for rest in known[used - width.devices]]
    return itertools.chain(known[number], known[number - 1] if number > 1 else [])


def _outer(combine: np.ufunc, one: Numbers, other: Numbers) -> Numbers:
    """Every pair combined."""
    return combine(one[:, None], other[None]).reshape(-1, one.shape[1])
