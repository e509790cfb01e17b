"""The modules of a forecast as a tree, to be folded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from whalepy.planner.forecast import ModulePart


@dataclass
class Branch:
    """A module and those inside it. One that the forecast does not list has no part, and the sum of those inside."""

    name: str
    part: ModulePart | None = None
    inside: dict[str, Branch] = field(default_factory=dict[str, "Branch"])

    @property
    def parameters(self) -> int:
        """With those inside."""
        return self.part.parameters if self.part else sum(branch.parameters for branch in self.inside.values())

    @property
    def flops(self) -> float:
        """With those inside, of one forward over the global batch."""
        return self.part.flops if self.part else sum(branch.flops for branch in self.inside.values())

    @property
    def repeats(self) -> int:
        """How many modules of the same form it stands for."""
        return self.part.repeats if self.part else 1

    @property
    def is_cut(self) -> bool:
        """Whether it, or a module inside it, is cut along an axis."""
        return bool(self.part and self.part.split) or any(branch.is_cut for branch in self.inside.values())


def tree(parts: Sequence[ModulePart], root: str, *, most: int = 1000) -> Branch:
    """The tree of the first `most` modules; the whole model, whose path is "", is named `root`."""
    top = Branch(root)
    for part in parts[:most]:
        at = top
        for name in part.path.split(".") if part.path else ():
            at = at.inside.setdefault(name, Branch(name))
        at.part = part
    return top
