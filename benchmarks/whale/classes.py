"""Figures 13 to 16: ResNet-50 with very many classes, replicated, or with its head split by classes."""

from __future__ import annotations

from benchmarks.whale.dry import candidate, step_s, studied, v100s
from benchmarks.whale.models import hybrid, resnet
from whalepy.dryrun.shares import equal_rows
from whalepy.dryrun.study import Candidate

CLASSES = 100_000
PER_GPU = 48
COUNTS = (8, 16, 32)
BATCH = (
    f"{PER_GPU} images of 224 pixels a GPU. Figures 13 and 15 together say that: data parallel computes 318 images/s a "
    "GPU, and at 32 GPUs exchanges 914 MB of gradients in 1.83 times that time"
)


def sizes(small: bool) -> tuple[tuple[int, ...], int, int]:
    """Numbers of GPUs, classes and images a GPU."""
    return ((2,), 100, 4) if small else (COUNTS, CLASSES, PER_GPU)


def replicated(count: int, classes: int, each: int, small: bool) -> Candidate:
    """All of the model on every GPU."""
    with studied(resnet(classes, each, small=small)) as study:
        return candidate(study, v100s(count), each * count)


def split(count: int, classes: int, each: int, small: bool, dim: int = 0) -> Candidate:
    """The backbone on every GPU, the head in parts."""
    with studied(hybrid(count, classes, each * count, dim, small=small)) as study:
        return candidate(study, v100s(count), each * count, annotated=True)


def rate(found: Candidate) -> float:
    """Images a second."""
    return found.study.rows / step_s(found)


def fits(found: Candidate) -> str:
    """A note where memory does not hold it."""
    rows = equal_rows(found.study.rows, found.replicas)[0]
    filled = max(found.filled(rank, rows) for rank in found.ranks_of(0))
    return "" if filled <= 1 else f"does not fit: {filled:.2f} of the memory"


def communication(found: Candidate) -> float:
    """The part of a step in which the first rank exchanges and no operator hides it."""
    played = found.played(equal_rows(found.study.rows, found.replicas))
    track = played.tracks[0]
    return (track.bridge_s + track.gradient_s) / played.step_s


def sent(found: Candidate) -> float:
    """Bytes that the first rank sends in a step."""
    work = found.work(0, equal_rows(found.study.rows, found.replicas)[0])
    return sum(event.bytes * times for event, times in work.weighted if event.collective)
