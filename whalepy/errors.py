"""Every error whalepy raises on purpose: what is wrong, where in the user's code, and how to fix it."""

from __future__ import annotations


class WhaleError(Exception):
    """What is wrong, then where (`at`, file:line in the user's code), then what to change (`fix`)."""

    def __init__(self, what: str, *, at: str | None = None, fix: str | None = None) -> None:
        self.what = what
        self.at = at
        self.fix = fix
        lines = [what]
        if at:
            lines.append(f"  at:  {at}")
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.at, self.fix)


def _rebuild(kind: type[WhaleError], what: str, at: str | None, fix: str | None) -> WhaleError:
    return kind(what, at=at, fix=fix)


class AnnotationError(WhaleError):
    """The primitives are nested, placed or parametrised in a way that has no meaning."""


class ClusterError(WhaleError):
    """The description of the hardware is wrong, or does not match the ranks that started."""


class CaptureError(WhaleError):
    """The model cannot be captured as one graph."""


class PlanError(WhaleError):
    """No legal plan, or a plan that does not belong to this model or cluster."""


class VerificationError(WhaleError):
    """The programs of all ranks together would not run: unpaired, misordered or mismatched communication."""


class BatchError(WhaleError):
    """The rows or shapes given to a step are not what the plan expects; every rank raises the same."""
