"""Where an error of capture points."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from whalepy.program.capture_places import place_of_error

LIBRARY = os.sep + os.path.join("python", "transformers", "modeling_x.py")


def compiled(file: str, body: str) -> Callable[..., None]:
    scope: dict[str, Callable[..., None]] = {}
    exec(compile(f"def call(inner=None):\n    {body}\n", file, "exec"), scope)
    return scope["call"]


def place(outer: str, inner: str) -> str | None:
    """Of an error raised in the file `inner`, called by the file `outer`."""
    with pytest.raises(ZeroDivisionError) as error:
        compiled(outer, "inner()")(compiled(inner, "1 / 0"))
    error.value.__traceback__ = error.value.__traceback__ and error.value.__traceback__.tb_next  # without this file
    return place_of_error(error.value)


@pytest.mark.parametrize(
    ("outer", "inner", "expected"),
    [
        ("/me/model.py", "/me/layer.py", "layer.py:2"),
        (LIBRARY, "/me/layer.py", "layer.py:2"),  # the library calls a module of the user
        (LIBRARY, LIBRARY, "modeling_x.py:2"),
        ("/me/model.py", LIBRARY, "model.py:2, in modeling_x.py:2"),  # the user calls a module of the library
    ],
)
def test_the_users_line_and_the_librarys_below_it(outer: str, inner: str, expected: str) -> None:
    assert place(outer, inner) == expected
