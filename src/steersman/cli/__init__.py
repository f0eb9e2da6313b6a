"""The command line: seven verbs, one file each."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from typing import Annotated

import typer

from steersman import __version__
from steersman.cli import apply, cite, compare, evidence, info, methods, probe


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"steersman {__version__}")
        raise typer.Exit


def build(arguments: list[str]) -> typer.Typer:
    """The command line; ``arguments`` tell which bench's options are needed."""
    app = typer.Typer(
        name="steersman",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        epilog="[bold]Start here[/bold]: steersman compare sampling · steersman info pndm · steersman evidence pndm",
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
        ] = False,
    ) -> None:
        """Published methods for steering generative models, as drop-ins, with proof."""

    for verb in (methods, info, cite):
        verb.add_to(app)
    compare.add_to(app, arguments)
    evidence.add_to(app)
    for maker in (apply, probe):
        maker.add_to(app, arguments)
    return app


def _terminate(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _one_line_warnings() -> None:
    """Show each warning once, as one plain line on standard error, without the source that it comes from."""
    shown: set[str] = set()

    def show(message: Warning | str, *rest: object, **more: object) -> None:
        text = " ".join(str(message).split())
        if text not in shown:
            shown.add(text)
            print(f"warning: {text}", file=sys.stderr, flush=True)

    warnings.showwarning = show


def main() -> None:
    """Entry point of ``steersman``. A polite kill ends like Ctrl-C: what is finished stays, children stop."""
    signal.signal(signal.SIGTERM, _terminate)
    _one_line_warnings()
    # Read when torch loads. Without it idle OpenMP threads spin, and on a machine with anything else to do small
    # networks take many times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app = build(sys.argv[1:])
    except typer.Exit as end:
        sys.exit(end.exit_code)
    app()
