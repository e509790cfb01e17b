"""`whalepy plan` as a user runs it: forecasts, files, and mistakes in one sentence."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from whalepy.cli import main

FACTORY = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.first = nn.Linear(width, 4 * width)
        self.second = nn.Linear(4 * width, 10)

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.second(self.first(x).relu()), labels)

def factory():
    return Model(), {"x": torch.randn(16, 64), "labels": torch.zeros(16, dtype=torch.long)}

def huge():
    return Model(20000), {"x": torch.randn(16, 20000), "labels": torch.zeros(16, dtype=torch.long)}

def raises():
    raise ValueError("no data here")

def nothing():
    return 3

number = 3
"""


@dataclass
class Done:
    """What a command left: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the command in this process, in the folder of the factories."""
    monkeypatch.chdir(place)

    def of(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["whalepy", "plan", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
            sys.exit(0)
        out, err = capsys.readouterr()
        return Done(ended.value.code if isinstance(ended.value.code, int) else 0, out, err)

    return of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    (folder / "train.py").write_text(FACTORY)
    (folder / "broken.yaml").write_text("nodes: [")
    (folder / "no_type.json").write_text("{}")
    (folder / "cut.json").write_text('{"model_type": ')
    (folder / "odd.json").write_text('{"model_type": "lama", "architectures": ["LlamaForCausalLM"]}')
    (folder / "fails.py").write_text("import nowhere")
    return folder


MIXED = "2xV100-SXM2-16GB + 2xP100-PCIE-16GB"


def test_a_forecast_in_words_and_as_json(place: Path, run: Callable[..., Done]) -> None:
    done = run(
        "train.py:factory",
        "--cluster",
        MIXED,
        "--replicate",
        "4",
        "--batch-size",
        "64",
        "--json",
        "f.json",
        "--save",
        "p",
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((place / "f.json").read_text())
    assert told["verdict"] == "fits" and told["fits"] is True
    assert sum(device["batch_share"] for device in told["devices"]) == 64
    assert told["step_time_s"] <= told["equal_shares_step_time_s"]
    assert all(device["peak_memory_bytes"] > 0 and device["busy_s"] > 0 for device in told["devices"])
    assert sum(
        told["breakdown"][part] for part in ("compute_s", "bubble_s", "bridge_s", "gradient_s")
    ) == pytest.approx(told["step_time_s"])
    assert "FITS" in done.stdout and "V100-SXM2-16GB" in done.stdout
    assert json.loads((place / "p").read_text())["annotation"]


def test_the_same_question_has_the_same_answer(place: Path, run: Callable[..., Done]) -> None:
    first, second = (run("train.py:factory", "--cluster", MIXED, "--json", "-") for _ in range(2))
    assert first.stdout == second.stdout and first.returncode == 0


def test_nothing_fits(place: Path, run: Callable[..., Done]) -> None:
    done = run("train.py:huge", "--cluster", "2xK80", "--json", "f.json")
    assert done.returncode == 3, done.stderr
    told = json.loads((place / "f.json").read_text())
    assert told["verdict"] == "no" and told["step_time_s"] > 0


def test_forced_degrees_stay_forced(place: Path, run: Callable[..., Done]) -> None:
    done = run("train.py:factory", "--cluster", MIXED, "--split", "2", "--shares", "3:1", "--json", "-")
    told = json.loads(done.stdout)
    assert [device["batch_share"] for device in told["devices"]] == [12, 12, 4, 4]


# what is wrong, the arguments, what the sentence says
MISTAKES = {
    "a device": (["train.py:factory", "--cluster", "2xV1000"], "V1000"),
    "a cluster file": (["train.py:factory", "--cluster", "broken.yaml"], "broken.yaml"),
    "an absent file": (["nowhere.py:factory", "--cluster", MIXED], "there is no file nowhere.py"),
    "a factory": (["train.py:factry", "--cluster", MIXED], "has no factory 'factry'"),
    "a factory that is a number": (["train.py:number", "--cluster", MIXED], "has no factory 'number'"),
    "a factory that raises": (["train.py:raises", "--cluster", MIXED], "raised ValueError: no data here"),
    "a factory that returns something else": (["train.py:nothing", "--cluster", MIXED], "returned int"),
    "a file that cannot be imported": (["fails.py:factory", "--cluster", MIXED], "cannot be imported"),
    "a module": (["nowhere:factory", "--cluster", MIXED], "cannot be imported"),
    "a name": (["gpt3", "--cluster", MIXED], "no bundled configuration"),
    "a configuration without a type": (["hf:no_type.json", "--cluster", MIXED], "has no model_type"),
    "a configuration cut short": (["hf:cut.json", "--cluster", MIXED], "is no JSON"),
    "an architecture": (["hf:odd.json", "--cluster", MIXED], "knows no architecture 'lama'"),
    "no rows": (["train.py:factory", "--cluster", MIXED, "--batch-size", "0"], "--batch-size must be at least 1"),
    "a degree": (["train.py:factory", "--cluster", MIXED, "--split", "3"], "cannot be met on 4 devices"),
    "shares": (["train.py:factory", "--cluster", MIXED, "--shares", "3:x"], "is not a list of shares"),
    "too few shares": (["train.py:factory", "--cluster", MIXED, "--shares", "3:1"], "2 shares for 4 replicas"),
    "a precision": (["train.py:factory", "--cluster", MIXED, "--precision", "fp12"], "--precision fp12 is not known"),
    "bfloat16": (["train.py:factory", "--cluster", MIXED, "--precision", "bf16"], "has no bfloat16 units"),
    "an optimizer": (["train.py:factory", "--cluster", MIXED, "--optimizer", "adamv"], "no optimizer 'adamv'"),
    "stages": (["train.py:factory", "--cluster", MIXED, "--stages", "2"], "--stages 2 is not there yet"),
}


@pytest.mark.parametrize(("arguments", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_a_sentence(run: Callable[..., Done], arguments: list[str], told: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr
    assert re.match(r"whalepy: ", done.stderr.splitlines()[0]), done.stderr
