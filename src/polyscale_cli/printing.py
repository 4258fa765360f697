"""What commands print: errors in one line, progress on the standard error, tables."""

import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

from .wording import as_typed, printable


INTERRUPTED, TERMINATED = 130, 143


def silence_torch() -> None:
    """Leaves out warnings of libraries about each other, which a user of a command can do nothing about."""
    logging.getLogger("torch.utils._pytree").addFilter(lambda record: record.levelno >= logging.ERROR)


def escape_unprintable() -> None:
    """Lets names through that the terminal's encoding does not have, as escapes: they must not cost a result."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def no_bars() -> None:
    """Leaves out the progress bars of transformers: one for each file, between lines of ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def quiet() -> None:
    """Leaves out what transformers says of its own, and its progress bars."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    no_bars()


def note(command: str, text: object) -> None:
    """One line on the standard error, in the words of the command."""
    typer.echo(f"polyscale {command}: {printable(' '.join(as_typed(text).split()))}", err=True)


def fail(command: str, error: object, code: int = 2) -> typer.Exit:
    """Prints one line that says what is wrong; returns the exit to raise."""
    note(command, error)
    return typer.Exit(code)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""

    exit_code = TERMINATED


def _terminate(signum: int, frame: object) -> None:
    raise Terminated


@contextmanager
def reporting(command: str, left: str = "nothing was written") -> Iterator[None]:
    """Ends a command in one line and exit code 2, whatever a user typed or a file held.

    Ctrl-C and SIGTERM end it in one line and the exit codes that shells give them. With POLYSCALE_TRACEBACK=1 in the
    environment errors pass.

    Args:
        command (`str`): its name.
        left (`str`, *optional*, defaults to `"nothing was written"`): what a command leaves that is interrupted.
    """
    before = (
        signal.signal(signal.SIGTERM, _terminate) if threading.current_thread() is threading.main_thread() else None
    )
    try:
        yield
    except (typer.Exit, typer.Abort, BrokenPipeError):  # nobody reads a closed pipe
        raise
    except KeyboardInterrupt as error:
        signalled = "terminated" if isinstance(error, Terminated) else "interrupted"
        told = str(error) or f"{signalled}; {left}."
        raise fail(command, told, getattr(error, "exit_code", INTERRUPTED)) from error
    except Exception as error:
        if os.environ.get("POLYSCALE_TRACEBACK") == "1" or type(error).__module__.startswith(("click", "typer")):
            raise
        code = getattr(error, "exit_code", None)  # errors that know how a command ends, such as a stopped training
        if code is not None or isinstance(error, ValueError | OSError | ImportError):
            raise fail(command, error, 2 if code is None else code) from error
        told = f"unexpected {type(error).__name__}: {error} (POLYSCALE_TRACEBACK=1 shows where)"
        raise fail(command, told) from error
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the standard error, gone at the end; nothing where that is no terminal.

    Yields:
        `Callable[[int, int], None]`: takes what is done and the whole.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


__all__ = ["escape_unprintable", "fail", "no_bars", "note", "progress_bar", "quiet", "reporting", "silence_torch"]
