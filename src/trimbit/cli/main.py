"""The entry point. Results go to stdout, progress and errors to stderr.

Commands import what they need only when they run, so that help, version, show, cache and the list of recipes load
neither torch nor transformers.
"""

import logging
import signal
import sys
from typing import Annotated

import typer
from safetensors import SafetensorError

from trimbit.cli.cache import cache_app
from trimbit.cli.compress import apply_command, compress, plan
from trimbit.cli.console import stderr
from trimbit.cli.evaluate import eval_command
from trimbit.cli.recipes import recipes
from trimbit.cli.show import show
from trimbit.errors import TrimbitError
from trimbit.jobs.threads import share_cores

INTERRUPTED = 130  # 128 + SIGINT, as in shells
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(compress)
app.command()(plan)
app.command(name="apply")(apply_command)
app.command(name="eval")(eval_command)
app.command()(show)
app.command()(recipes)
app.add_typer(cache_app, name="cache")


def _version(asked: bool) -> bool:
    if asked:
        import trimbit

        typer.echo(trimbit.__version__)
        raise typer.Exit
    return asked


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", help="print version", is_eager=True, callback=_version)] = False,
) -> None:
    """Fit a language model to a budget."""


def main() -> None:
    """Run the command line. An error prints one line and sets the exit code; an interrupt leaves no partial output."""
    share_cores()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        code = app(standalone_mode=False)
        if code == INTERRUPTED:  # typer catches Ctrl-C
            raise KeyboardInterrupt
        if code:
            sys.exit(code)
    except TrimbitError as err:
        _fail(str(err), err.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted; finished stages are kept in the cache and are reused", INTERRUPTED)
    except OSError as err:
        _fail(f"{err.filename or 'file'}: {err.strerror or err}", 1)
    except SafetensorError as err:
        from trimbit.jobs.cache import cache_root

        _fail(
            f"the cache {cache_root()} cannot be written or has a damaged file ({err}); free space or remove the cache",
            1,
        )
    except Exception as err:
        if hasattr(err, "format_message"):  # click's, about arguments; empty where it shows the help
            _fail(err.format_message(), 2) if err.format_message() else sys.exit(2)
        if type(err).__name__ == "OutOfMemoryError":  # torch's, on a GPU
            _fail(f"{str(err).splitlines()[0]} Finished stages are kept in the cache and are reused", 1)
        raise


def _fail(message: str, code: int) -> None:
    stderr.print(f"trimbit: {message}", style="red", highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
