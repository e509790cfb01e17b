"""Where in the user's code a call came from."""

from __future__ import annotations

import os
import sys

from whalepy.primitives.recording import under_dynamo

_PACKAGE = __name__.partition(".")[0]


def user_line() -> str:
    """`file.py:line` of the innermost frame outside whalepy."""
    if under_dynamo():  # no frames to walk there
        return "<compiled>"
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        if frame.f_back is None:
            return "<unknown>"
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}"
