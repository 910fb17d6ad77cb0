"""A run's model out to Hugging Face's form, and one from there in, with all that belongs to it.

export   RUN/checkpoints/step-... --> model*.safetensors, config.json, generation_config.json, tokenizer, README.md
import   a directory like that    --> DIR/checkpoints/step-00000000, DIR/tokenizer/, DIR/config.yaml
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalm.checkpoint import Place, complete, read_manifest
from megalm.checkpoint.huggingface import export_weights, model_card, read_config, read_weights, to_config
from megalm.checkpoint.weights import Weights, save_model
from megalm.config import to_yaml
from megalm.config.sections import Model, known
from megalm.data.directory import new_directory
from megalm.data.huggingface_tokenizer import write_tokenizer
from megalm.data.tokenizer import load_tokenizer
from megalm.errors import UserError
from megalm.files import write_atomic
from megalm.train.build import build_model
from megalm.train.device import DTYPES
from megalm.train.run_directory import CHECKPOINTS, find_checkpoint, root_of, run_of, tokenizer_of

OnProgress = Callable[[int, int], None]
NOTHING_OURS = re.compile(r"(?!)")  # no file that stands in the output may be replaced


def export(
    path: Path,
    output: Path,
    step: int | None,
    average: int,
    dtype: str | None,
    shard_bytes: int,
    on_progress: OnProgress,
    say: Callable[[str], None],
) -> int:
    """Writes the model that `path` names, at a step or the newest, the mean of it and those before it if `average` is
    more than 1; in the type that the run computed in if `dtype` is None. Returns the tensors' bytes.

    `say` is told what is not quite the same there. Raises UserError; then nothing is left.
    """
    checkpoints = _chosen(path, step, average)
    weights = Weights(checkpoints)
    run = run_of(path.absolute(), checkpoints[0])
    tokenizer = tokenizer_of(run, checkpoints[0], weights.state)
    section = weights.model
    rows = known(section.vocab_size)
    words = min(rows, tokenizer.vocab_size) if tokenizer else rows
    model = section.model_copy(update={"vocab_size": words})
    dtype = dtype or weights.state.get("config", {"precision": {"compute": "float32"}})["precision"]["compute"]
    config = to_config(model, tokenizer.eod if tokenizer else None, dtype)
    with new_directory(output, NOTHING_OURS, overwrite=False) as directory:
        size = export_weights(weights, directory, DTYPES[dtype], shard_bytes, words, on_progress)
        _write_json(directory / "config.json", config)
        _write_json(directory / "generation_config.json", {"eos_token_id": config["eos_token_id"]})
        if tokenizer:
            for line in write_tokenizer(tokenizer, directory, model.max_positions):
                say(line)
        else:
            say("no tokenizer is known, so none was written")
        if words < rows:
            say(f"left out {rows - words} rows of the vocabulary, which stand for no token")
        facts = {"architecture": config["architectures"][0], "steps": ", ".join(map(str, reversed(weights.steps)))}
        lines = _metrics(run / "metrics.jsonl", weights.steps[0])
        card = model_card(run.name, model.model_dump(mode="json"), facts | {"dtype": dtype}, weights.state, lines)
        write_atomic(directory / "README.md", card.encode())
    return size


def _chosen(path: Path, step: int | None, average: int) -> list[Place]:
    """The checkpoints to export, the newest first."""
    newest = find_checkpoint(path)
    if newest == path and step is not None:
        raise UserError(f"--step={step}: {path} is one step's already: leave it out, or name the run's directory")
    if newest == path and average == 1:
        return [newest]
    found: dict[int, Place] = {}
    for checkpoint in complete(path.parent if newest == path else root_of(path)):
        found.setdefault(_step(checkpoint), checkpoint)  # a replaced one may not be deleted yet
    last = read_manifest(newest).step if step is None else step
    chosen = [checkpoint for number, checkpoint in found.items() if number <= last][:average]
    there = ", ".join(map(str, reversed(found)))
    if not chosen or last not in found:
        raise UserError(f"--step={step}: {path} has no complete checkpoint of it: there are {there}")
    if len(chosen) < average:
        raise UserError(f"--average={average}: {path} has {len(chosen)} complete ones up to step {last}, of {there}")
    return chosen


def _step(checkpoint: Place) -> int:
    """100 of .../step-00000100, also while it is moved out of sight."""
    return int(checkpoint.name.partition("step-")[2].partition(".")[0])


def _metrics(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines up to `step`. The last one of a run in progress may be half written."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if line["step"] <= step]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(content, indent=2) + "\n").encode())


def import_(source: Path, output: Path, say: Callable[[str], None]) -> str:
    """Writes `output`, which `run.init_from` takes, from a directory in Hugging Face's form. Returns its config.yaml.

    Raises UserError; then nothing is left.
    """
    architecture, model = read_config(source)

    def read(scratch: Path) -> dict[str, Tensor]:
        return read_weights(source, architecture, shapes(model), scratch)

    return start_from(model, read, source, output, say)


def start_from(
    model: Model, read: Callable[[Path], dict[str, Tensor]], source: Path, output: Path, say: Callable[[str], None]
) -> str:
    """Writes `output`, a directory that `run.init_from` takes, with the parameters that `read` gives when it is told
    where its files may lie, and the tokenizer in `source`. Returns its config.yaml: what follows from the model."""
    with new_directory(output, NOTHING_OURS, overwrite=False) as directory:
        scratch = directory / "scratch"
        scratch.mkdir()
        tensors = read(scratch)
        tokenizer = _copy_tokenizer(source, directory / "tokenizer", say)
        fingerprint = load_tokenizer(str(tokenizer)).fingerprint if tokenizer else None
        save_model(directory / CHECKPOINTS, model, tensors, str(source), fingerprint)
        del tensors
        shutil.rmtree(scratch)
        sections: dict[str, Any] = {"run": {"init_from": str(output)}, "model": model.model_dump(mode="json")}
        if tokenizer:
            sections["tokenizer"] = {"path": str(output / "tokenizer" / tokenizer.name)}
        text = f"# Of {source}. Add run.dir, data, batch and schedule to train.\n" + to_yaml(sections)
        write_atomic(directory / "config.yaml", text.encode())
    return text


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Of the parameters that a resolved model section has, by name."""
    built = build_model(model, torch.device("meta"), torch.float32)
    return {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}


def _copy_tokenizer(source: Path, target: Path, say: Callable[[str], None]) -> Path | None:
    """Copies the tokenizer's file, if there is one that megalm can use."""
    for name in ("tokenizer.json", "tokenizer.model"):
        if (source / name).is_file():
            try:
                load_tokenizer(str(source / name))
            except UserError as error:
                say(f"the tokenizer was left out: {error}")
                return None
            target.mkdir()
            return Path(shutil.copyfile(source / name, target / name))
    say(f"{source} has no tokenizer.json and no tokenizer.model, so no tokenizer was taken over")
    return None
