"""What a reader tries first: the Python of README and docs/architecture.md, the template, and the demo."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import whalepy
from tests import documents
from tests.golden import Golden
from tests.pool import Pool
from whalepy.dryrun.blocks import folded
from whalepy.dryrun.staged import Staged, tried_in_stages
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options
from whalepy.runtime.build import Recipe

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"


def check(path: Path, printed: list[str], golden: Golden) -> None:
    documents.compare(path, printed, update=golden.update)
    if golden.update:
        pytest.skip(f"{path.name} is written: read the difference")


def test_readme(workers: Pool, golden: Golden) -> None:
    """The example prints what README says, on two ranks; what follows it runs."""
    sources = [(example.source, 0) for example in documents.examples(README.read_text())]
    assert len(sources) == 2
    printed = workers.run(2, documents.run, sources, "train.py", default_group=False)
    assert printed[1] == ["", ""]
    check(README, printed[0], golden)


def test_readme_cluster_specs() -> None:
    lines = re.search(r"between nodes:\n\n```text\n(.*?)```", README.read_text(), re.DOTALL)
    assert lines is not None
    devices = [len(whalepy.ClusterSpec.load(line).devices) for line in lines[1].splitlines()]
    assert devices == [4, 16, 128, 4]


def test_architecture(golden: Golden) -> None:
    sources = [(example.source, 0) for example in documents.examples(ARCHITECTURE.read_text())]
    assert sources
    check(ARCHITECTURE, documents.run(sources, "mlp.py"), golden)


def template() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_gpt2", ROOT / "examples" / "train_gpt2.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def losses_on_ranks(source: str, steps: int) -> list[float]:
    namespace: dict[str, object] = {"__name__": "train_gpt2"}
    exec(compile(source, "train_gpt2.py", "exec"), namespace)
    losses: list[float] = []
    namespace["train"](namespace["compiled"](), steps, lambda step, loss: losses.append(loss))  # type: ignore[operator]
    return losses


def test_the_template_trains(workers: Pool) -> None:
    """Every rank is told the loss of the global batch, and it is the local model's."""
    source = (ROOT / "examples" / "train_gpt2.py").read_text()
    losses = workers.run(4, losses_on_ranks, source, 2, default_group=False)
    module = template()
    first = module.small_gpt2()(**next(module.batches(1))).loss.item()
    assert losses[0] == losses[1] == losses[2] == losses[3]
    assert losses[0][0] == pytest.approx(first, rel=1e-6)
    assert losses[0][1] < losses[0][0]


@pytest.mark.slow
def test_the_demo_runs_to_the_end() -> None:
    """It exits with 0 only where the largest difference is within the tolerance."""
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), "--steps", "3"]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "Equal up to rounding." in shown.stdout


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("demo")


def test_the_demo_fails_on_a_difference(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    start = demo.small_gpt2().state_dict()
    alone = {name: value + 1.0 for name, value in start.items()}
    near = {name: value + 1e-6 for name, value in alone.items()}
    wrong = {**alone, "transformer.wte.weight": alone["transformer.wte.weight"] + 1e-4}
    assert demo.report(near, alone, alone) == 0
    assert demo.report(wrong, alone, alone) == 1
    assert "More than rounding" in capsys.readouterr().out


def test_the_demo_refuses_no_steps(
    demo: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["demo.py", "--steps", "0"])
    with pytest.raises(SystemExit, match=r"^2$"):
        demo.main()
    assert capsys.readouterr().err.endswith("error: --steps must be at least 1\n")


@pytest.fixture
def m6(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("m6")


def test_m6_has_ten_billion_parameters(m6: ModuleType) -> None:
    with torch.device("meta"):
        model, _ = m6.annotated()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(10e9, rel=0.02)


def test_m6_is_planned_in_stages_on_replicas(m6: ModuleType) -> None:
    """Two layers each way, in four stages on eight devices: two copies, each stage computes on one device of each."""
    sizes = m6.Sizes(layers=2, width=32, heads=2, words=64, tokens=8)
    with torch.device("meta"):
        model, batch = m6.annotated(sizes, 4)
    spec = whalepy.ClusterSpec.load("2x4xV100-SXM2-32GB @ 50Gbit/s")
    with folded(model, fold=False) as blocks:
        study = Study.of(Recipe(model), batch, "adamw", blocks).with_rows(2 * m6.MICROBATCHES)
        tried = tried_in_stages(study, spec, Options(microbatches=m6.MICROBATCHES, recompute="full"), Staged())
    assert tried.rows == (m6.MICROBATCHES,) * 2 and tried.verdict == "fits"
    assert [len(stage.rank_of) for stage in tried.candidate.plan.stages] == [2] * 4


@pytest.mark.parametrize(
    ("file", "parameters", "verdict"),
    [("m6-100b.yaml", 1e11, "fits"), ("m6-1t.yaml", 1e12, "tight"), ("m6-10t.yaml", 1e13, "no")],
)
def test_m6_mixtures(m6: ModuleType, file: str, parameters: float, verdict: str) -> None:
    """The largest one was trained with its parameters in the memory of the hosts."""
    nodes, optimizer = next((nodes, optimizer) for name, nodes, optimizer, _ in m6.MIXTURES if name == file)
    found = m6.mixture(file, nodes, optimizer)
    assert found.subject.parameters == pytest.approx(parameters, rel=0.04)
    assert found.verdict == verdict and len(found.devices) == 8 * nodes
