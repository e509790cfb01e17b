"""`whalepy plan` as a user runs it: forecasts, files, and mistakes in one sentence."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.golden import Golden
from whalepy.cli import main
from whalepy.dryrun.targets import bundled
from whalepy.planner.plan import Plan

FACTORY = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.first = nn.Linear(width, 4 * width)
        self.second = nn.Linear(4 * width, 10)

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.second(self.first(x).relu()), labels)

@dataclass
class Rows:
    count: int = 16


def factory():
    return Model(), {"x": torch.randn(Rows().count, 64), "labels": torch.zeros(16, dtype=torch.long)}

class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(24))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x)).exp().log1p()
        return x.pow(2).mean()


def deep():
    return Deep(), {"x": torch.empty(16384, 1024)}


def huge():
    return Model(20000), {"x": torch.randn(16, 20000), "labels": torch.zeros(16, dtype=torch.long)}

def raises():
    raise ValueError("no data here")

def nothing():
    return 3

def three():
    return Model(), {}, 3

def quits():
    raise SystemExit(0)

def frozen():
    return Model().requires_grad_(False), {"x": torch.randn(16, 64), "labels": torch.zeros(16, dtype=torch.long)}

number = 3
"""
TINY = {"n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 16, "vocab_size": 32}
CONFIGS: dict[str, object] = {
    "tiny": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **TINY},
    "long": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **TINY, "n_positions": 20000, "n_embd": 64},
    "no_type": {},
    "no_class": {"model_type": "gpt2"},
    "odd_class": {"model_type": "gpt2", "architectures": [3]},
    "odd": {"model_type": "lama", "architectures": ["LlamaForCausalLM"]},
    "unbuildable": {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **TINY, "n_embd": -8},
}


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
    monkeypatch.setenv("COLUMNS", "100")

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
    (folder / "two.yaml").write_text("nodes: [{devices: [{type: T4, count: 2}]}, {devices: [{type: T4, count: 2}]}]")
    (folder / "minus.yaml").write_text("nodes: [{devices: [{type: T4, count: -2}]}]")
    (folder / "slow.yaml").write_text("nodes: [{devices: [{type: T4, count: 2}], link: {bandwidth: 0}}]")
    (folder / "small.yaml").write_text("nodes: [{devices: [{type: T4, count: 2, memory_gib: 3.5}]}]")
    (folder / "room.yaml").write_text("nodes: [{devices: [{type: T4, count: 2, memory_gib: 2.5}]}]")
    mixed = "{type: T4, count: 1, memory_gib: 2.5}, {type: V100-PCIE-16GB, count: 1, memory_gib: 3}"
    (folder / "mixed.yaml").write_text(f"nodes: [{{devices: [{mixed}]}}]")
    (folder / "cut.json").write_text('{"model_type": ')
    for name, content in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "fails.py").write_text("import nowhere")
    (folder / "ends.py").write_text("raise SystemExit(3)")
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


@pytest.mark.parametrize("forced", [(), ("--zero", "0", "--recompute", "none"), ("--microbatches", "1")])
def test_what_would_fit_does(place: Path, run: Callable[..., Done], forced: tuple[str, ...]) -> None:
    """The first way out, pasted behind the command, fits."""
    command = ("train.py:deep", "--cluster", "small.yaml", *forced, "--json", "f.json")
    done = run(*command)
    if done.returncode == 3:
        way = json.loads((place / "f.json").read_text())["ways_out"][0]
        done = run(*command, *shlex.split(way))
    assert done.returncode == 0, done.stdout
    assert forced == () or "not runnable" not in done.stdout or "zero" in done.stdout or "recompute" in done.stdout


# Clusters of which the memory of some devices is nearly full.
ROOM = {
    "all alike": ("train.py:deep", ("--cluster", "room.yaml", "--batch-size", "512")),
    "two types": ("train.py:deep", ("--cluster", "mixed.yaml", "--batch-size", "512")),
    "sequences": ("hf:long.json", ("--cluster", "room.yaml", "--seq-len", "64")),
    "sequences on two types": ("hf:long.json", ("--cluster", "mixed.yaml", "--seq-len", "64", "--batch-size", "12")),
    "in microbatches": ("hf:long.json", ("--cluster", "room.yaml", "--seq-len", "64", "--microbatches", "4")),
}


@pytest.mark.slow
@pytest.mark.parametrize(("target", "asked"), ROOM.values(), ids=ROOM)
def test_the_room_that_is_left_is_there(
    place: Path, run: Callable[..., Done], target: str, asked: tuple[str, ...]
) -> None:
    """Pasted back, either suggestion fits."""
    run(target, *asked, "--json", "room.json")
    told = json.loads((place / "room.json").read_text())
    assert told["verdict"] == "fits" and told["largest_batch"] > told["subject"]["rows"]
    grown = [("--batch-size", told["largest_batch"])]
    if told["subject"]["tokens"]:
        assert told["longest_sequence"] > told["subject"]["tokens"]
        grown.append(("--seq-len", told["longest_sequence"]))
    for option, value in grown:
        assert run(target, *asked, option, str(value), "--json", "grown.json").returncode == 0
        assert json.loads((place / "grown.json").read_text())["verdict"] != "no"


def test_forced_degrees_stay_forced(place: Path, run: Callable[..., Done]) -> None:
    done = run("train.py:factory", "--cluster", MIXED, "--split", "2", "--shares", "3:1", "--json", "-")
    told = json.loads(done.stdout)
    assert [device["batch_share"] for device in told["devices"]] == [12, 12, 4, 4]


def mistake(target: str = "train.py:factory", *options: str, cluster: str = MIXED) -> list[str]:
    return [target, "--cluster", cluster, *options]


def option(*options: str) -> list[str]:
    return mistake("train.py:factory", *options)


# what is wrong, the arguments, what the sentence says
MISTAKES = {
    "a device": (mistake(cluster="2xV1000"), "V1000"),
    "no device": (mistake(cluster="0xT4"), "0 is not a number of devices"),
    "less than no device": (mistake(cluster="-2xT4"), "-2 is not a number of devices"),
    "no speed": (mistake(cluster="2xT4*0"), "'0' is not a speed"),
    "no bandwidth": (mistake(cluster="2x2xT4 @ 0Gbit/s"), "'0Gbit/s' is not a bandwidth"),
    "a negative bandwidth": (mistake(cluster="2x2xT4 @ -3Gbit/s"), "'-3Gbit/s' is not a bandwidth"),
    "a missing link": (mistake(cluster="2x2xT4"), "several nodes, but no bandwidth between them"),
    "a missing link in a file": (mistake(cluster="two.yaml"), "several nodes, but no bandwidth between them"),
    "a negative figure in a file": (mistake(cluster="minus.yaml"), "nodes[0].devices[0].count is -2"),
    "a figure of zero in a file": (mistake(cluster="slow.yaml"), "nodes[0].link.bandwidth is 0"),
    "a cluster file": (mistake(cluster="broken.yaml"), "broken.yaml"),
    "an absent cluster file": (mistake(cluster="nowhere.yaml"), "cannot read the cluster file 'nowhere.yaml'"),
    "two vendors": (mistake(cluster="1x4090 + 1xMI100"), "AMD and NVIDIA devices cannot work in one cluster"),
    "an absent file": (mistake("nowhere.py:factory"), "there is no file nowhere.py"),
    "a file without its factory": (mistake("train.py"), "name a factory in it: train.py:factory"),
    "a configuration without hf:": (mistake("tiny.json"), "write hf:tiny.json"),
    "an absent configuration": (mistake("hf:nowhere.json"), "nowhere.json cannot be read: No such file"),
    "a factory": (mistake("train.py:factry"), "has no factory 'factry'"),
    "a factory that is a number": (mistake("train.py:number"), "has no factory 'number'"),
    "a factory that raises": (mistake("train.py:raises"), "raised ValueError: no data here"),
    "a factory that ends the program": (mistake("train.py:quits"), "raised SystemExit: 0"),
    "a factory that returns something else": (mistake("train.py:nothing"), "returned int"),
    "a factory that returns three": (mistake("train.py:three"), "returned (Model, dict, int)"),
    "nothing to train": (mistake("train.py:frozen"), "Model has no parameter that is trained"),
    "a file that cannot be imported": (mistake("fails.py:factory"), "cannot be imported"),
    "a file that ends the program": (mistake("ends.py:factory"), "cannot be imported: SystemExit: 3"),
    "a module": (mistake("nowhere:factory"), "cannot be imported"),
    "a name": (mistake("gpt3"), "no bundled configuration"),
    "a configuration without a type": (mistake("hf:no_type.json"), "has no model_type"),
    "a configuration without a class": (mistake("hf:no_class.json"), "names no architecture"),
    "a class that is a number": (mistake("hf:odd_class.json"), "names no architecture"),
    "a configuration cut short": (mistake("hf:cut.json"), "is no JSON"),
    "an architecture": (mistake("hf:odd.json"), "knows no architecture 'lama'"),
    "a model that cannot be built": (mistake("hf:unbuildable.json"), "unbuildable: GPT2LMHeadModel cannot be built"),
    "a long sequence": (mistake("hf:tiny.json", "--seq-len", "17"), "longer than the 16 positions of the model"),
    "a negative length": (mistake("hf:tiny.json", "--seq-len", "-4"), "--seq-len must be at least 1, not -4"),
    "a length for a factory": (option("--seq-len", "4"), "--seq-len needs a configuration"),
    "no rows": (option("--batch-size", "0"), "--batch-size must be at least 1"),
    "far too many rows": (option("--batch-size", "99999999999"), "--batch-size must be at most 1,000,000"),
    "rows that are no number": (option("--batch-size", "x"), "--batch-size"),
    "a degree": (option("--split", "3"), "cannot be met on 4 devices"),
    "degrees": (option("--replicate", "2", "--split", "4"), "degrees 2 x 4 cannot be met on 4 devices"),
    "no microbatch": (option("--microbatches", "0"), "--microbatches must be at least 1"),
    "more microbatches than rows": (option("--microbatches", "17"), "17 microbatches cannot be cut from 16 rows"),
    "fewer rows than replicas": (option("--batch-size", "1", "--replicate", "4"), "1 rows, too few for 4 replicas"),
    "shares": (option("--shares", "3:x"), "is not a list of shares"),
    "a negative share": (option("--shares", "3:-1"), "is not a weight"),
    "too few shares": (option("--shares", "3:1:1"), "3 shares for 4 replicas"),
    "a balance": (option("--balance", "even"), "choose exact, whale, equal"),
    "a balance and shares": (option("--balance", "whale", "--shares", "3:1"), "--shares cannot both decide"),
    "a precision": (option("--precision", "fp12"), "--precision fp12 is not known"),
    "bfloat16": (option("--precision", "bf16"), "has no bfloat16 units"),
    "bfloat16 on a gaming card": (
        mistake("train.py:factory", "--precision", "bf16", cluster="2x2080Ti"),
        "RTX-2080-Ti",
    ),
    "an optimizer": (option("--optimizer", "adamv"), "no optimizer 'adamv'"),
    "recomputation": (option("--recompute", "some"), "--recompute some is not known"),
    "a stage of ZeRO": (option("--zero", "7"), "--zero must be 0, 1, 2 or 3, not 7"),
    "stages": (option("--stages", "3"), "--stages 3, but Model has 2 blocks to cut between: first, second"),
    "no stages": (option("--stages", "0"), "--stages must be at least 1, not 0"),
    "degrees of stages": (
        option("--stages", "2", "--replicate", "3"),
        "stages and degrees 2 x 3 cannot be met on 4 devices",
    ),
    "shares of stages": (option("--stages", "2", "--shares", "2:1:1"), "3 shares for 2 replicas"),
    "widths of too many": (option("--widths", "4,1x2"), "--widths 4,1x2 needs 6 devices, 4 are there"),
    "widths and stages": (option("--widths", "2,2", "--stages", "2"), "--widths and --stages cannot both decide"),
    "widths of one stage": (option("--widths", "4"), "--widths '4' is one stage"),
    "no width": (option("--widths", "2,x2"), "--widths '2,x2': 'x2' is no width"),
    "no width of a card": (option("--widths", "2,0"), "--widths '2,0': '0' is no width"),
    "a multiple of chunks": (
        option("--stages", "2", "--schedule", "interleaved:3"),
        "--schedule interleaved:3 wants a multiple of 3 stages, not 2",
    ),
    "stages with ZeRO 2": (option("--stages", "2", "--zero", "2"), "--zero 2 with stages is not there yet"),
    "a schedule": (option("--schedule", "1f1b"), "--schedule 1f1b is for stages, of which there are none"),
    "an unknown schedule": (option("--stages", "2", "--schedule", "2f2b"), "there is no schedule '2f2b'"),
    "a folder that is not there": (option("--json", "nowhere/f.json"), "there is no folder nowhere"),
    "a folder as a file": (option("--save", "."), "it is a folder"),
    "two things printed": (option("--json", "-", "--program", "0"), "--program and --json - both print"),
    "a rank": (option("--program", "4"), "there is no rank 4"),
}


@pytest.mark.parametrize(("arguments", "told"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_a_sentence(run: Callable[..., Done], arguments: list[str], told: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr
    assert re.match(r"whalepy: |Usage: ", done.stderr.splitlines()[0]), done.stderr
    assert not done.stdout and "  at:  main.py" not in done.stderr


IN_STAGES = ("train.py:deep", "--cluster", "4xT4", "--stages", "4", "--microbatches", "8")


def test_a_pipeline_is_forecast(run: Callable[..., Done], golden: Golden) -> None:
    done = run(*IN_STAGES)
    assert done.returncode == 0
    golden("plan_pipeline", done.stdout.rstrip())


def test_a_pipeline_in_every_form(run: Callable[..., Done], place: Path) -> None:
    files = ("--json", "p.json", "--trace", "p.trace", "--html", "p.html", "--save", "p.plan")
    done = run(*IN_STAGES, "--schedule", "gpipe", *files, "--program", "2")
    assert re.search(r"actions of a step: 2RECV_F0<1 .*2F7 .*2B0 .*2REDUCE", done.stdout)
    assert "stage 2 of 4" in done.stdout
    found = json.loads((place / "p.json").read_text())
    assert (found["schedule"], found["microbatches"]) == ("gpipe", 8)
    assert [stage["ranks"] for stage in found["stages"]] == [[0], [1], [2], [3]]
    assert [stage["devices"] for stage in found["stages"]] == [["T4"]] * 4
    assert sum(stage["parameters"] for stage in found["stages"]) == found["subject"]["parameters"]
    assert all(stage["forward_s"] < stage["backward_s"] for stage in found["stages"])
    assert [device["peak_memory_bytes"] for device in found["devices"]] == [
        stage["peak_memory_bytes"] for stage in found["stages"]
    ]
    assert sum(found["breakdown"][part] for part in PARTS) == pytest.approx(found["step_time_s"])
    events = json.loads((place / "p.trace").read_text())["traceEvents"]
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert {f"{k}{op}{m}" for k in range(4) for op in "FB" for m in range(8)} <= names
    assert {f"{k}SEND_F{m}>{k + 1}" for k in range(3) for m in range(8)} <= names
    assert "4 stages, gpipe, 8 microbatches" in (place / "p.html").read_text()
    saved = Plan.from_json((place / "p.plan").read_text())
    assert (len(saved.stages), saved.schedule, saved.microbatches) == (4, "gpipe", 8)


PARTS = ("compute_s", "bubble_s", "bridge_s", "gradient_s")


def test_fewer_rows_than_devices(run: Callable[..., Done]) -> None:
    done = run("train.py:factory", "--cluster", "2xT4", "--batch-size", "1")
    assert done.returncode == 0 and "1 x T4 alone" in done.stdout
    assert "idle: device 1 (1 x T4), for want of rows in the batch" in done.stdout


def test_the_files_are_checked_before_the_model_is_built(run: Callable[..., Done]) -> None:
    done = run("nowhere.py:factory", "--cluster", MIXED, "--html", "nowhere/f.html")
    assert "nowhere/f.html cannot be written" in done.stderr


def test_a_mistake_leaves_no_progress_on_the_line(run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    done = run("train.py:raises", "--cluster", MIXED)
    assert "building the model" in done.stderr
    assert done.stderr.rpartition("\x1b[2K")[2].startswith("whalepy: ")


def test_top_is_how_many_plans_are_printed(run: Callable[..., Done]) -> None:
    done = run("train.py:factory", "--cluster", MIXED, "--top", "1")
    assert re.search(r"and \d+ more, in --json", done.stdout)
    assert done.stdout.count("slower") == 0


def test_help_names_every_bundled_model(run: Callable[..., Done]) -> None:
    shown = " ".join(run("--help").stdout.replace("│", " ").split())
    assert all(name in shown for name in bundled())
    assert "exits with 0 if it fits" in shown.lower()
