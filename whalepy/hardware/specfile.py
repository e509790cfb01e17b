"""How a cluster is read: YAML or JSON, a dict, or one line; checked field by field (`entries`)."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from whalepy.errors import ClusterError
from whalepy.hardware.checking import SUFFIXES, Loc, explained, load_file, shown
from whalepy.hardware.entries import DeviceEntry, LinkEntry, NodeEntry, ProfileEntry, SpecFile
from whalepy.hardware.shorthand import parse_shorthand

__all__ = ["SUFFIXES", "located", "read_spec"]


def read_spec(source: object) -> tuple[SpecFile, str | None]:
    """The checked content of a path, a dict or the one-line form, and the file it came from, if any.

    Text that names a file or a folder (one exists, or it ends in .yaml, .yml or .json) is a path. Raises ClusterError
    with the field, the value given, the fix, and the file and line where there is one.
    """
    if isinstance(source, Mapping):
        return _check(source), None
    if not isinstance(source, str | os.PathLike):
        raise ClusterError(f"{shown(source)} does not describe a cluster", fix=_SOURCE_FIX)
    if isinstance(source, str) and not _names_a_file(source):
        return _check(parse_shorthand(source)), None
    path = Path(source)
    content = load_file(path, "cluster file", ClusterError, _SOURCE_FIX)
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


_SOURCE_FIX = "give the path of a YAML or JSON file, a dict, or one line such as '8xT4'"
_EMPTY_FIX = "write `nodes:` with the devices of each, or one line such as 8xT4"


def _check(content: Any) -> SpecFile:
    if content is None:
        raise ClusterError("the cluster file is empty", fix=_EMPTY_FIX)
    try:
        return SpecFile.model_validate(content)
    except ValidationError as error:
        what, fix = explained(error.errors()[0], _known_fields, "the cluster")
        raise ClusterError(what, fix=fix) from None


def _known_fields(loc: Loc) -> list[str]:
    """The fields that the table holding `loc` may have."""
    names = [part for part in loc[:-1] if isinstance(part, str)]
    models: dict[str, type[BaseModel]] = {"nodes": NodeEntry, "devices": DeviceEntry, "link": LinkEntry}
    if names[:1] == ["profiles"]:
        return list(ProfileEntry.model_fields)
    return list(models[names[-1]].model_fields if names else SpecFile.model_fields)
