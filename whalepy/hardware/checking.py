"""Files that users write, YAML or JSON: read, and what pydantic finds in them said in our words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import ErrorDetails

from whalepy.errors import WhaleError
from whalepy.hardware.near import did_you_mean

Loc = tuple[str | int, ...]

SUFFIXES = (".yaml", ".yml", ".json")
"""A name that ends so is that of a file."""


def load_file(path: Path, what: str, kind: type[WhaleError], fix: str) -> Any:
    """The content of a file; `what` it is and how to `fix` its name are for the error, of this `kind`."""
    try:
        if path.exists() and not path.is_file():  # a device such as /dev/zero would never end
            raise OSError(0, "it is a folder" if path.is_dir() else "it is not a plain file")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise kind(f"cannot read the {what} {str(path)!r}: {reason}", fix=fix) from None
    try:
        return _parse_json(text, path, kind) if path.suffix == ".json" else _parse_yaml(text, path, kind)
    except (ValueError, RecursionError, ArithmeticError) as error:  # a date of month 13, a figure of 5000 digits, ...
        brief = str(error).partition(";")[0].partition("\n")[0]
        raise kind(f"cannot read the {what}: {brief}", at=str(path), fix=_SYNTAX_FIX) from None


def _parse_json(text: str, path: Path, kind: type[WhaleError]) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise kind(f"broken JSON: {error.msg}", at=f"{path}:{error.lineno}", fix=_SYNTAX_FIX) from None


def _parse_yaml(text: str, path: Path, kind: type[WhaleError]) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = str(getattr(error, "problem", None) or error).partition("\n")[0]
        raise kind(f"broken YAML: {problem}", at=at, fix=_SYNTAX_FIX) from None


_SYNTAX_FIX = "mend the syntax near this line"

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
    "bool_parsing": "write true or false",
    "bool_type": "write true or false",
    "list_type": "write it as a list",
    "tuple_type": "write it as a list of points [size, fraction]",
    "missing": "write each point as [size, fraction]",
    "too_long": "write each point as [size, fraction]",
    "dict_type": "write it as a table of fields",
    "string_type": "write a name",
}


def explained(detail: ErrorDetails, known: Callable[[Loc], Sequence[str]], whole: str) -> tuple[str, str]:
    """A finding of pydantic as what is wrong, with the field and the value given, and its fix.

    `known`: the fields that the table holding a field may have. `whole`: what the content as a whole is called.
    """
    field = _path(detail["loc"]) or whole
    if detail["type"] == "missing" and isinstance(detail["loc"][-1], str):
        return f"{field} is missing", f"add `{detail['loc'][-1]}:`"
    if detail["type"] in ("extra_forbidden", "invalid_key"):
        return f"{field} is not a known field", did_you_mean(str(detail["loc"][-1]), known(detail["loc"]))
    ours = _FIXES.get(detail["type"])
    fix = ours.format(**detail.get("ctx", {})) if ours else detail["msg"].lower()
    return f"{field} is {shown(detail['input'])}", fix


def _path(loc: Loc) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


def shown(value: Any) -> str:
    """What was given, cut off where it is long."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
