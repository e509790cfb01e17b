"""Random pairs of a model and a cluster, planned and checked: a plan that holds, or a reason; never a crash.

    python -m benchmarks.random_pairs --pairs 100000 --results FILE.json
    python -m benchmarks.random_pairs --only layers:17            # one of them again, with what it says

Of every 5,000 pairs 4,800 are tables of blocks that the joint search is asked about, 199 are lists of layers that go
through `whalepy plan layers:FILE` with random options, and one is a model with code that goes through all of it. What
is checked of each is in `benchmarks/verified.py`. Besides: where nothing fits, the first suggestion, pasted back, does;
and of every twentieth pair, asked again, the answer is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shlex
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import typer

from benchmarks import drawn, verified
from benchmarks.random_models import FACTORIES
from whalepy.commands.plan import plan
from whalepy.dryrun.run import Request
from whalepy.dryrun.run import run as run_plan
from whalepy.errors import WhaleError
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.layer_profile import read_layers
from whalepy.planner.form import Limits
from whalepy.planner.plan import Plan
from whalepy.planner.search import Search
from whalepy.planner.shares import parse_shares
from whalepy.planner.stage_cost import StageCosts

KINDS = {"search": 4800, "layers": 199, "models": 1}
"""Of so many pairs."""
AGAIN = 20
"""Of so many pairs one is asked twice."""


@dataclass
class Count:
    """What came out of pairs of one kind."""

    outcomes: Counter[str] = field(default_factory=Counter[str])
    reasons: Counter[str] = field(default_factory=Counter[str])
    faults: list[str] = field(default_factory=list[str])
    seconds: float = 0.0


@dataclass(frozen=True)
class Result:
    """What came out of one pair."""

    outcome: str
    faults: tuple[str, ...] = ()
    reason: str = ""


# -- the command


@dataclass(frozen=True)
class Answer:
    """What `whalepy plan` said."""

    told: dict[str, Any] | None = None
    """As `--json` writes it; None where it raised."""
    error: WhaleError | None = None
    text: str = ""

    @property
    def fits(self) -> bool:
        return self.told is not None and self.told["verdict"] != "no"


def asked(folder: Path, target: str, spec: str, options: Mapping[str, Any]) -> Answer:
    """The command, run in this process."""
    out, printed, code = folder / "forecast.json", io.StringIO(), 0
    try:
        with contextlib.redirect_stdout(printed):
            plan(target, spec, **options, json_file=out)
    except WhaleError as error:
        return Answer(error=error)
    except typer.Exit as ended:
        code = ended.exit_code
    told = json.loads(out.read_text())
    assert code == (3 if told["verdict"] == "no" else 0), f"exit code {code}, but {told['verdict']}"
    return Answer(told, text=printed.getvalue())


def pasted(flags: str) -> dict[str, Any]:
    """Flags, as arguments of the command."""
    words = shlex.split(flags)
    pairs = zip(words[::2], words[1::2], strict=True)
    whole = ("cluster", "shares", "optimizer", "balance", "recompute", "schedule", "precision")
    named = ((name.removeprefix("--").replace("-", "_"), value) for name, value in pairs)
    return {name: value if name in whole else int(value) for name, value in named}


def way_out(folder: Path, target: str, spec: Path, options: Mapping[str, Any], told: Mapping[str, Any]) -> str:
    """What is wrong with the first suggestion where nothing fits; empty where it holds."""
    flags = told["ways_out"][0]
    changed = {"cluster": str(spec), **options, **pasted(flags)}
    again = asked(folder, target, changed.pop("cluster"), changed)
    if again.error is not None:
        return f"`{flags}` is refused: {again.error}"
    return "" if again.fits else f"`{flags}` does not fit"


# -- one pair of each kind


def search(draw: Random, folder: Path, again: bool) -> Result:
    """A table of blocks that the search is asked about."""
    spec = ClusterSpec.load(drawn.cluster(draw, 32 if draw.random() < 0.003 else draw.choice((2, 3, 4, 6))))
    table = drawn.blocks(draw, spec)
    limits = drawn.limits(draw, spec, table)
    found = Search(StageCosts(table, spec), limits).found()
    faults = list(verified.of_choices(found, table, spec, limits))
    free = limits == Limits(filled=limits.filled)
    missed = not found and free and verified.one_device_holds(table, spec, limits.filled)
    costs = StageCosts(table, ClusterSpec.load(spec.to_dict()))
    if again and found != Search(costs, limits).found():
        faults.append("asked again, another answer")
    outcome = "found" if found else "nothing found, but one device holds it" if missed else "nothing found"
    return Result(outcome, tuple(faults))


def layers(draw: Random, folder: Path, again: bool) -> Result:
    """A list of layers that `whalepy plan` is asked about."""
    content = drawn.cluster(draw, 16 if draw.random() < 0.1 else 6)
    spec, rows = ClusterSpec.load(content), drawn.batch(draw)
    file, hardware = folder / "layers.json", folder / "cluster.json"
    file.write_text(json.dumps(drawn.layer_file(draw, spec, rows)))
    hardware.write_text(json.dumps(content))
    options = drawn.layer_options(draw, spec, rows)
    answer = asked(folder, f"layers:{file}", str(hardware), options)
    return _judged(folder, f"layers:{file}", hardware, options, answer, again)


def models(draw: Random, folder: Path, again: bool) -> Result:
    """A model with code that `whalepy plan` is asked about; of a pipeline the schedule is verified."""
    content = drawn.cluster(draw, 8)
    rows = round(drawn.between(draw, 1, 4096))
    _shrink(draw, content)
    spec, hardware = ClusterSpec.load(content), folder / "cluster.json"
    hardware.write_text(json.dumps(content))
    target = f"benchmarks.random_models:{draw.choice(FACTORIES)}"
    options = drawn.model_options(draw, spec, rows)
    answer = asked(folder, target, str(hardware), options)
    found = _judged(folder, target, hardware, options, answer, again)
    if answer.told is not None and len(answer.told["stages"]) > 1:
        made = planned(target, hardware, options)
        return Result(found.outcome, (*found.faults, *verified.of_plan(made)))
    return found


def planned(target: str, spec: Path, options: Mapping[str, Any]) -> Plan:
    """The plan behind the answer."""
    named = {"rows": options["batch_size"], **options}
    del named["batch_size"]
    if "shares" in named:
        named["shares"] = parse_shares(named["shares"])
    made = run_plan(Request(target, str(spec), **named), lambda text: None)[1]
    assert made is not None
    return made


def _shrink(draw: Random, content: dict[str, Any]) -> None:
    """Memories in which small models may not fit."""
    for node in content["nodes"]:
        for entry in node["devices"]:
            entry["memory_gib"] = round(drawn.between(draw, 0.6, 8), 2)


def _judged(folder: Path, target: str, spec: Path, options: Mapping[str, Any], answer: Answer, again: bool) -> Result:
    """What is wrong with an answer."""
    if answer.error is not None:
        return Result("reason", tuple(verified.of_error(answer.error)), _form(answer.error.what))
    told, cluster = answer.told, ClusterSpec.load(spec)
    assert told is not None
    faults = list(verified.of_forecast(told, cluster, _rows(target, options)))
    if target.startswith("layers:"):
        faults += verified.of_layers(told, read_layers(Path(target.removeprefix("layers:"))), cluster)
    if again and asked(folder, target, str(spec), options) != answer:
        faults.append("asked again, another answer")
    if not answer.fits and told["ways_out"]:
        wrong = way_out(folder, target, spec, options, told)
        faults += [f"way out: {wrong}"] if wrong else []
    outcome = told["verdict"] if answer.fits else "no, with a way out" if told["ways_out"] else "no, and no way out"
    return Result(outcome, tuple(faults))


def _rows(target: str, options: Mapping[str, Any]) -> int:
    if "batch_size" in options:
        return options["batch_size"]
    return read_layers(Path(target.removeprefix("layers:"))).rows


def _form(text: str) -> str:
    """A reason without its figures and names, so that it can be counted."""
    text = re.sub(r"[A-Z]\w*(-\w+)+", "TYPE", text.partition("\n")[0])
    return re.sub(r"'[^']*'", "NAME", re.sub(r"\d+(\.\d+)?", "#", text))


MAKERS: dict[str, Callable[[Random, Path, bool], Result]] = {"search": search, "layers": layers, "models": models}


# -- all of them


def one(kind: str, number: int, seed: int, folder: Path) -> Result:
    """A pair by its kind and number; any error but a WhaleError of the command is a fault."""
    try:
        return MAKERS[kind](Random(f"{seed} {kind} {number}"), folder, number % AGAIN == 0)
    except Exception:
        return Result("crash", (traceback.format_exc(limit=-6),))


def numbered(pairs: int) -> Iterator[tuple[str, int]]:
    """Kinds and numbers, as evenly mixed as they come."""
    done = dict.fromkeys(KINDS, 0)
    for k in range(1, pairs + 1):
        kind = max(KINDS, key=lambda kind: k * KINDS[kind] / sum(KINDS.values()) - done[kind])
        yield kind, done[kind]
        done[kind] += 1


def timed(pair: tuple[str, int], seed: int) -> tuple[Result, float]:
    """A pair in a folder of its own, and the seconds that it took."""
    before = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        return one(*pair, seed, Path(folder)), time.perf_counter() - before


def run(pairs: int, seed: int, processes: int, say: Callable[[str], None]) -> dict[str, Count]:
    """So many pairs, counted by kind."""
    counts = {kind: Count() for kind in KINDS}
    start = time.perf_counter()
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        asked = list(numbered(pairs))
        found = pool.map(timed, asked, repeat(seed), chunksize=20)
        for k, ((kind, number), (result, seconds)) in enumerate(zip(asked, found, strict=True), 1):
            count = counts[kind]
            count.seconds += seconds
            count.outcomes[result.outcome] += 1
            count.reasons.update([result.reason] if result.reason else [])
            for fault in result.faults:
                count.faults.append(f"{kind}:{number}  {fault}")
                say(f"FAULT {kind}:{number}  {fault}")
            if k % 1000 == 0:
                faults = sum(len(one.faults) for one in counts.values())
                say(f"{k:,} pairs, {faults} faults, {(time.perf_counter() - start) / k * 1e3:.1f} ms each")
    return counts


def main() -> None:
    """Run, print what came out, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="how many pairs are asked at a time")
    parser.add_argument("--only", help="KIND:NUMBER, one pair alone")
    parser.add_argument("--results", type=Path, help="write them as JSON")
    options = parser.parse_args()
    if options.only:
        kind, _, number = options.only.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            print(one(kind, int(number), options.seed, Path(folder)))
        return
    counts = run(options.pairs, options.seed, options.processes, lambda text: print(text, flush=True))
    found = {kind: {"pairs": count.outcomes.total(), "seconds": round(count.seconds, 1), "outcomes": count.outcomes,
                    "reasons": dict(count.reasons.most_common()), "faults": count.faults}
             for kind, count in counts.items()}  # fmt: skip
    print(json.dumps(found, indent=1))
    if options.results:
        head = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "seed": options.seed, "pairs": options.pairs}
        options.results.write_text(json.dumps(head | found, indent=1) + "\n")
    sys.exit(any(count.faults for count in counts.values()))


if __name__ == "__main__":
    main()
