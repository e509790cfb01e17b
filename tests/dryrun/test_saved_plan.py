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
from whalepy.planner.forecast import Forecast

CLUSTER = "1xcpu + 1xcpu*0.5"
FACTORY = """
import torch, transformers

def factory():
    sizes = dict(n_embd=32, n_head=4, n_layer=6, n_positions=16, vocab_size=64)
    config = transformers.GPT2Config(**sizes, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config), batch()

def batch():
    ids = torch.arange(9 * 16).reshape(9, 16) % 64
    return {"input_ids": ids, "labels": ids}

class Mlp(torch.nn.Sequential):
    def forward(self, x):
        return super().forward(x).pow(2).mean()

def mlp():
    return Mlp(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)), {"x": torch.zeros(9, 8)}

def deeper():
    sizes = [torch.nn.Linear(8, 32), torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)]
    return Mlp(*sizes), {"x": torch.zeros(9, 8)}

def annotated():
    import whalepy
    model, example = mlp()
    return whalepy.annotate(model, {"": whalepy.split(2)}), example
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


def trained_in_stages(folder: str, annotations: str) -> tuple[float, float, int]:
    """The loss of the local model and of the plan, and the stages of the plan."""
    model, batch = _made(folder, "factory")
    local, _ = _made(folder, "factory")
    exec(annotations, {"model": model, "whalepy": whalepy})
    parallel = whalepy.compile(model, CLUSTER, batch, plan=str(Path(folder) / "plan"))
    loss = parallel.train_step(**parallel.local_batch(batch))
    return float(local(**batch).loss), float(loss), len(parallel.plan.stages)


def test_a_saved_pipeline_trains_and_is_costed_anew(workers: Pool, tmp_path: Path) -> None:
    """The model is annotated as the forecast says; then the plan of stages that were forced is its plan."""
    (tmp_path / "train.py").write_text(FACTORY)
    asked = Request(f"{tmp_path}/train.py:factory", CLUSTER, stages=2, schedule="gpipe", microbatches=3)
    forecast, plan = run(asked, lambda _: None)
    assert plan is not None and forecast.schedule == plan.schedule == "gpipe"
    (tmp_path / "plan").write_text(plan.to_json())
    for local, loss, stages in workers.run(2, trained_in_stages, str(tmp_path), forecast.annotations):
        assert stages == 2 and loss == pytest.approx(local, rel=1e-5)
    staged = "".join(f"    {line}\n" for line in forecast.annotations.splitlines())
    (tmp_path / "train.py").write_text(
        f"{FACTORY}\ndef staged():\n    import whalepy\n    model, batch = factory()\n{staged}    return model, batch\n"
    )
    again, _ = run(Request(f"{tmp_path}/train.py:staged", CLUSTER, plan=str(tmp_path / "plan")), lambda _: None)
    assert again.step_time_s == pytest.approx(forecast.step_time_s)
    assert again.strategy == "saved plan plan: 2 stages, gpipe, 3 microbatches"


@pytest.mark.parametrize("degrees", [{"split": 2}, {"replicate": 2, "microbatches": 3}])
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
    _, plan = run(Request(f"{tmp_path}/train.py:mlp", CLUSTER, replicate=2), lambda _: None)
    assert plan is not None
    (tmp_path / "plan").write_text(plan.to_json())
    with pytest.raises(PlanError, match="another model"):
        workers.run(2, trained, str(tmp_path), "deeper")


# -- costed anew


def saved(tmp_path: Path, factory: str, **forced: Any) -> tuple[Forecast, str]:
    """A forecast, and the file of its plan."""
    (tmp_path / "train.py").write_text(FACTORY)
    forecast, plan = run(Request(f"{tmp_path}/train.py:{factory}", CLUSTER, **forced), lambda _: None)
    assert plan is not None
    plan.save(tmp_path / "plan")
    return forecast, str(tmp_path / "plan")


KINDS = [("mlp", {"replicate": 2}), ("mlp", {"split": 2}), ("annotated", {}), ("factory", {"replicate": 2})]


@pytest.mark.parametrize(("factory", "forced"), KINDS)
def test_a_saved_plan_is_costed_anew(tmp_path: Path, factory: str, forced: dict[str, Any]) -> None:
    before, file = saved(tmp_path, factory, **forced)
    again, plan = run(Request(f"{tmp_path}/train.py:{factory}", CLUSTER, plan=file), lambda _: None)
    assert again.strategy.startswith("saved plan plan: ")
    assert [a.strategy for a in again.alternatives] == [again.strategy]
    assert again.step_time_s == pytest.approx(before.step_time_s, rel=0.03)  # where blocks were left out before
    assert [device.batch_share for device in again.devices] == [device.batch_share for device in before.devices]
    assert plan is not None and plan.to_json() + "\n" == Path(file).read_text()
    assert str(plan.program(0))


def test_a_saved_plan_is_costed_on_what_is_there_now(tmp_path: Path) -> None:
    """The same types at other speeds, and another batch: its shares stay, its time does not."""
    before, file = saved(tmp_path, "mlp", replicate=2, shares=(2.0, 1.0))
    asked = Request(f"{tmp_path}/train.py:mlp", "1xcpu + 1xcpu*0.01", rows=36, plan=file)
    again, _ = run(asked, lambda _: None)
    assert [device.batch_share for device in again.devices] == [24, 12]
    assert again.step_time_s > 2 * before.step_time_s


REFUSED = {
    "another model": ({"target": "train.py:deeper"}, "the plan belongs to another model"),
    "another annotation": ({"target": "train.py:annotated"}, "the plan belongs to another model"),
    "fewer devices": ({"cluster": "1xcpu"}, "the plan is for 2 devices, the cluster has 1"),
    "other devices": ({"cluster": "2xT4"}, "device 0 of the plan is cpu, that of the cluster is T4"),
    "a degree": ({"split": 2}, "--split and --plan cannot both decide"),
    "shares": ({"shares": "equal"}, "--shares and --plan cannot both decide"),
    "no file": ({"plan": "nowhere"}, "the plan nowhere cannot be read"),
    "cut short": ({"plan": "short"}, "the plan cannot be read"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_plan_that_does_not_match_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    changed, told = REFUSED[reason]
    _, file = saved(tmp_path, "mlp", replicate=2)
    (tmp_path / "short").write_text(Path(file).read_text()[:100])
    monkeypatch.chdir(tmp_path)
    asked: dict[str, Any] = {"target": "train.py:mlp", "cluster": CLUSTER, "plan": file, **changed}
    with pytest.raises(PlanError, match=told):
        run(Request(**asked), lambda _: None)


def test_plan_takes_a_saved_plan(tmp_path: Path) -> None:
    _, file = saved(tmp_path, "mlp", replicate=2)
    model, example = _made(str(tmp_path), "mlp")
    assert whalepy.plan(model, CLUSTER, example, plan=file).to_json() + "\n" == Path(file).read_text()
    with pytest.raises(PlanError, match="device 0 of the plan is cpu"):
        whalepy.plan(_made(str(tmp_path), "mlp")[0], "2xT4", example, plan=file)
    with pytest.raises(PlanError, match="another model"):
        whalepy.plan(*_made(str(tmp_path), "deeper")[:1], CLUSTER, example, plan=file)
