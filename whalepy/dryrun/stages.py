"""Stages for a model without annotations: what is put on its modules, and the degrees around and inside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from whalepy.dryrun.tried import Options
from whalepy.errors import PlanError
from whalepy.planner.form import Width
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
        chains = [chain for path, chain in self.scopes.items() if path]
        for kind in ("replicate", "split"):
            inside = dict.fromkeys(p for chain in chains for p in chain if p.kind == kind)
            known |= {p: f"{kind}_{k}" for k, p in enumerate(inside)}
            lines += [f"{known[p]} = whalepy.{p!r}" for p in inside]
        lines.append("whalepy.annotate(model, {")
        for path, chain in self.scopes.items():
            named = [known.get(p, f"whalepy.{p!r}") for p in chain]
            lines.append(f'    "{path}": {named[0] if len(named) == 1 else "[" + ", ".join(named) + "]"},')
        return "\n".join([*lines, "})"])


def check_degrees(options: Options, devices: int) -> None:
    """PlanError: the devices are too few for the degrees around and inside the stages, or shares are not one each.

    Without a forced degree of replicate it is the most that the devices allow.
    """
    count = options.stages or 1
    kind = parse_kind(options.schedule or DEFAULT)
    chunks = kind.chunks or 1
    if count % chunks:
        raise PlanError(
            f"--schedule {kind} wants a multiple of {chunks} stages, not {count}",
            fix=f"choose --stages {max(count // chunks, 1) * chunks}",
        )
    if options.widths is not None:
        _check_widths(options.widths, devices)
        return
    inner = count // chunks * (options.split or 1)
    copies = options.replicate or max(devices // inner, 1)
    if inner * copies > devices:
        asked = " x ".join(str(d) for d in (count // chunks, options.replicate, options.split) if d)
        raise PlanError(
            f"stages and degrees {asked} cannot be met on {devices} devices",
            fix="groups of stages, times replicate, times split are the devices that are used",
        )
    if options.shares not in (None, "equal") and len(options.shares or ()) != copies:
        raise PlanError(
            f"{len(options.shares or ())} shares for {copies} replicas", fix="give one weight per replica, such as 3:1"
        )


def _check_widths(widths: Sequence[Width], devices: int) -> None:
    used = sum(width.devices for width in widths)
    if used > devices:
        raise PlanError(
            f"--widths {','.join(map(str, widths))} needs {used} devices, {devices} are there",
            fix="give fewer or narrower stages",
        )
