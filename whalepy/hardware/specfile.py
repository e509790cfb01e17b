"""How a cluster is read: YAML or JSON, a dict, or one line; checked field by field (`entries`)."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from whalepy.errors import ClusterError
from whalepy.hardware.entries import DeviceEntry, LinkEntry, NodeEntry, ProfileEntry, SpecFile
from whalepy.hardware.near import did_you_mean
from whalepy.hardware.shorthand import parse_shorthand

SUFFIXES = (".yaml", ".yml", ".json")
"""A name that ends so is that of a file."""


def read_spec(source: object) -> tuple[SpecFile, str | None]:
    """The checked content of a path, a dict or the one-line form, and the file it came from, if any.

    Text that names a file or a folder (one exists, or it ends in .yaml, .yml or .json) is a path. Raises ClusterError
    with the field, the value given, the fix, and the file and line where there is one.
    """
    if isinstance(source, Mapping):
        return _check(source), None
    if not isinstance(source, str | os.PathLike):
        raise ClusterError(f"{_shown(source)} does not describe a cluster", fix=_SOURCE_FIX)
    if isinstance(source, str) and not _names_a_file(source):
        return _check(parse_shorthand(source)), None
    path = Path(source)
    content = _load_file(path)
    with located(str(path)):
        return _check(parse_shorthand(content) if isinstance(content, str) else content), str(path)


@contextmanager
def located(file: str | None) -> Generator[None, None, None]:
    """Errors raised inside that do not say where get the name of the file."""
    try:
        yield
    except ClusterError as error:
        raise ClusterError(error.what, at=error.at or file, fix=error.fix) from None


def _names_a_file(text: str) -> bool:
    try:
        return text.endswith(SUFFIXES) or (text.strip() != "" and Path(text).exists())
    except (OSError, ValueError):  # too long for a name, or with a null character in it
        return False


def _load_file(path: Path) -> Any:
    try:
        if path.exists() and not path.is_file():  # a device such as /dev/zero would never end
            raise OSError(0, "it is a folder" if path.is_dir() else "it is not a plain file")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ClusterError(f"cannot read the cluster file {str(path)!r}: {reason}", fix=_SOURCE_FIX) from None
    try:
        return _parse_json(text, path) if path.suffix == ".json" else _parse_yaml(text, path)
    except (ValueError, RecursionError, ArithmeticError) as error:  # a date of month 13, a figure of 5000 digits, ...
        brief = str(error).partition(";")[0].partition("\n")[0]
        raise ClusterError(f"cannot read the cluster file: {brief}", at=str(path), fix=_SYNTAX_FIX) from None


def _parse_json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ClusterError(f"broken JSON: {error.msg}", at=f"{path}:{error.lineno}", fix=_SYNTAX_FIX) from None


def _parse_yaml(text: str, path: Path) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = str(getattr(error, "problem", None) or error).partition("\n")[0]
        raise ClusterError(f"broken YAML: {problem}", at=at, fix=_SYNTAX_FIX) from None


_SOURCE_FIX = "give the path of a YAML or JSON file, a dict, or one line such as '8xT4'"
_SYNTAX_FIX = "mend the syntax near this line"
_EMPTY_FIX = "write `nodes:` with the devices of each, or one line such as 8xT4"


def _check(content: Any) -> SpecFile:
    if content is None:
        raise ClusterError("the cluster file is empty", fix=_EMPTY_FIX)
    try:
        return SpecFile.model_validate(content)
    except ValidationError as error:
        raise _explain(error.errors()[0]) from None


_FIXES = {
    "greater_than": "write a figure above {gt:g}",
    "greater_than_equal": "write a figure of at least {ge:g}",
    "less_than_equal": "write a figure of at most {le:g}",
    "too_short": "list at least one",
    "finite_number": "write a finite figure",
    "literal_error": "write {expected}",
    "model_type": "write it as a table of fields",
    "value_error": "{error}",
    "float_parsing": "write a figure",
    "float_type": "write a figure",
    "int_parsing": "write a whole number",
    "int_type": "write a whole number",
    "int_from_float": "write a whole number",
    "int_parsing_size": "write a smaller number",
    "list_type": "write it as a list",
    "tuple_type": "write it as a list of points [size, fraction]",
    "missing": "write each point as [size, fraction]",
    "too_long": "write each point as [size, fraction]",
    "dict_type": "write it as a table of fields",
    "string_type": "write a name",
}


def _explain(detail: ErrorDetails) -> ClusterError:
    """The first finding of pydantic in our words: field, value given, fix."""
    field = _path(detail["loc"])
    if detail["type"] == "missing" and isinstance(detail["loc"][-1], str):
        return ClusterError(f"{field} is missing", fix=f"add `{detail['loc'][-1]}:`")
    if detail["type"] in ("extra_forbidden", "invalid_key"):
        known = _known_fields(detail["loc"])
        return ClusterError(f"{field} is not a known field", fix=did_you_mean(str(detail["loc"][-1]), known))
    ours = _FIXES.get(detail["type"])
    fix = ours.format(**detail.get("ctx", {})) if ours else detail["msg"].lower()
    return ClusterError(f"{field} is {_shown(detail['input'])}", fix=fix)


def _path(loc: tuple[str | int, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return text.removeprefix(".") or "the cluster"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _known_fields(loc: tuple[str | int, ...]) -> list[str]:
    """The fields that the table holding `loc` may have."""
    names = [part for part in loc[:-1] if isinstance(part, str)]
    models: dict[str, type[BaseModel]] = {"nodes": NodeEntry, "devices": DeviceEntry, "link": LinkEntry}
    if names[:1] == ["profiles"]:
        return list(ProfileEntry.model_fields)
    return list(models[names[-1]].model_fields if names else SpecFile.model_fields)
