"""A small GPT-2 that learns to write Python, over every rank that torchrun starts: a template for your own script.

    torchrun --nproc-per-node 4 examples/train_gpt2.py

What differs from a script for one device: `annotate`, `compile`, `train_step`, and the rows of `local_batch`.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel
from transformers import logging as transformers_logging

import whalepy

CLUSTER = "2xcpu + 2xcpu*0.5"  # four ranks, two of them declared half as fast
BATCH, LENGTH = 24, 128  # rows of the global batch, bytes per row
STEPS = 40
LEARNING_RATE, MOMENTUM = 0.05, 0.9

Batch = dict[str, torch.Tensor]


def compiled() -> whalepy.ParallelModel:
    """The model of this rank: rows shared by the replicas, every block split inside each replica."""
    model = small_gpt2()
    whalepy.annotate(model, {"": whalepy.replicate(2), "transformer.h.*": whalepy.split(2)})
    return whalepy.compile(model, CLUSTER, next(batches(1)))


def train(parallel: whalepy.ParallelModel, steps: int, watch: Callable[[int, float], None]) -> None:
    """Train for some steps; `watch` is told the loss of each."""
    optimizer = torch.optim.SGD(parallel.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    for step, batch in enumerate(batches(steps)):
        optimizer.zero_grad()
        loss = parallel.train_step(**parallel.local_batch(batch))
        parallel.clip_grad_norm_(1.0)
        optimizer.step()
        watch(step, loss.item())


def small_gpt2() -> GPT2LMHeadModel:
    """Four blocks over bytes, at random; the same on every call."""
    transformers_logging.set_verbosity_error()  # it would warn of the vocabulary of 256
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_head=4, n_embd=128, n_positions=LENGTH, vocab_size=256, bos_token_id=0, eos_token_id=0,
        embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def batches(steps: int) -> Iterator[Batch]:
    """Global batches, `i64[BATCH, LENGTH]`: the same on every rank and every call."""
    text = library_source()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH, (BATCH, 1), generator=generator)
        rows = text[starts + torch.arange(LENGTH)].long()
        yield {"input_ids": rows, "labels": rows}


@lru_cache
def library_source() -> torch.Tensor:
    """The source of the Python standard library, `u8[bytes]`."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"\n".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def main() -> None:
    parallel = compiled()
    first = dist.get_rank() == 0
    if first:
        print(parallel.plan)
    train(parallel, STEPS, lambda step, loss: print(f"step {step}  loss {loss:.3f}") if first else None)
    state = parallel.full_state_dict()  # every rank takes part; the keys and values of the local model
    if first:
        torch.save(state, "gpt2.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
