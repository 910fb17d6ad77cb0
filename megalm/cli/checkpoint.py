"""`megalm checkpoint`: what checkpoints hold, whether they are intact, how two differ, and which need not be kept."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Look into checkpoints, check them, compare and delete them.", no_args_is_help=True)

PLACE = "A run directory, a place of checkpoints (also a URL), or one step's directory."
Where = Annotated[str, typer.Argument(metavar="PATH", help=PLACE, show_default=False)]


@app.command()
def verify(path: Where) -> None:
    """Check every byte of a checkpoint, or of all of a run's, and list all that is wrong."""
    from megalm.checkpoint.inspect import checkpoints_at, problems
    from megalm.checkpoint.manifest import MANIFEST
    from megalm.checkpoint.places import names, place
    from megalm.cli import show
    from megalm.errors import UserError
    from megalm.train.run_directory import root_of

    where = place(path)
    said: list[str] = []
    for directory in checkpoints_at(where if MANIFEST in names(where) else root_of(where)):
        read = 0
        with show.progress(f"Checking {directory}") as update:

            def advance(count: int) -> None:
                nonlocal read
                read += count
                update(read, read, show.size(read))

            found = problems(directory, advance)
        if found and not names(directory):
            typer.echo(f"{directory}: was deleted meanwhile")
            continue
        typer.echo(f"{directory}: {'intact' if not found else f'{len(found)} problems'}, {show.size(read)} read")
        for problem in found:
            typer.echo(f"  {show.printable(problem)}")
        said += found
    if said:
        raise UserError(f"{said[0]}{f' (and {len(said) - 1} more, listed above)' if len(said) > 1 else ''}")


@app.command()
def inspect(
    path: Where,
    tensors: Annotated[bool, typer.Option("--tensors", help="List the tensors, too.")] = False,
) -> None:
    """Show the newest checkpoint of a run, or the one of a step."""
    import json

    import xxhash

    from megalm.checkpoint import place, read_manifest
    from megalm.checkpoint.inspect import totals
    from megalm.cli import show
    from megalm.train.run_directory import find_checkpoint

    directory = find_checkpoint(place(path))
    manifest = read_manifest(directory)
    state, counts = manifest.state, totals(manifest)
    rows = [("step", show.number(manifest.step))]
    if "position" in state:
        position = state["position"]
        rows += [(key.replace("_", " "), show.number(position[key])) for key in ("tokens", "consumed_samples")]
        rows.append(("hash of all samples", position["data_hash"]))
    rows += [(name, show.number(counts[name])) for name in ("parameters", "tensors", "files")]
    rows.append(("size", show.size(counts["bytes"])))
    if "config" in state:
        parallel = state["config"]["parallel"]
        pipeline, zero = parallel["pipeline"], parallel["zero"]
        rows += [
            ("tensor, pipeline, data ranks", f"{parallel['tensor']}, {pipeline['size']}, {parallel['data']}"),
            ("schedule", f"{pipeline['schedule']}, {pipeline['chunks']} stages a rank"),
            ("ZeRO", f"stage {zero['stage']} over {zero['shard']}, {zero['engine']}"),
            ("config", xxhash.xxh3_128_hexdigest(json.dumps(state["config"], sort_keys=True).encode())),
        ]
    show.table(str(directory), rows)
    if tensors:
        records = [
            (name, tensor.dtype, str(list(tensor.shape)), str(len(tensor.boxes)))
            for name, tensor in manifest.tensors.items()
        ]
        show.table("", records, ("tensor", "dtype", "shape", "boxes"))


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="PATH", help=PLACE, show_default=False)],
    second: Annotated[str, typer.Argument(metavar="PATH", help="Another.", show_default=False)],
) -> None:
    """Show in what two checkpoints differ: position, config, tensors."""
    from megalm.checkpoint import place, read_manifest
    from megalm.checkpoint.inspect import differing_tensors
    from megalm.cli import show
    from megalm.train.resume import differences
    from megalm.train.run_directory import find_checkpoint

    one, other = (find_checkpoint(place(path)) for path in (first, second))
    old, new = (read_manifest(directory) for directory in (one, other))
    lines = differences({"step": old.step, **old.state}, {"step": new.step, **new.state})
    for line in lines:
        typer.echo(show.printable(line))
    differing = 0
    for difference in differing_tensors(one, other):
        differing += 1
        typer.echo(f"{difference.name}: {show.printable(difference.what)}")
    typer.echo(f"{differing} of {len({*old.tensors, *new.tensors})} tensors differ")


@app.command()
def prune(
    path: Where,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest to keep.", show_default=False)],
    keep_every: Annotated[
        int | None, typer.Option(min=1, help="Keep those whose step is a multiple of this, too.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which would go.")] = False,
) -> None:
    """Delete all complete checkpoints but the newest, and those before them that are damaged."""
    from megalm.checkpoint import place
    from megalm.checkpoint.inspect import prune
    from megalm.train.run_directory import root_of

    root = root_of(place(path))
    gone = prune(root, keep, keep_every, dry_run)
    verb = "would be deleted" if dry_run else "deleted"
    typer.echo(f"{root}: {verb}: {', '.join(f'step {step}' for step in sorted(gone)) or 'none'}")
