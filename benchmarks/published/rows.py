"""Published measurements as rows: what ran, on which devices, how, and what was measured.

One CSV per table, all with the same columns; `sequence_parallel.csv` has its own. A row whose configuration cannot be
expressed says in `left` what is missing. Figures are those of the source, in its unit.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
TABLES = ("llm_foundry", "torchtitan", "megatron", "examples", "fits", "sailor_gh200", "bigscience")
INTEGERS = ("nodes", "per_node", "batch", "replicate", "split", "microbatches", "zero")

# Variants of known types, as their publishers state them. Source of the first: pytorch/torchtitan,
# benchmarks/llama3_h100_202412_torchtitan.md, "Hardware": 96 GB HBM2e, 2.4 TB/s, 500 W; its scale is the median of
# predicted over published step time of its six runs, as those in hardware/scales.csv are. Of the second: the published
# profiles of the layers that these runs are made of (sailor_layer_profiles.csv), which in "fp32" reach more than the
# 66.9 TFLOP/s of float32: the forward pass of 32 samples through a block of OPT-350M, 2.2 TFLOP, takes 27.7 ms, or
# 79 TFLOP/s. So products were in tf32.
PROFILES: Mapping[str, Mapping[str, Any]] = {
    "H100-96GB": {"base": "H100-SXM", "memory_gib": 95.0, "memory_bandwidth": 2.4e12, "scale": 1.0},
    "GH200-TF32": {"base": "GH200", "fp32": 494.7e12},
}


@dataclass(frozen=True)
class Row:
    """One run; `published` in `unit`, None where only memory or the outcome is known."""

    row: str
    model: str
    nodes: int
    per_node: int
    device: str
    link: str
    """Between nodes, per node and direction."""
    batch: int
    """Samples of one step over all devices."""
    tokens: int | None
    """Per sample; None for images."""
    replicate: int
    split: int
    microbatches: int
    zero: int
    recompute: str
    precision: str
    optimizer: str
    published: float | None
    unit: str
    memory_gib: float | None
    memory_kind: str
    """`allocated` or `reserved` by torch, or `device`: all that is in use, context and libraries too."""
    outcome: str
    """`ran` or `oom`."""
    left: str
    framework: str
    note: str
    source: str
    stages: int = 1

    @property
    def devices(self) -> int:
        return self.nodes * self.per_node

    def step_s(self, value: float) -> float:
        """Seconds of one step for a value in the row's unit; its own inverse for rates."""
        return value if self.unit == "s" else self._per_step / value

    def in_unit(self, step_s: float) -> float:
        """Seconds of one step in the row's unit."""
        return step_s if self.unit == "s" else self._per_step / step_s

    @property
    def _per_step(self) -> float:
        per_step = {"samples/s": self.batch, "tokens/s/GPU": self.batch * (self.tokens or 0) / self.devices}
        return float(per_step[self.unit])


def table(name: str) -> tuple[Row, ...]:
    """The rows of one table, in the order of its file."""
    return tuple(_row(entry) for entry in _entries(name))


def _row(entry: Mapping[str, str]) -> Row:
    values: dict[str, Any] = dict(entry)
    values.update({key: int(entry[key]) for key in INTEGERS})
    values.update({key: float(entry[key]) if entry[key] else None for key in ("published", "memory_gib")})
    values["stages"] = int(entry.get("stages") or 1)
    values["tokens"] = int(entry["tokens"]) if entry["tokens"] else None
    return Row(**values)


def _entries(name: str) -> list[dict[str, str]]:
    with (FOLDER / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cluster_of(row: Row, *, sheet: bool = False) -> dict[str, Any]:
    """What a cluster file of the row's machines would say; `sheet`: of devices as fast as their data sheets."""
    node = {"count": row.nodes, "devices": [{"type": row.device, "count": row.per_node}]}
    spec: dict[str, Any] = {"nodes": [node]}
    if row.link:
        spec["link"] = {"bandwidth": row.link}
    own = dict(PROFILES.get(row.device, {"base": row.device} if sheet else {}))
    if own:
        spec["profiles"] = {row.device: {**own, "scale": 1.0} if sheet else own}
    return spec


# -- models --------------------------------------------------------------------------------------------------------


@cache
def shapes() -> Mapping[str, Mapping[str, str]]:
    """The line of every model in models.csv, by name."""
    return {entry["name"]: entry for entry in _entries("models")}


def config_of(shape: Mapping[str, str], tokens: int | None) -> dict[str, Any] | None:
    """The config.json of a model for samples of so many tokens; None for one that is bundled."""
    make = {"gpt": _gpt, "llama": _llama, "bert": _bert, "t5": _t5, "bloom": _bloom}.get(shape["family"])
    return None if make is None else {**make(shape, tokens or 0), "attn_implementation": shape["attention"]}


def _gpt(shape: Mapping[str, str], tokens: int) -> dict[str, Any]:
    """Learned positions, tied embeddings, biases everywhere, exact GELU: MPT without ALiBi and Megatron's GPT."""
    dropout = float(shape["dropout"])
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": int(shape["hidden"]),
        "n_layer": int(shape["layers"]),
        "n_head": int(shape["heads"]),
        "n_positions": tokens,
        "vocab_size": int(shape["vocab"]),
        "activation_function": "gelu",
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
    }


def _llama(shape: Mapping[str, str], tokens: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": int(shape["hidden"]),
        "num_hidden_layers": int(shape["layers"]),
        "num_attention_heads": int(shape["heads"]),
        "num_key_value_heads": int(shape["kv_heads"]),
        "intermediate_size": int(shape["ffn"]),
        "vocab_size": int(shape["vocab"]),
        "max_position_embeddings": tokens,
        "tie_word_embeddings": False,
    }


def _bert(shape: Mapping[str, str], tokens: int) -> dict[str, Any]:
    """Two outputs per token, as question answering has."""
    return {
        "model_type": "bert",
        "architectures": ["BertForTokenClassification"],
        "num_labels": 2,
        "hidden_size": int(shape["hidden"]),
        "num_hidden_layers": int(shape["layers"]),
        "num_attention_heads": int(shape["heads"]),
        "intermediate_size": int(shape["ffn"]),
        "vocab_size": int(shape["vocab"]),
        "max_position_embeddings": max(512, tokens),
    }


def _t5(shape: Mapping[str, str], tokens: int) -> dict[str, Any]:
    """`kv_heads` holds the size of a head; the models with gated layers do not tie their embeddings."""
    gated = shape["name"] != "t5-3b"
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "d_model": int(shape["hidden"]),
        "num_layers": int(shape["layers"]),
        "num_heads": int(shape["heads"]),
        "d_kv": int(shape["kv_heads"]),
        "d_ff": int(shape["ffn"]),
        "vocab_size": int(shape["vocab"]),
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "tie_word_embeddings": not gated,
        "decoder_start_token_id": 0,
        "use_cache": False,
    }


def _bloom(shape: Mapping[str, str], tokens: int) -> dict[str, Any]:
    return {
        "model_type": "bloom",
        "architectures": ["BloomForCausalLM"],
        "hidden_size": int(shape["hidden"]),
        "n_layer": int(shape["layers"]),
        "n_head": int(shape["heads"]),
        "vocab_size": int(shape["vocab"]),
        "use_cache": False,
    }
