"""Stages for a model without annotations: what is put on its modules, and the degrees around and inside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whalepy.dryrun.tried import Options
from whalepy.errors import PlanError
from whalepy.planner.schedule.kinds import DEFAULT, parse_kind
from whalepy.primitives import Primitive


@dataclass(frozen=True)
class Staging:
    """What is put on the modules of a model so that it runs in stages."""

    scopes: Mapping[str, Sequence[Primitive]]
    name: str
    """`replicate 2 > 2 stages`."""
    flags: str

    @property
    def text(self) -> str:
        """Python that does the same."""
        lines: list[str] = []
        known: dict[Primitive, str] = {}
        for chain in self.scopes.values():
            for primitive in chain:
                if primitive not in known and primitive.kind == "stage":
                    known[primitive] = f"stage_{len(known)}"
        lines += [f"{name} = whalepy.stage()" for name in known.values()]
        splits = dict.fromkeys(p for chain in self.scopes.values() for p in chain if p.kind == "split")
        known |= {p: f"split_{k}" for k, p in enumerate(splits)}
        lines += [f"{known[p]} = whalepy.{p!r}" for p in splits]
        lines.append("whalepy.annotate(model, {")
        for path, chain in self.scopes.items():
            named = [known.get(p, f"whalepy.{p!r}") for p in chain]
            lines.append(f'    "{path}": {named[0] if len(named) == 1 else "[" + ", ".join(named) + "]"},')
        return "\n".join([*lines, "})"])


@dataclass(frozen=True)
class Degrees:
    """How the devices are shared out."""

    replicate: int
    split: int
    chunks: int
    """Stages per group of devices."""


def degrees_of(options: Options, devices: int) -> Degrees:
    """The degrees around and inside the stages; what is forced stays.

    Without a forced degree of replicate it is what the devices allow: 1 where they leave a remainder. Raises PlanError
    where the devices are too few.
    """
    count = options.stages or 1
    kind = parse_kind(options.schedule or DEFAULT)
    chunks = kind.chunks or 1
    if count % chunks:
        raise PlanError(
            f"--schedule {kind} wants a multiple of {chunks} stages, not {count}",
            fix=f"choose --stages {max(count // chunks, 1) * chunks}",
        )
    inner = count // chunks * (options.split or 1)
    copies = options.replicate or (devices // inner if devices % inner == 0 else 1)
    needed = inner * copies
    if needed > devices:
        asked = " x ".join(str(d) for d in (count // chunks, options.replicate, options.split) if d)
        raise PlanError(
            f"stages and degrees {asked} cannot be met on {devices} devices",
            fix="groups of stages, times replicate, times split are the devices that are used",
        )
    if options.shares not in (None, "equal") and len(options.shares or ()) != copies:
        raise PlanError(
            f"{len(options.shares or ())} shares for {copies} replicas", fix="give one weight per replica, such as 3:1"
        )
    return Degrees(copies, options.split or 1, chunks)
