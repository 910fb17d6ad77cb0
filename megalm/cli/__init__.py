"""The `megalm` command: what is typed, to one function call.

Each subcommand is a thin module here and imports its implementation inside the function, so that `megalm --help` and
mistakes answer at once. `main` is the one place where a user's mistake becomes a line on stderr and an exit code:

    0  done        2  the user can mend it: `megalm: error: ...`        130  interrupted        1  anything else
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Annotated

import typer

import megalm
from megalm.cli import (
    checkpoint,
    config,
    curate,
    data,
    doctor,
    env,
    evaluate,
    export,
    generate,
    import_,
    inspect,
    launch,
    merge,
    plan,
    tokenizer,
    trace,
    train,
)
from megalm.errors import RunFailed, UserError

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,  # plain text: a mistake is one line and no box
    pretty_exceptions_enable=False,
    help="Pre-trains base language models: from a folder of text to a checkpoint.",
)
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(config.app, name="config")
data.app.command("inspect")(inspect.inspect)
data.app.command("verify")(inspect.verify)
data.app.command("dedup")(curate.dedup)
data.app.command("filter")(curate.filter_)
data.app.command("merge")(merge.merge)
data.app.command("trace")(trace.trace)
app.add_typer(data.app, name="data")
app.add_typer(plan.app, name="plan")
app.add_typer(tokenizer.app, name="tokenizer")
app.command("train")(train.train)
app.command("launch")(launch.launch)
app.command("evaluate")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("export")(export.export)
app.command("import")(import_.import_)
app.command("doctor")(doctor.doctor)
app.command("env")(env.env)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"megalm {megalm.__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _megalm(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (`sys.argv` by default). Returns the exit code; a mistake is one line on stderr."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for before, argument in pairwise(["megalm", *arguments]):
        if argument == "" and before != "--prompt":  # as a path it would mean the current directory
            return fail(f"an argument after {before} is empty: is a variable of the shell not set?")
    return exit_code(
        lambda: typer.main.get_command(app).main(
            args=arguments, prog_name="megalm", standalone_mode=False, obj=arguments
        )
    )


def exit_code(command: Callable[[], object]) -> int:
    """Runs `command`, and gives what it returns if that is a number; what it raises becomes a line and a code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of few characters is no reason to fail
    try:
        code = command()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except UserError as error:
        return fail(str(error))
    except RunFailed as error:
        return fail(str(error), error.code) if str(error) else error.code
    except typer.TyperException as error:
        return _usage(error)
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has enough; nothing more can be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (RuntimeError, MemoryError) as error:  # torch has no class of its own for a CPU's memory
        if isinstance(error, MemoryError) or re.search(r"out of memory|allocate memory", str(error)):
            return fail(
                f"out of memory: choose smaller sizes ({str(error).splitlines()[0] if str(error) else 'none left'})"
            )
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        return fail(f"{error.filename}: {reason}" if error.filename else reason)


def fail(message: str, code: int = 2) -> int:
    """Says a mistake in one line on stderr; returns its exit code."""
    print("megalm: error:", " ".join(line.strip() for line in message.splitlines()), file=sys.stderr)
    return code


def _usage(error: typer.TyperException) -> int:
    """A command line that typer refuses."""
    context = getattr(error, "ctx", None)
    message = error.format_message()
    if context is None:
        return fail(message)
    if message == context.get_help():  # a group without a command
        print(message)
        return 0
    return fail(f"{message.rstrip('.')} (see {context.command_path} --help)")
