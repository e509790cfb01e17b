"""Where nothing fits, the first suggestion of `whalepy plan`, pasted behind the command, does."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.commands.run import run

# What is short of memory, and why.
QUICK = {
    "layers on fewer cards than hold them": "layers:examples/m6-100b.yaml --cluster 8xV100-SXM2-32GB --batch-size 64",
    "state of one card": "layers:examples/opt-350m.yaml --cluster 1xRTX-3090 --batch-size 64 --microbatches 1 --zero 0",
}
SLOW = {
    "nothing but more cards or plain descent": "llama-3.2-1b --cluster 1xT4 --batch-size 4",
    "state of replicas": "llama-3.2-1b --cluster 4xT4 --replicate 4 --batch-size 8 --zero 0 --recompute none",
    "state of replicas where all is recomputed": "gpt2-xl --cluster 2xT4 --replicate 2 --batch-size 4 --recompute full",
    "state of replicas that may be split": "gpt2-xl --cluster 2xT4 --batch-size 4 --zero 0",
    "images": "resnet-50 --cluster 1xT4 --batch-size 2048 --recompute none --microbatches 1",
    "patches": "vit-base --cluster 2xRTX-2080-Ti --batch-size 512 --microbatches 1 --recompute none",
    "shares by rates": "gpt2 --cluster '1xP100-PCIE-16GB + 1xT4' --batch-size 128 --balance whale --zero 0 "
    "--recompute none --microbatches 1",
    "equal shares of two types": "gpt2-medium --cluster '1xA100-SXM4-40GB + 1xT4' --batch-size 48 --balance equal "
    "--microbatches 1 --recompute none",
    "a forced split": "gpt2-medium --cluster 4x2080Ti --split 4 --batch-size 128 --microbatches 1 --recompute none",
    "forced replicas": "bert-large --cluster 4xT4 --replicate 4 --batch-size 256 --microbatches 1 --recompute none",
    "stages of one card each": "gpt2-xl --cluster 2xRTX-3080 --stages 2 --batch-size 16 --recompute none",
    "stages and replicas": "bert-large --cluster 4xRTX-3080 --stages 2 --replicate 2 --batch-size 128 --microbatches 2 "
    "--recompute none",
    "encoder and decoder": "t5-large --cluster 2x2080Ti --batch-size 32 --microbatches 1 --recompute none --zero 0",
    "half precision": "llama-3.1-8b --cluster 8xV100-SXM2-32GB --precision fp16 --batch-size 16 --replicate 8 --zero 0",
    "two nodes": "gpt2-xl --cluster '2x1xT4 @ 10Gbit/s' --batch-size 8 --zero 0 --recompute none",
    "activations of one card": "gpt2 --cluster 1xK80 --batch-size 64 --seq-len 256 --recompute none --microbatches 1",
    "one type of two": "gpt2 --cluster '1xRTX-3090 + 1xK80' --batch-size 64 --shares 1:1 --microbatches 1",
    "stages": "gpt2 --cluster 2xK80 --stages 2 --schedule gpipe --batch-size 96 --microbatches 2 --recompute none",
}


def planned(monkeypatch: pytest.MonkeyPatch, folder: Path, arguments: list[str]) -> tuple[int, dict[str, Any]]:
    """The exit code of the command, and what it says."""
    out = folder / "forecast.json"
    out.unlink(missing_ok=True)
    code = run(monkeypatch, "plan", *arguments, "--json", str(out))
    return code, json.loads(out.read_text()) if out.exists() else {}


def holds(monkeypatch: pytest.MonkeyPatch, folder: Path, command: str) -> None:
    arguments = shlex.split(command)
    code, told = planned(monkeypatch, folder, arguments)
    assert code == 3 and told["verdict"] == "no"
    way = told["ways_out"][0]
    code, told = planned(monkeypatch, folder, [*arguments, *shlex.split(way)])
    assert code == 0 and told["fits"], way


@pytest.mark.parametrize("command", QUICK.values(), ids=QUICK)
def test_the_first_suggestion_fits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str) -> None:
    holds(monkeypatch, tmp_path, command)


ANNOTATED = """
import torch, whalepy

class Deep(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(*(torch.nn.Linear(4096, 4096) for _ in range(120)))

    def forward(self, x, y):
        return (self.body(x) - y).square().mean()

def of(levels):
    model = Deep()
    whalepy.annotate(model, {"": levels})
    return model, (torch.randn(8, 4096), torch.randn(8, 4096))

def replicas():
    return of(whalepy.replicate())

def parts():
    return of(whalepy.split())

def both():
    return of([whalepy.replicate(), whalepy.split(2)])
"""


@pytest.mark.parametrize("factory", ["replicas", "parts", "both"])
def test_the_first_suggestion_for_an_annotated_model_fits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, factory: str
) -> None:
    file = tmp_path / "annotated.py"
    file.write_text(ANNOTATED)
    holds(monkeypatch, tmp_path, f"{file}:{factory} --cluster 2xRTX-2080-Ti --batch-size 8 --zero 0 --recompute none")


@pytest.mark.slow
@pytest.mark.parametrize("command", SLOW.values(), ids=SLOW)
def test_the_first_suggestion_fits_for_larger_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: str
) -> None:
    holds(monkeypatch, tmp_path, command)
