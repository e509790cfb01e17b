"""Where a cluster scope puts its virtual devices: the forms a user may write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, cast

from whalepy.errors import AnnotationError
from whalepy.primitives.arguments import is_whole

Way = Literal["auto", "all", "average", "row", "type", "node", "ranks"]
RankLists = tuple[tuple[int, ...], ...]

_FORMS = (
    'write "auto", "all", {"average": 2}, {"row": 2}, {"type": "V100-SXM2-32GB"}, {"node": 0}, '
    "or one list of ranks per virtual device like [[0, 1], [2, 3]]"
)
_LEAST = {"average": 1, "row": 1, "node": 0}  # smallest integer each selection takes; "type" takes a name


@dataclass(frozen=True)
class Placement:
    """`how` says which form was written; `value` is its number, its name, its rank lists, or None for auto and all."""

    how: Way
    value: int | str | RankLists | None = None

    def __str__(self) -> str:
        """What the user wrote inside `cluster(...)`."""
        if self.value is None:
            return repr(self.how)
        if isinstance(self.value, tuple):
            return repr([list(ranks) for ranks in self.value])
        return repr({self.how: self.value})


def parse_placement(written: object, at: str) -> Placement:
    """The placement a user wrote. Raises AnnotationError naming the value and the forms there are."""
    if isinstance(written, Placement):
        return written
    if written == "auto" or written == "all":
        return Placement(cast(Way, written))
    if isinstance(written, Mapping):
        return _selection(cast(Mapping[object, object], written), at)
    if isinstance(written, (list, tuple)):
        return Placement("ranks", _rank_lists(cast(Iterable[object], written), at))
    raise _error(written, "this is no placement", at)


def _selection(written: Mapping[object, object], at: str) -> Placement:
    if len(written) != 1:
        raise _error(dict(written), f"a selection has one key, this has {len(written)}", at)
    ((how, value),) = written.items()
    if how == "type" and isinstance(value, str) and value:
        return Placement("type", value)
    if how == "type":
        raise _error(dict(written), "the type is the name of a device type", at)
    if not isinstance(how, str) or how not in _LEAST:
        raise _error(dict(written), f"{how!r} is no selection", at)
    if not is_whole(value) or value < _LEAST[how]:
        raise _error(dict(written), f"{how} takes a whole number of at least {_LEAST[how]}", at)
    return Placement(cast(Way, how), int(value))


def _rank_lists(written: Iterable[object], at: str) -> RankLists:
    lists = list(written)
    if not lists or not all(isinstance(ranks, (list, tuple)) and ranks for ranks in lists):
        raise _error(written, "every virtual device is a list of at least one rank", at)
    rows = [tuple(cast(Iterable[int], ranks)) for ranks in lists]
    ranks = [rank for row in rows for rank in row]
    bad = [rank for rank in ranks if not is_whole(rank) or rank < 0]
    if bad:
        raise _error(written, f"{bad[0]!r} is no rank", at)
    twice = sorted({rank for rank in ranks if ranks.count(rank) > 1})
    if twice:
        raise _error(written, f"rank {twice[0]} stands in it twice", at)
    return tuple(tuple(map(int, row)) for row in rows)


def _error(written: object, why: str, at: str) -> AnnotationError:
    return AnnotationError(f"cluster({written!r}): {why}", at=at, fix=_FORMS)
