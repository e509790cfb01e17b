"""The `whalepy` command. A user's mistake exits with 2 and its text, without a traceback; torch is not imported."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.metadata import version
from typing import Annotated

import typer

from whalepy.errors import WhaleError

BAD_INPUT = 2

# Each is a function of its name in a file of that name under whalepy/commands.
COMMANDS = ("plan", "profile", "check", "devices")

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command; exits with 2 on a WhaleError, whose text it prints."""
    try:
        app(prog_name="whalepy")
    except WhaleError as error:
        print(f"whalepy: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"whalepy {version('whalepy')}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Annotate a local PyTorch model, compile it, train it balanced over the devices you really have."""


for _name in COMMANDS:
    app.command(_name)(getattr(import_module(f"whalepy.commands.{_name}"), _name))
