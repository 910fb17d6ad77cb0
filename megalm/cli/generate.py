"""`megalm generate`: a checkpoint goes on with texts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megalm.cli import show
from megalm.cli.model import CheckpointPath, Processes, Settings, in_processes
from megalm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from megalm.launch.ranks import Process
    from megalm.train.generate import Sampling
    from megalm.train.trained import TrainedModel


def generate(
    context: typer.Context,
    checkpoint: CheckpointPath,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Text to go on with; may be given several times.", show_default=False)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", exists=True, dir_okay=False, help='JSONL of {"prompt": TEXT}.', show_default=False
        ),
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", help="Go on with what is typed, line by line; an empty line starts anew.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, help="Below 1 sharper, above 1 flatter; 0 takes the likeliest token.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens that reach this probability.")
    ] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Draw from so many likeliest tokens; 0: from all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the draws, of each prompt's anew.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Stop before this text; may be given several times.", show_default=False),
    ] = None,
    nproc: Processes = None,
    settings: Settings = None,
) -> int:
    """Write on from a prompt as text, or from several as JSON lines of prompt, text and why it ended."""
    if interactive == bool(prompt or prompts):
        raise UserError(
            "nothing to go on with: give --prompt TEXT, --prompts FILE or --interactive, the last one alone"
        )
    if "" in (stop or ()):
        raise UserError("--stop is empty: give the text to stop at")

    def work(process: Process) -> None:
        from megalm.train.generate import Sampling, encode_prompt, read_prompts
        from megalm.train.trained import SavedModel, opened_model

        sampling = Sampling(max_new_tokens, temperature, top_p, top_k, seed, tuple(stop or ()))

        def prepare(saved: SavedModel) -> list[tuple[str, list[int]]]:
            asked = [("--prompt", text) for text in prompt or ()] + (read_prompts(prompts) if prompts else [])
            return [(text, encode_prompt(saved, where, text, max_new_tokens)) for where, text in asked]

        with opened_model(checkpoint, process, settings or (), prepare) as (trained, asked):
            if interactive:
                _converse(trained, sampling)
            elif len(asked) == 1 and not prompts:
                _stream(trained, asked[0], sampling)
            else:
                _lines(trained, asked, sampling)

    return in_processes(checkpoint, nproc, settings, context, work)


def _stream(trained: TrainedModel, asked: tuple[str, list[int]], sampling: Sampling) -> None:
    """The prompt and what follows it, as it comes."""
    from megalm.train.generate import continuations

    speaks = trained.passes.mesh.rank == 0
    _say(asked[0], speaks)
    for piece in continuations(trained, [asked[1]], sampling):
        _say(piece.text, speaks)
    _say("\n", speaks)


def _lines(trained: TrainedModel, asked: Sequence[tuple[str, list[int]]], sampling: Sampling) -> None:
    """A line of JSON for each prompt, in their order."""
    import json

    from megalm.train.generate import continuations

    texts, ends = [""] * len(asked), dict[int, str]()
    shown = 0
    for piece in continuations(trained, [tokens for _, tokens in asked], sampling):
        texts[piece.document] += piece.text
        if piece.end is not None:
            ends[piece.document] = piece.end
        while shown in ends:
            line = {"prompt": asked[shown][0], "text": texts[shown], "end": ends[shown]}
            text = json.dumps(line, ensure_ascii=False)
            text = text if text == show.printable(text) else json.dumps(line)  # JSON has its own way to spell out
            _say(text + "\n", trained.passes.mesh.rank == 0)
            shown += 1


def _converse(trained: TrainedModel, sampling: Sampling) -> None:
    """Lines that are typed, each going on from all before it, until the input ends."""
    import sys

    from megalm.train.converse import Conversation, shared_lines

    speaks = trained.passes.mesh.rank == 0
    conversation = Conversation(trained, sampling)
    if speaks and sys.stdin.isatty():
        _say("Type a text and Enter; an empty line starts anew, Ctrl-D ends.\n", speaks)
    for line in shared_lines(sys.stdin, trained):
        try:
            for text in conversation.go_on(line):
                _say(text, speaks)
        except UserError as error:
            _say(f"megalm: {error}", speaks)
        _say("\n", speaks)


def _say(text: str, speaks: bool) -> None:
    if speaks:
        print(show.printable(text), end="", flush=True)
