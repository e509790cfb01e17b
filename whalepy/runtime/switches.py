"""What makes steps faster can be turned off, one by one, to find a fault: WHALEPY_OFF="early-reduction,..."."""

from __future__ import annotations

import os
from typing import Literal, get_args

from whalepy.errors import WhaleError
from whalepy.runtime.agreement import gather_objects
from whalepy.runtime.groups import Group

Switch = Literal[
    "early-reduction", "asynchronous-bridges", "gradients-during-bridges", "kept-memory", "asynchronous-agreement"
]
_VARIABLE = "WHALEPY_OFF"


def turned_off(host: Group) -> frozenset[str]:
    """What the environment turns off, on all ranks alike. Collective.

    Raises WhaleError, on every rank, for a name that there is not, and where ranks differ.
    """
    everyone = gather_objects(host, os.environ.get(_VARIABLE, ""))
    given = [frozenset(word.strip() for word in text.split(",") if word.strip()) for text in everyone]
    for rank, words in enumerate(given):
        unknown = sorted(words - set(get_args(Switch)))
        if unknown:
            raise WhaleError(
                f"{_VARIABLE} names {unknown[0]!r} on rank {rank}", fix=f"choose from {', '.join(get_args(Switch))}"
            )
        if words != given[0]:
            raise WhaleError(
                f"{_VARIABLE} is {everyone[rank]!r} on rank {rank} and {everyone[0]!r} on rank 0",
                fix="give all ranks the same",
            )
    return given[0]
