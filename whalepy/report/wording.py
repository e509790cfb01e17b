"""How one figure is written, in the terminal and on the page alike: units and digits are chosen here only."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from whalepy.planner.forecast import Alternative, Forecast, Verdict

KIB, MIB, GIB = 2**10, 2**20, 2**30
VERDICTS: Mapping[Verdict, str] = {"fits": "FITS", "tight": "FITS, TIGHT", "no": "DOES NOT FIT"}
SAME = 0.005  # below half a percent two times are called the same: it is far inside the model's error
TWICE = 2.0

_SECONDS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
_BYTES = (("GiB", GIB), ("MiB", MIB), ("KiB", KIB))
_TRAFFIC = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
_COUNTS = (("P", 1e15), ("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3))
_OPTIMIZERS = {"adam": "Adam", "adamw": "AdamW", "sgd": "SGD"}


# -- figures


def digits(value: float) -> str:
    """Three significant digits below a thousand, all whole ones above: `3.40`, `34.2`, `342`, `34,215`."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.{0 if abs(rounded) >= 100 else 1 if abs(rounded) >= 10 else 2}f}"


def seconds(value: float) -> str:
    """`3.40 s`, `342 ms`, `34.2 µs`."""
    return _scaled(value, _SECONDS)


def memory(value: float) -> str:
    """Bytes as `3.4 GiB`, `342.0 MiB`: the digits of the tables."""
    name, size = next((unit for unit in _BYTES if abs(value) >= unit[1]), _BYTES[-1])
    return f"{value / size:,.1f} {name}"


def traffic(value: float) -> str:
    """Bytes sent, in the powers of ten of data sheets: `3.40 GB`."""
    return _scaled(value, _TRAFFIC)


def count(value: float) -> str:
    """`1.24 B`, `774 M`, `12.3 k`, `312`."""
    return _scaled(value, _COUNTS) if abs(value) >= 1000 else f"{value:,.0f}"


def percent(part: float) -> str:
    """`62 %`; one decimal below ten."""
    value = 100 * part
    return f"{value:.1f} %" if 0 < abs(value) < 9.95 else f"{value:.0f} %"


def times(value: float) -> str:
    """`1.43 x`."""
    return f"{digits(value)} x"


def memory_unit(values: Iterable[int]) -> tuple[str, int]:
    """The unit of a column of bytes: the largest in which the largest value does not vanish."""
    largest = max(values, default=0)
    return next(((name, size) for name, size in _BYTES if largest >= size / 10), _BYTES[-1])


def _scaled(value: float, units: Sequence[tuple[str, float]]) -> str:
    name, size = next((unit for unit in units if abs(value) >= unit[1]), units[-1])
    return f"{digits(value / size)} {name}"


# -- words


def ranks(numbers: Iterable[int]) -> str:
    """`0, 1, 4-7`: runs of three and more are written with their ends; of many runs the first few and the count."""
    parts: list[str] = []
    ordered = sorted(numbers)
    for _, run in itertools.groupby(enumerate(ordered), key=lambda pair: pair[1] - pair[0]):
        found = [number for _, number in run]
        parts += [f"{found[0]}-{found[-1]}"] if len(found) > 2 else map(str, found)
    if len(parts) > _MOST_RUNS:
        return f"{', '.join(parts[:2])}, ... ({len(ordered)})"
    return ", ".join(parts)


_MOST_RUNS = 6


def shares(values: Sequence[float]) -> str:
    """`24:24:8:8`."""
    return ":".join(f"{value:.6g}" for value in values)


def plural(number: int, noun: str, many: str = "") -> str:
    """`1 node`, `3 nodes`."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def optimizer(name: str) -> str:
    """As its authors write it, where that is known."""
    return _OPTIMIZERS.get(name.lower(), name)


def parameters(total: int, trainable: int) -> str:
    """`1.24 B parameters, all trainable`."""
    part = "all" if trainable == total else "none" if not trainable else count(trainable)
    return f"{count(total)} parameters, {part} trainable"


def batch(rows: int, tokens: int | None) -> str:
    """`64 x 2,048 tokens a step`, or rows where there are no tokens."""
    return f"{plural(rows, 'row')} a step" if tokens is None else f"{rows:,} x {tokens:,} tokens a step"


def hardware(forecast: Forecast) -> str:
    """`2 x RTX-4090 24.0 GiB, 2 x RTX-2080-Ti 10.7 GiB, PCIe 3.0 x16`."""
    cards = [f"{number:,} x {name} {memory(size)}" for number, name, size in forecast.subject.devices]
    return ", ".join([*cards, forecast.subject.link] if forecast.subject.link else cards)


def throughput(forecast: Forecast) -> str:
    """Tokens per second, or samples where there are no tokens."""
    tokens = forecast.tokens_per_s
    return f"{digits(forecast.throughput_samples_per_s)} samples/s" if tokens is None else f"{digits(tokens)} tokens/s"


def gain(forecast: Forecast) -> str:
    """How the step compares with equal shares, and whether those would fit at all."""
    ratio = forecast.gain_over_equal
    start = "as fast as" if abs(ratio - 1) < SAME else times(ratio)
    text = f"{start} equal shares (what DDP gives)"
    missing = forecast.equal_shares_missing_bytes
    return f"{text}, which {out_of_memory(missing, verb='run')}" if missing else text


def out_of_memory(missing: Mapping[int, int], *, verb: str = "") -> str:
    """`out of memory on 2, 3 by up to 3.1 GiB`, `verb` before it; "" where nothing is missing."""
    if not missing:
        return ""
    how = "by" if len(set(missing.values())) == 1 else "by up to"
    text = f"out of memory on {ranks(missing)} {how} {memory(max(missing.values()))}"
    return f"{verb} {text}".strip()


def missing_bytes(forecast: Forecast) -> dict[int, int]:
    """Per rank of the plan that runs out of memory: by how much, in rank order."""
    if forecast.verdict != "no":
        return {}
    own = forecast.alternatives[0].missing_bytes if forecast.alternatives else {}
    over = {each.rank: each.peak_memory_bytes - each.memory_capacity_bytes for each in forecast.devices}
    found = own or {rank: value for rank, value in over.items() if value > 0}
    return dict(sorted(found.items()))


def hidden(forecast: Forecast) -> float | None:
    """The part of the gradient collectives that runs under computation; None where there are none."""
    total = forecast.breakdown.gradient_total_s
    return None if total <= 0 else min(max(1 - forecast.breakdown.gradient_s / total, 0.0), 1.0)


def beside_itself(plan: Alternative, *, brief: bool = False) -> str:
    """What keeps the plan itself from running; "" where nothing does. `brief` leaves out the options behind it."""
    missing = [out_of_memory(plan.missing_bytes) or "out of memory"] if plan.verdict == "no" else []
    return ", ".join([*missing, *not_runnable(plan.not_runnable, brief=brief)])


def against(forecast: Forecast, other: Alternative, *, brief: bool = False) -> str:
    """What another plan costs beside the best: time, memory, and what keeps it from running."""
    parts = [out_of_memory(other.missing_bytes) or "out of memory"] if other.verdict == "no" else []
    if other.verdict != "no":
        parts.append(_slower(other.step_time_s / forecast.step_time_s))
    if other.verdict == "tight":
        parts.append("tight")
    return ", ".join([*parts, *not_runnable(other.not_runnable, brief=brief)])


def _slower(ratio: float) -> str:
    if abs(ratio - 1) < SAME:
        return "as fast"
    if ratio >= TWICE:
        return f"{digits(ratio)} x the time"
    return f"{percent(abs(ratio - 1))} {'slower' if ratio > 1 else 'less time'}"


def not_runnable(options: Sequence[str], *, brief: bool = False) -> list[str]:
    """`zero 3: not runnable yet`, in a list, or without the options; [] where everything runs."""
    which = "" if brief else f"{', '.join(options)}: "
    return [f"{which}not runnable yet"] if options else []


def microbatches(forecast: Forecast) -> str:
    """`8 microbatches, schedule 1f1b`; "" for a single one."""
    if forecast.microbatches == 1:
        return ""
    schedule = "" if forecast.schedule == "none" else f", schedule {forecast.schedule}"
    return f"{plural(forecast.microbatches, 'microbatch', 'microbatches')}{schedule}"


def room(forecast: Forecast) -> list[str]:
    """How far batch and sequence may grow: `batch 64 -> 96`, `sequence 2,048 -> 3,072`; [] where they may not."""
    subject = forecast.subject
    parts: list[str] = []
    if forecast.largest_batch is not None and forecast.largest_batch > subject.rows:
        parts.append(f"batch {subject.rows:,} -> {forecast.largest_batch:,}")
    if subject.tokens is not None and (forecast.longest_sequence or 0) > subject.tokens:
        parts.append(f"sequence {subject.tokens:,} -> {forecast.longest_sequence:,}")
    return parts


def launch(forecast: Forecast) -> str | None:
    """The command that starts the plan's processes, one per device of the cluster, idle ones too.

    None where it does not fit, or the runtime cannot run it yet.
    """
    if forecast.not_runnable or not forecast.fits:
        return None
    nodes, everything = forecast.subject.nodes, sum(count for count, _, _ in forecast.subject.devices)
    if everything == 1:
        return "python train.py"
    known = Counter(each.node for each in forecast.devices)
    alike = len(set(known.values())) == 1 and known.total() == everything
    processes = str(everything // nodes) if nodes == 1 or alike else "DEVICES_OF_THIS_NODE"
    where = f"--nnodes {nodes} " if nodes > 1 else ""
    return f"torchrun {where}--nproc-per-node {processes} train.py"


def loading(forecast: Forecast) -> str:
    """How `train.py` gets the plan."""
    return f'whalepy.compile(..., plan="{forecast.plan_file or "FILE"}")'


def saving(forecast: Forecast) -> str:
    """What is still to do for that; "" where the plan is saved."""
    return "" if forecast.plan_file else ", the FILE written by --save"
