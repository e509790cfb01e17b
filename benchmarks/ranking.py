"""Whether the dry run puts plans in the order in which they run: GPT-2 and ResNet on 2 to 4 ranks of this machine.

    python -m benchmarks.ranking [--rounds N] [--results FILE]

A profile of this machine is taken as `whalepy profile` does, on two ranks at once. Three clusters are made of it: two
ranks with a core each, three of speed 2:1:1, four of speed 1/2; a slow one gets half of the time of a core, also while
others wait (benchmarks/quotas.py). Twelve plans are forecast and saved as `whalepy plan --save` does, and what it
chooses where nothing is forced; then each is run by `compile(plan=)` on gloo ranks with one thread each, all in turn
and in the reverse order, in fresh processes. A plan that was chosen and is forced, too, is run once.

A virtual machine is not equally fast all the time. So a fixed piece of work is timed on every rank beside every step,
and between what the profile measures: the time of a step is told as it is (`measured_s`) and at the pace at which the
profile was taken (`paced_s`, which counts).

Kendall's tau counts the pairs of plans that differ by more than 5 % as measured: in the same order less in the other,
over all. `chosen` is what was chosen over the best that was run on that cluster.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import nn

import whalepy
from benchmarks import quotas
from benchmarks.pairs import machine
from benchmarks.ways import on_ranks, own_core, parser_of, report
from whalepy.dryrun.run import Request, run
from whalepy.hardware.detect import RankReport, report_this_rank
from whalepy.hardware.links import Link
from whalepy.hardware.profile_file import measured_spec
from whalepy.runtime.agreement import gather_objects
from whalepy.runtime.groups import CPU, start_process_group
from whalepy.runtime.kept_memory import keep_freed_memory
from whalepy.runtime.measure import EFFORTS, Step, measure_device
from whalepy.runtime.measure_links import measure_links

APART = 0.05
"""Pairs that differ by less, as measured, are in no order."""
STEPS, WARM = 16, 8
"""Of so many steps the first ones do not count: a process takes its memory from the system in them."""
CORES = {"2 ranks": (0, 1), "2:1:1": (0, 1, 1), "4 ranks": (0, 1, 0, 1)}
"""Clusters: the core of each rank; those that have one together get equal parts of its time."""


def part_of(cores: Sequence[int], rank: int) -> float:
    """Which part of its core a rank gets."""
    return 1 / cores.count(cores[rank])


def gpt2() -> tuple[nn.Module, dict[str, Any]]:
    """Four layers of 256, 4096 ids; 16 rows of 128."""
    import transformers

    sizes: dict[str, Any] = {"n_layer": 4, "n_embd": 256, "n_head": 8, "vocab_size": 4096, "n_positions": 128}
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    torch.manual_seed(0)
    ids = torch.randint(4096, (16, 128))
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **none, **ends))
    return model, {"input_ids": ids, "labels": ids}


def resnet() -> tuple[nn.Module, dict[str, Any]]:
    """ResNet-50; 16 images of 64 pixels."""
    import transformers

    torch.manual_seed(0)
    classes: dict[str, Any] = {"num_labels": 100}
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**classes))
    return model, {"pixel_values": torch.randn(16, 3, 64, 64), "labels": torch.arange(16)}


MODELS = {"gpt2": gpt2, "resnet": resnet}


@dataclass(frozen=True, eq=False)
class Asked:
    """A plan by what is forced; the planner's own where that is nothing."""

    model: str
    cluster: str
    forced: Mapping[str, Any]

    @property
    def name(self) -> str:
        forced = ", ".join(f"{key} {value}" for key, value in self.forced.items()) or "chosen"
        return f"{self.model} on {self.cluster}: {forced}"


PLANS = (
    Asked("gpt2", "2 ranks", {"replicate": 2, "stages": 1}),
    Asked("gpt2", "2 ranks", {"split": 2, "stages": 1}),
    Asked("gpt2", "2 ranks", {"stages": 2, "microbatches": 4}),
    Asked("gpt2", "2:1:1", {"replicate": 3, "stages": 1}),
    Asked("gpt2", "2:1:1", {"replicate": 3, "stages": 1, "shares": "equal"}),
    Asked("gpt2", "2:1:1", {"stages": 3, "microbatches": 8}),
    Asked("gpt2", "4 ranks", {"replicate": 4, "stages": 1}),
    Asked("gpt2", "4 ranks", {"replicate": 2, "split": 2, "stages": 1}),
    Asked("gpt2", "4 ranks", {"stages": 2, "replicate": 2, "microbatches": 4}),
    Asked("resnet", "2 ranks", {"replicate": 2, "stages": 1}),
    Asked("resnet", "2:1:1", {"replicate": 3, "stages": 1}),
    Asked("resnet", "2:1:1", {"replicate": 3, "stages": 1, "shares": "equal"}),
)
CHOSEN = tuple(Asked(model, cluster, {}) for model in ("gpt2", "resnet") for cluster in ("2 ranks", "2:1:1"))


# -- forecasts -----------------------------------------------------------------------------------------------------


class Pace:
    """Times a fixed piece of work, products and sums, in seconds of this core, without those that others have it."""

    def __init__(self) -> None:
        self.matrix, self.vector = torch.randn(512, 512), torch.randn(2**21)
        self.seen: list[float] = []

    def take(self) -> None:
        start = time.thread_time()
        for _ in range(3):
            _ = self.matrix @ self.matrix, self.vector + self.vector
        self.seen.append(time.thread_time() - start)

    def beside(self, steps: Iterable[Step]) -> Iterator[Step]:
        """The same steps, the work after each."""
        for step in steps:
            yield step
            self.take()


def profile_on_rank() -> tuple[RankReport, Link, float]:
    """This rank's profile, while the other core is busy with the other one, the link between both, and the pace."""
    own_core()
    host = start_process_group(CPU)
    keep_freed_memory(CPU)
    pace = Pace()
    report = report_this_rank(CPU, measure_device(CPU, effort=EFFORTS["cpu", False], watch=pace.beside))
    reports = gather_objects(host, report)
    links = measure_links(host, [other.host for other in reports], CPU)
    return report, links.inside[report.host], statistics.median(pace.seen)


def clusters_of(report: RankReport, link: Link, folder: Path) -> dict[str, Path]:
    """A file for each cluster, of devices like the one that was measured; those that share a core have their part."""
    data = measured_spec([report], {report.host: link}, None).to_dict()
    (node,) = data["nodes"]
    (device,) = node["devices"]
    between = {"bandwidth": link.bandwidth_bytes_per_s, "latency_s": link.latency_s, "origin": "measured"}
    found: dict[str, Path] = {}
    for name, cores in CORES.items():
        devices = [device | {"count": 1, "speed": part_of(cores, rank)} for rank in range(len(cores))]
        found[name] = folder / f"{name.replace(' ', '-').replace(':', '-')}.json"
        found[name].write_text(json.dumps(data | {"nodes": [node | {"devices": devices, "link": between}]}))
    return found


def forecast(asked: Asked, cluster: Path, folder: Path) -> tuple[float, Path]:
    """Seconds of a step, and the file of the plan."""
    target = f"{__file__}:{asked.model}"
    request = Request(target, str(cluster), optimizer="sgd", **asked.forced)
    found, plan = run(request, lambda _: None)
    assert plan is not None
    path = folder / f"{len(list(folder.glob('*.plan')))}.plan"
    plan.save(path)
    return found.step_time_s, path


# -- running -------------------------------------------------------------------------------------------------------


def steps_on_rank(asked: Asked, cluster: str, plan: str, groups: Sequence[Path]) -> list[tuple[float, float]]:
    """Of a few steps the seconds of the rank that takes longest, and the mean pace around it."""
    host = start_process_group(CPU)
    quotas.enter(groups[host.position])
    own_core(CORES[asked.cluster][host.position])
    model, batch = MODELS[asked.model]()
    parallel = whalepy.compile(model, cluster, batch, plan=plan)
    rows = parallel.local_batch(batch)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-4)
    times: list[tuple[float, float]] = []
    pace = Pace()
    pace.take()
    for _ in range(STEPS):
        gather_objects(host, None)
        start = time.perf_counter()
        parallel.train_step(**rows)
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        pace.take()
        told = gather_objects(host, (seconds, *pace.seen[-2:]))
        times.append((max(own for own, *_ in told), statistics.mean(one for _, *both in told for one in both)))
    return times[WARM:]


def kendall(rows: Sequence[Mapping[str, float]], measured: str = "paced_s") -> tuple[float, int]:
    """Tau over pairs that differ as measured, and their number."""
    pairs = [
        (a["predicted_s"] - b["predicted_s"]) * (a[measured] - b[measured])
        for a, b in combinations(rows, 2)
        if abs(a[measured] - b[measured]) > APART * min(a[measured], b[measured])
    ]
    return sum(1 if one > 0 else -1 for one in pairs) / max(len(pairs), 1), len(pairs)


def run_once(asked: Asked, cluster: str, plan: str) -> list[tuple[float, float]]:
    """Seconds and pace of a few steps, on fresh ranks."""
    cores = CORES[asked.cluster]
    with quotas.groups([part_of(cores, rank) for rank in range(len(cores))]) as groups:
        return on_ranks(len(cores), steps_on_rank, asked, cluster, plan, groups)


def compared(rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each plan: predicted and measured."""
    seen, link, pace = on_ranks(2, profile_on_rank)
    clusters = clusters_of(seen, link, folder)
    asked = [*PLANS, *CHOSEN]
    made = {one: forecast(one, clusters[one.cluster], folder) for one in asked}
    first = {(one.model, one.cluster, made[one][1].read_text()): one for one in reversed(asked)}
    stands_for = {one: first[one.model, one.cluster, made[one][1].read_text()] for one in asked}
    different = list(dict.fromkeys(stands_for.values()))
    times: dict[Asked, list[tuple[float, float]]] = {one: [] for one in different}
    for turn in range(rounds):
        for one in different if turn % 2 == 0 else reversed(different):
            times[one] += run_once(one, str(clusters[one.cluster]), str(made[one][1]))
            measured, paced = _medians(times[one], pace)
            print(f"{one.name}: predicted {made[one][0]:.3f} s, so far {measured:.3f} s, {paced:.3f} s at its pace")
    found = {one: _medians(times[stands_for[one]], pace) for one in asked}
    return [
        {
            "plan": one.name, "model": one.model, "cluster": one.cluster, "predicted_s": round(made[one][0], 4),
            "measured_s": round(found[one][0], 4), "paced_s": round(found[one][1], 4),
        }
        for one in asked
    ]  # fmt: skip


def _medians(times: Sequence[tuple[float, float]], pace: float) -> tuple[float, float]:
    """Seconds as measured, and at this pace."""
    return statistics.median(one for one, _ in times), statistics.median(one * pace / own for one, own in times)


def main() -> None:
    parser = parser_of(__doc__, pairs=False)
    parser.add_argument("--rounds", type=int, default=2, help="how often each plan is run")
    options = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        rows = compared(options.rounds, Path(folder))
    (tau, pairs), (unpaced, _) = kendall(rows[: len(PLANS)]), kendall(rows[: len(PLANS)], "measured_s")
    chosen = {
        f"{one['model']} on {one['cluster']}": round(one["paced_s"] / min(_alike(rows, one)), 3)
        for one in rows[len(PLANS) :]
    }
    print(f"Kendall's tau {tau:.3f} over {pairs} pairs, {unpaced:.3f} as measured; chosen over best {chosen}")
    told = {"tau": tau, "pairs": pairs, "tau_as_measured": unpaced, "chosen": chosen, "rows": rows}
    report(options.results, "ranking", before, told)


def _alike(rows: Sequence[Mapping[str, Any]], one: Mapping[str, Any]) -> list[float]:
    """The times of all plans of that model on that cluster."""
    return [row["paced_s"] for row in rows if (row["model"], row["cluster"]) == (one["model"], one["cluster"])]


if __name__ == "__main__":
    main()
