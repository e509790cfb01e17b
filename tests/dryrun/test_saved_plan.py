"""A plan made without devices, of a model whose repeated blocks were folded, trains on ranks as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import whalepy
from tests.pool import Pool
from whalepy.dryrun.run import Request, run
from whalepy.errors import PlanError

CLUSTER = "1xcpu + 1xcpu*0.5"
FACTORY = """
import torch, transformers

def factory(layers=6):
    sizes = dict(n_embd=32, n_head=4, n_layer=layers, n_positions=16, vocab_size=64)
    config = transformers.GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config), batch()

def batch():
    ids = torch.arange(9 * 16).reshape(9, 16) % 64
    return {"input_ids": ids, "labels": ids}

def fewer():
    return factory(5)
"""


def _made(folder: str, name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    space: dict[str, Any] = {}
    exec((Path(folder) / "train.py").read_text(), space)
    return space[name]()


def trained(folder: str, name: str) -> tuple[float, float, tuple[Any, ...]]:
    """The loss of the local model and of the plan, and the cuts of the plan."""
    model, batch = _made(folder, name)
    local, _ = _made(folder, name)
    parallel = whalepy.compile(model, CLUSTER, batch, plan=str(Path(folder) / "plan"))
    loss = parallel.train_step(**parallel.local_batch(batch))
    return float(local(**batch).loss), float(loss), parallel.plan.cuts


@pytest.mark.parametrize("degrees", [{"replicate": 2}, {"split": 2}, {"replicate": 2, "microbatches": 3}])
def test_a_saved_plan_trains(workers: Pool, tmp_path: Path, degrees: dict[str, Any]) -> None:
    (tmp_path / "train.py").write_text(FACTORY)
    forecast, plan = run(Request(f"{tmp_path}/train.py:factory", CLUSTER, **degrees), lambda _: None)
    assert plan is not None and plan.microbatches == degrees.get("microbatches", 1)
    (tmp_path / "plan").write_text(plan.to_json())
    for local, loss, _ in workers.run(2, trained, str(tmp_path), "factory"):
        assert loss == pytest.approx(local, rel=1e-6)
    rows = [device.batch_share for device in forecast.devices]
    assert "split" in degrees or rows[0] > rows[1]


def test_the_plan_of_another_model_is_refused(workers: Pool, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(FACTORY)
    _, plan = run(Request(f"{tmp_path}/train.py:factory", CLUSTER, replicate=2), lambda _: None)
    assert plan is not None
    (tmp_path / "plan").write_text(plan.to_json())
    with pytest.raises(PlanError, match="another model"):
        workers.run(2, trained, str(tmp_path), "fewer")
