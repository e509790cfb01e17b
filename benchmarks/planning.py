"""How long the planner takes on large models and clusters: capture, tables of the blocks, and the search itself.

    python -m benchmarks.planning                       # 128 and 512 GPUs of two types
    python -m benchmarks.planning --devices 1024 16384  # of four types
    python -m benchmarks.planning --results FILE.json

Capture and tables are made once for a model; the search is run per cluster, as a planner that is asked again does. The
figures beside it are published ones, on machines with two cores: Sailor 0.64 s on 128 and 3.6 s on 512 GPUs after 6 s
of tables, AMP 2.3 s and 6.2 s, Metis over 200 s.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from whalepy.dryrun.blocks import folded
from whalepy.dryrun.chosen import Surveyed, choices_of, name_of, surveyed
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.search import Choice
from whalepy.runtime.build import Recipe

_FOUR_TYPES = "{0}x8xA100-SXM4-80GB + {0}x8xV100-SXM2-32GB + {0}x8xH100-SXM + {0}x8xA100-SXM4-40GB @ 100Gbit/s"
CLUSTERS = {
    128: "4x8xA100-SXM4-80GB + 12x8xV100-SXM2-16GB @ 100Gbit/s",
    512: "16x8xA100-SXM4-80GB + 48x8xV100-SXM2-16GB @ 100Gbit/s",
    1024: _FOUR_TYPES.format(32),
    16384: _FOUR_TYPES.format(512),
}
ROWS = 512


@dataclass(frozen=True)
class Measured:
    """One search."""

    model: str
    devices: int
    search_s: float
    plan: str
    step_s: float | None
    filled: float | None


def gpt3() -> tuple[torch.nn.Module, dict[str, Any]]:
    """GPT-3 175B (Brown et al., 2020, table 2.1)."""
    config = GPT2Config(n_embd=12288, n_layer=96, n_head=96, n_positions=2048, vocab_size=50257)
    return _made(GPT2LMHeadModel, config, 2048)


def llama_405b() -> tuple[torch.nn.Module, dict[str, Any]]:
    """Llama 3.1 405B (Llama team, 2024, table 3), 2,048 tokens a row."""
    config = LlamaConfig(
        hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip
    return _made(LlamaForCausalLM, config, 2048)


def _made(kind: Any, config: Any, length: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    with torch.device("meta"):
        model = kind(config).half()
        ids = torch.empty(ROWS, length, dtype=torch.long)
    return model, {"input_ids": ids, "labels": ids}


MODELS = {"GPT-3 175B": gpt3, "Llama-405B": llama_405b}


def measure(name: str, clusters: dict[int, str]) -> Iterator[Measured]:
    """Capture a model, then search for the best way to put it on each cluster."""
    model, example = MODELS[name]()
    start = time.perf_counter()
    with folded(model) as blocks:
        study = Study.of(Recipe(model), example, "adamw", blocks, master=True)
        print(f"{name}: captured in {time.perf_counter() - start:.1f} s")
        for devices, text in clusters.items():
            cluster = ClusterSpec.load(text)
            start = time.perf_counter()
            found = surveyed(study, cluster)
            choices_of(found, cluster, Options())  # tables of what is asked for
            print(f"{name}, {devices} devices: tables and a first search {time.perf_counter() - start:.1f} s")
            yield timed(name, devices, found, cluster)


def timed(name: str, devices: int, found: Surveyed, cluster: ClusterSpec) -> Measured:
    """The search alone: the tables are there."""
    start = time.perf_counter()
    choices = choices_of(found, cluster, Options())
    seconds = time.perf_counter() - start
    if not choices:
        return Measured(name, devices, seconds, "nothing fits", None, None)
    return Measured(name, devices, seconds, described(choices[0]), choices[0].step_s, choices[0].filled)


def described(choice: Choice) -> str:
    """The plan in a few words."""
    return f"{name_of(choice)}, {choice.microbatches} microbatches, recompute {choice.recompute}"


def main() -> None:
    """Measure, print a table, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", nargs="*", type=int, default=[128, 512], choices=list(CLUSTERS))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--results", type=Path, help="write them as JSON")
    options = parser.parse_args()
    clusters = {number: CLUSTERS[number] for number in options.devices}
    rows = [row for name in options.models for row in measure(name, clusters)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for row in rows:
        forecast = "" if row.step_s is None else f"  {row.step_s:.1f} s a step"
        print(f"{row.model:12} {row.devices:>6} devices  search {row.search_s:6.2f} s  {row.plan}{forecast}")
    print(f"memory at most {peak:.2f} GiB")
    if options.results:
        data = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "memory_gib": peak,
            "rows": [vars(row) for row in rows],
        }
        options.results.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
