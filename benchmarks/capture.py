"""How long capture, axes, decisions and rewrite of large models take, and how much memory: Llama-405B on meta.

    python -m benchmarks.capture [--model NAME] [--whole] [--results FILE]

Each model is taken once as the dry run takes it, its equal blocks folded to three, and with `--whole` once as
`compile` does, every block captured. The step is a replicate level over a split level (2 x 8 devices); each runs in a
fresh process on one core. Memory is what the process ever had resident, with torch and transformers; seconds are from
the module on the meta device to the verified programs of all ranks.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from typing import Any

import whalepy
from benchmarks.pairs import machine
from benchmarks.planning import MODELS
from benchmarks.ways import parser_of, report

CLUSTER = "2x8xA100-SXM4-80GB @ 100Gbit/s"
LIMITS = {"seconds": 45.0, "gib": 4.0}
"""What the folded capture of Llama-405B may take."""


def measured(name: str, *, whole: bool) -> dict[str, Any]:
    """Seconds of each step and memory, of this process."""
    model, example = MODELS[name]()
    whalepy.annotate(model, {"": [whalepy.replicate(2), whalepy.split(8)]})
    start = time.perf_counter()
    operators = _whole(model, example) if whole else _folded(model, example)
    return {
        "model": name,
        "way": "whole" if whole else "folded",
        "seconds": round(time.perf_counter() - start, 2),
        "gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "operators": operators,
    }


def _folded(model: Any, example: Any) -> int:
    from whalepy.dryrun.blocks import folded
    from whalepy.dryrun.study import Study
    from whalepy.hardware.cluster import ClusterSpec
    from whalepy.runtime.build import Recipe

    cluster = ClusterSpec.load(CLUSTER)
    with folded(model) as blocks:
        study = Study.of(Recipe(model), example, "adamw", blocks, master=True)
        study.candidate(None, cluster, cluster.speeds(), 1)
        return len(study.program.operators)


def _whole(model: Any, example: Any) -> int:
    plan = whalepy.plan(model, CLUSTER, example)
    return len(plan.program(0).graph.graph.nodes)


def in_fresh_process(name: str, *, whole: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.capture", "--model", name, "--here", *(["--whole"] if whole else [])]
    core = sorted(os.sched_getaffinity(0))[:1]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, preexec_fn=lambda: os.sched_setaffinity(0, core))
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = parser_of(__doc__, pairs=False)
    parser.add_argument("--model", action="append", choices=list(MODELS), help="default: all")
    parser.add_argument("--whole", action="store_true", help="every block captured, as compile does, as well")
    parser.add_argument("--here", action="store_true", help="in this process, one way alone")
    options = parser.parse_args()
    names = options.model or list(MODELS)
    if options.here:
        print(json.dumps(measured(names[0], whole=options.whole)))
        return
    before, rows = machine(), list[dict[str, Any]]()
    for name in names:
        for whole in (False, True) if options.whole else (False,):
            rows.append(in_fresh_process(name, whole=whole))
            one = rows[-1]
            print(f"{name:12} {one['way']:7} {one['seconds']:7.1f} s {one['gib']:6.2f} GiB", flush=True)
    report(options.results, "capture", before, {"limits": LIMITS, "rows": rows})


if __name__ == "__main__":
    main()
