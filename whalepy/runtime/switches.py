"""What makes steps faster can be turned off, one by one, to find a fault: WHALEPY_OFF="early-reduction,..."."""

from __future__ import annotations

import os
from typing import Literal

from whalepy.errors import WhaleError

Switch = Literal["early-reduction"]
_NAMES = ("early-reduction",)


def is_off(name: Switch) -> bool:
    """Whether the environment turns this off. Raises WhaleError for a name that there is not."""
    given = [word.strip() for word in os.environ.get("WHALEPY_OFF", "").split(",") if word.strip()]
    for word in given:
        if word not in _NAMES:
            raise WhaleError(f"WHALEPY_OFF names {word!r}", fix=f"choose from {', '.join(_NAMES)}")
    return name in given
