"""`megalm config`: what a config means, what may be in it, and the model presets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Look at what a config means, and at the model presets.", no_args_is_help=True)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Set keys, such as batch.global_size=64.", show_default=False),
]

MaxRestarts = Annotated[
    int,
    typer.Option(min=0, help="Start again from the newest checkpoint after a failure, so often.", show_default=False),
]


@app.command()
def show(
    config: ConfigFile,
    overrides: Overrides = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="Resolve for a run on so many; else as few as the config needs.", show_default=False),
    ] = None,
) -> None:
    """Print the resolved config: presets applied, defaults derived."""
    from megalm.config import load_config, to_yaml

    print(to_yaml(load_config(config, overrides or (), processes)), end="")


@app.command()
def schema() -> None:
    """Print the JSON schema of config files."""
    import json

    from megalm.config.schema import schema as config_schema

    print(json.dumps(config_schema(), indent=2))


@app.command()
def presets() -> None:
    """List the model presets."""
    from megalm.config.load import preset_model
    from megalm.config.presets import PRESETS
    from megalm.model.counts import parameter_count

    columns = ("preset", "parameters", "layers", "hidden", "heads", "kv heads", "ffn", "vocabulary")
    rows: list[tuple[str, ...]] = [columns]
    for name in PRESETS:
        model = preset_model(name)
        shape = (model.num_layers, model.hidden_size, model.num_heads, model.num_kv_heads or model.num_heads)
        count = _short(parameter_count(model, model.vocab_size or 0)) + ("" if model.vocab_size else " + vocabulary")
        vocabulary = str(model.vocab_size or "tokenizer's")
        rows.append((name, count, *map(str, shape), str(model.ffn_size), vocabulary))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers in rows:
        print(name.ljust(widths[0]), *(n.rjust(w) for n, w in zip(numbers, widths[1:], strict=True)), sep="  ")


def _short(count: int) -> str:
    """`8.03B`: three digits and a unit."""
    unit, size = next((u, s) for u, s in (("T", 10**12), ("B", 10**9), ("M", 10**6)) if count >= s or s == 10**6)
    return f"{count / size:.{3 - len(str(count // size))}f}{unit}"
