"""Layer files: what they say, and one sentence for each mistake in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from whalepy.errors import PlanError
from whalepy.hardware.layer_profile import LayerFile, read_layers
from whalepy.hardware.profiles import profile

SECONDS = {"rows": [1, 2], "forward_s": [1, 2], "backward_s": [1, 2]}


def written(folder: Path, content: Any) -> Path:
    path = folder / "layers.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_the_example() -> None:
    file = read_layers(Path("examples/opt-350m.yaml"))
    assert file.parameters == 53608448 + 24 * 12596224 + 51513344
    assert [layer.repeat for layer in file.layers] == [1, 1, 23, 1]
    measured = file.layers[2].seconds_on(profile("GH200"), 4)
    assert measured is not None and measured.forward_s[measured.rows.index(8)] == 0.002683


def test_figures_by_split_degree() -> None:
    layer = LayerFile.model_validate(
        {"name": "m", "layers": [{"name": "l", "bytes": 1, "parameters": 8, "saved_bytes": {1: 5, 4: 2}}]}
    ).layers[0]
    assert [layer.on(layer.parameters, split) for split in (1, 2, 4)] == [8, 4, 2]  # the whole, in equal parts
    assert [layer.on(layer.saved_bytes, split) for split in (1, 2, 4)] == [5, None, 2]  # as the file says


def test_a_type_stands_for_those_that_refine_it() -> None:
    file = {"name": "m", "layers": [{"name": "l", "seconds": {"3090": {1: SECONDS}}}]}
    layer = LayerFile.model_validate(file).layers[0]
    assert list(layer.seconds) == ["RTX-3090"]  # any spelling


def of(**layer: Any) -> dict[str, Any]:
    return {"name": "m", "layers": [{"name": "l", **layer}]}


def timed(**more: Any) -> dict[str, Any]:
    return of(seconds={"T4": {1: {**SECONDS, **more}}})


MISTAKES: list[tuple[Any, str, str]] = [
    ({"name": "m"}, "layers is missing", "add `layers:`"),
    ({"name": "m", "layers": []}, "layers is []", "list at least one"),
    (None, "the layer file is None", "write it as a table of fields"),
    (of(), "layers[0] is {'name': 'l'}", "say what it costs: `seconds:` by type of device, or `flops:` and `bytes:`"),
    (of(flops=1), "layers[0] is {'flops': 1, 'name': 'l'}",
     "say what it costs: `seconds:` by type of device, or `flops:` and `bytes:`"),  # FLOPs alone leave out the rest
    (of(bytes=-1), "layers[0].bytes is -1", "write a figure of at least 0"),
    (of(bytes=True), "layers[0].bytes is True", "write a figure"),  # YAML reads `yes` so
    (of(bytes={}), "layers[0].bytes is {}", "list at least one"),
    (of(bytes=1, repeat=0), "layers[0].repeat is 0", "write a figure of at least 1"),
    (of(bytes=1, save_bytes=1), "layers[0].save_bytes is not a known field", "did you mean saved_bytes or bytes?"),
    (of(bytes=1, parameters="many"), "layers[0].parameters is 'many'", "write a figure"),
    (of(bytes=1, exchanges=[{"kind": "send", "bytes": 1}]), "layers[0].exchanges[0].kind is 'send'",
     "write 'all-reduce', 'all-gather', 'reduce-scatter' or 'all-to-all'"),
    (of(seconds={"T5": {1: SECONDS}}), "layers[0].seconds.T5 is 'T5'",
     "`whalepy devices` lists the known types; others go under `profiles:` in a cluster file"),
    (timed(backward_s=[1]), "layers[0].seconds.T4[1] is {'backward_s': [1], 'forward_s': [1, 2], 'rows': [1, 2]}",
     "give `forward_s` and `backward_s` one figure for each number of `rows`"),
    (timed(rows=[2, 1]), "layers[0].seconds.T4[1] is {'backward_s': [1, 2], 'forward_s': [1, 2], 'rows': [2, 1]}",
     "list `rows` in ascending order, each number once"),
    (timed(row=1), "layers[0].seconds.T4[1].row is not a known field", "did you mean rows?"),
    ({**of(bytes=1), "dtype": "fp31"}, "dtype is 'fp31'", "did you mean fp32 or fp16?"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "what", "fix"), MISTAKES, ids=range(len(MISTAKES)))
def test_mistakes(tmp_path: Path, content: Any, what: str, fix: str) -> None:
    path = written(tmp_path, content)
    with pytest.raises(PlanError) as error:
        read_layers(path)
    assert str(error.value) == f"{what}\n  at:  {path}\n  fix: {fix}"


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as absent:
        read_layers(tmp_path / "no.yaml")
    assert str(absent.value) == (
        f"cannot read the layer file '{tmp_path / 'no.yaml'}': No such file or directory\n"
        "  fix: give the path of a YAML or JSON file: layers:FILE"
    )
    with pytest.raises(PlanError) as broken:
        read_layers(written(tmp_path, "layers: [\n"))
    assert broken.value.what.startswith("broken YAML")
