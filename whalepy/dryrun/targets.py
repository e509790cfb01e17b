"""What `whalepy plan` is asked about: a factory of the user's, a configuration file, or a bundled configuration."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from whalepy.errors import PlanError, WhaleError
from whalepy.hardware.near import did_you_mean

DEFAULT_ROWS, DEFAULT_LENGTH = 8, 512


@dataclass(frozen=True)
class Target:
    """A model, on the meta device where it can be built there, with one global batch."""

    name: str
    model: nn.Module
    example: Any
    tokens: int | None
    """Ids per row; None where no input is a sequence of ids."""


def bundled() -> tuple[str, ...]:
    """Names of the configurations that come with whalepy."""
    files = resources.files("whalepy") / "configs"
    return tuple(sorted(file.name.removesuffix(".json") for file in files.iterdir() if file.name.endswith(".json")))


def target_of(text: str, rows: int | None, length: int | None) -> Target:
    """The model that `file.py:factory`, `module:factory`, `hf:config.json` or a bundled name stands for.

    Raises PlanError for anything that is none of these, and for a factory that fails.
    """
    if text.startswith("hf:"):
        return _from_config(_read_config(Path(text.removeprefix("hf:"))), Path(text[3:]).stem, rows, length)
    if ":" in text:
        return _from_factory(text, rows, length)
    if text not in bundled():
        raise PlanError(f"{text!r} is no bundled configuration", fix=_instead(text))
    content = (resources.files("whalepy") / "configs" / f"{text}.json").read_text()
    return _from_config(json.loads(content), text, rows, length)


def _instead(text: str) -> str:
    """What the user may have meant: a factory in the file, the configuration in the file, or a name near this one."""
    if text.endswith(".py"):
        return f"name a factory in it: {text}:factory"
    if text.endswith(".json"):
        return f"write hf:{text}"
    return f"{did_you_mean(text, bundled())}; or write file.py:factory, module:factory, hf:config.json or layers:FILE"


# -- configurations ----------------------------------------------------------------------------------------------


def _read_config(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise PlanError(f"{path} is no JSON: {error}", fix="give the config.json of a transformers model") from error
    if not isinstance(found, dict) or "model_type" not in found:
        raise PlanError(f"{path} has no model_type", fix="give the config.json of a transformers model")
    return found


def _from_config(content: Mapping[str, Any], name: str, rows: int | None, length: int | None) -> Target:
    try:
        import transformers
    except ImportError as error:
        raise PlanError("configurations need transformers", fix="pip install 'whalepy[hf]'") from error
    transformers.logging.set_verbosity_error()
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    kind = str(content["model_type"])
    if kind not in known:
        raise PlanError(f"transformers knows no architecture {kind!r}", fix=did_you_mean(kind, list(known)))
    rest = {key: value for key, value in content.items() if key not in ("model_type", "transformers_version")}
    architecture = _architecture(content)
    if not hasattr(transformers, architecture):
        raise PlanError(f"transformers has no class {architecture!r}", fix=_NAME_THE_CLASS)
    try:
        config = transformers.AutoConfig.for_model(kind, **rest)
        with torch.device("meta"):
            model = getattr(transformers, architecture)(config)
    except Exception as error:
        raise PlanError(f"{name}: {architecture} cannot be built: {_sentence(error)}") from error
    example, tokens = _example_of(model, config, rows or DEFAULT_ROWS, length)
    return Target(architecture, model, example, tokens)


_NAME_THE_CLASS = 'name the class of the model in the configuration: "architectures": ["LlamaForCausalLM"]'


def _architecture(content: Mapping[str, Any]) -> str:
    named = content.get("architectures")
    if not isinstance(named, list) or not named or not isinstance(named[0], str):
        raise PlanError("the configuration names no architecture", fix=_NAME_THE_CLASS)
    return named[0]


def _example_of(model: nn.Module, config: Any, rows: int, length: int | None) -> tuple[dict[str, Any], int | None]:
    """A batch of the kind of input that the model's main input names."""
    main = getattr(model, "main_input_name", "input_ids")
    with torch.device("meta"):
        if main == "pixel_values":
            size = getattr(config, "image_size", 224)
            shape = (size, size) if isinstance(size, int) else tuple(size)
            pixels = torch.empty(rows, getattr(config, "num_channels", 3), *shape)
            return {"pixel_values": pixels, "labels": torch.zeros(rows, dtype=torch.long)}, None
        if main != "input_ids":
            raise PlanError(f"no batch is known for a model that reads {main}", fix="write a factory: file.py:factory")
        longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        length = length or min(DEFAULT_LENGTH, longest or DEFAULT_LENGTH)
        if isinstance(longest, int) and length > longest:
            raise PlanError(f"--seq-len {length} is longer than the {longest} positions of the model")
        ids = torch.zeros(rows, length, dtype=torch.long)
        return {"input_ids": ids, "labels": torch.zeros(rows, length, dtype=torch.long)}, length


# -- factories ---------------------------------------------------------------------------------------------------


def _from_factory(text: str, rows: int | None, length: int | None) -> Target:
    if length is not None:
        raise PlanError("--seq-len needs a configuration", fix="let the factory return inputs of the length you want")
    factory = _factory(text)
    try:
        made = _called(factory)
    except WhaleError:
        raise
    except (Exception, SystemExit) as error:
        raise PlanError(f"{text} raised {type(error).__name__}: {_sentence(error)}") from error
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise PlanError(f"{text} returned {_kind(made)}", fix="a factory returns (model, example_inputs)")
    model, example = made
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PlanError(f"{type(model).__name__} has no parameter that is trained", fix="leave some unfrozen")
    ids = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, torch.Tensor) and _is_sequence(leaf)]
    return Target(type(model).__name__, model, example, int(ids[0].shape[1]) if ids else None)


def _kind(made: Any) -> str:
    """`int`, `(Model, dict, int)`."""
    return f"({', '.join(map(_kind, made))})" if type(made) is tuple else type(made).__name__


def _is_sequence(leaf: torch.Tensor) -> bool:
    return leaf.ndim == 2 and not leaf.dtype.is_floating_point and leaf.dtype is not torch.bool


def _called(factory: Callable[[], Any]) -> Any:
    """On the meta device, unless the factory needs values."""
    try:
        with torch.device("meta"):
            return factory()
    except (NotImplementedError, RuntimeError) as error:
        if "meta" not in str(error):
            raise
        return factory()


def _factory(text: str) -> Callable[[], Any]:
    place, _, name = text.rpartition(":")
    module = _module_of_file(Path(place)) if place.endswith(".py") else _module(place)
    factory = getattr(module, name, None)
    if not callable(factory):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise PlanError(f"{place} has no factory {name!r}", fix=did_you_mean(name, names) if names else None)
    return factory


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise PlanError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        with _known_as(path.stem, module):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise PlanError(f"{path} cannot be imported: {type(error).__name__}: {_sentence(error)}") from error
    return module


@contextmanager
def _known_as(name: str, module: Any) -> Generator[None]:
    """Found among the modules while it is imported: its dataclasses look there for what their annotations name."""
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        sys.modules.pop(name, None)
        if before is not None:
            sys.modules[name] = before


def _module(name: str) -> Any:
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise PlanError(f"module {name!r} cannot be imported: {_sentence(error)}") from error


def _sentence(error: BaseException) -> str:
    """What an exception says in one line of at most so many characters: the first lines alone often say nothing."""
    said = " ".join(str(error).split()) or repr(error)
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]} ..."


_LONGEST = 300
