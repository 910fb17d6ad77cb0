"""Other frameworks' checkpoints of a GPT or Llama to one that a megalm run can start from, and a run's to DeepSpeed's.

    python tools/convert_checkpoint.py megatron checkpoints/iter_0001000 --config run.yaml --output start
    python tools/convert_checkpoint.py deepspeed checkpoints/universal --config run.yaml --output start
    megalm train run.yaml run.init_from=start
    python tools/convert_checkpoint.py to_deepspeed runs/tiny --output universal

megatron       a `torch_dist` directory of Megatron-LM, of any layout
deepspeed      a universal checkpoint (`python -m deepspeed.checkpoint.ds_to_universal`) of a model of transformers
to_deepspeed   a universal checkpoint of a run, or of one of its steps: weights, AdamW's moments and step, to go on with
               the model that `megalm export` makes: engine.load_checkpoint(DIR), with {"checkpoint":
               {"load_universal": true}} in DeepSpeed's config; under ZeRO 3 with --optimizer deepspeed alone

On the way in, the model section of the config says what the model is; it is checked against every tensor. Weights are
taken, not the optimizer's state. Nothing in the files is run: Megatron's .metadata is a pickle, of which only the
classes that describe tensors are let through, and torch reads tensors with `weights_only`.
"""

from __future__ import annotations

import argparse
import io
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megalm.checkpoint.huggingface import VOCABULARY, architecture_of, entries, joined, taken_over
from megalm.checkpoint.interop import from_megatron
from megalm.checkpoint.manifest import read_manifest
from megalm.checkpoint.weights import Weights
from megalm.cli import exit_code
from megalm.config import load_config
from megalm.config.sections import Model, known
from megalm.data.directory import new_directory
from megalm.data.tokenizer import load_tokenizer
from megalm.errors import UserError
from megalm.files import replacing, write_atomic
from megalm.train.build import with_vocabulary
from megalm.train.exchange import NOTHING_OURS, shapes, start_from
from megalm.train.run_directory import find_checkpoint, run_of, tokenizer_of

# What a .metadata of torch.distributed.checkpoint is made of; nothing here does more than hold what it is given.
ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        ("torch.distributed.checkpoint.planner", name)
        for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code; a mistake is a line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind in (*READERS, WRITER):
        command = kinds.add_parser(kind)
        command.add_argument("input", type=Path, metavar="DIR")
        command.add_argument("--output", type=Path, required=True, metavar="DIR")
        if kind == WRITER:
            text = "whose AdamW goes on: torch.optim's counts steps in a tensor, DeepSpeed's own in a number"
            command.add_argument("--optimizer", choices=("torch", "deepspeed"), default="torch", help=text)
        else:
            command.add_argument("--config", type=Path, required=True, metavar="YAML", help="of the run to start")
    options = parser.parse_args(arguments)

    def convert() -> None:
        if options.kind == WRITER:
            tag = to_deepspeed(options.input, options.output, numbers=options.optimizer == "deepspeed")
            print(f"Wrote {options.output / tag}: engine.load_checkpoint({str(options.output)!r})")
            return
        config = load_config(options.config, world_size=None)
        model = with_vocabulary(config, load_tokenizer(config.tokenizer.path)).model
        read = READERS[options.kind](options.input, model)
        start_from(model, read, options.input, options.output, say)
        print(f"Wrote {options.output}: megalm train {options.config} run.init_from={options.output}")

    return exit_code(convert)


def say(line: str) -> None:
    print(line, file=sys.stderr)


class MetadataUnpickler(pickle.Unpickler):
    """Refuses every class and function but those that describe tensors."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UserError(f"its .metadata asks for {module}.{name}, which no description of tensors needs: refused")
        return super().find_class(module, name)


class SafeReader(dcp.FileSystemReader):
    """torch's reader of such directories, but for how it reads their description."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Raises UserError for what is damaged or no such description."""
        path = Path(self.path) / ".metadata"
        try:
            metadata = MetadataUnpickler(io.BytesIO(path.read_bytes())).load()
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}: give the directory of one iteration, iter_...") from None
        except Exception as error:  # a damaged pickle raises anything
            raise UserError(f"{path}: damaged: {error}") from None
        if not isinstance(metadata, Metadata):
            raise UserError(f"{path}: describes no tensors")
        if any(Path(info.relative_path).name != info.relative_path for info in metadata.storage_data.values()):
            raise UserError(f"{path}: names files outside of the directory")
        return metadata


def megatron(directory: Path, model: Model) -> Any:
    """Gives our parameters out of a `torch_dist` directory."""
    reader = SafeReader(directory)
    described = reader.read_metadata().state_dict_metadata
    tensors = {key: about for key, about in described.items() if isinstance(about, TensorStorageMetadata)}

    def read(key: str) -> Tensor:
        target = torch.empty(tensors[key].size, dtype=tensors[key].properties.dtype)
        try:
            dcp.load({key: target}, storage_reader=SafeReader(directory), no_dist=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, dcp.api.CheckpointException) as error:
            raise UserError(f"{directory}: cannot read '{key}': {str(error).splitlines()[0]}") from None
        return target

    return lambda scratch: from_megatron(model, shapes(model), tensors, read, say)


def deepspeed(directory: Path, model: Model) -> Any:
    """Gives our parameters out of a universal checkpoint, or the newest one in a directory of them."""
    latest = directory / "latest_universal"
    name = latest.read_bytes().decode(errors="replace").strip() if latest.is_file() else "."
    folder = directory / name / "zero"
    if not folder.is_dir():
        raise UserError(
            f"{directory}: has no folder zero: write it with `python -m deepspeed.checkpoint.ds_to_universal`"
        )

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for path in sorted(folder.glob("*/fp32.pt")):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                tensor = content["param"] if isinstance(content, dict) else content
                yield path.parent.name.removeprefix("module."), tensor.view(tensor.shape)
            except (OSError, RuntimeError, KeyError, AttributeError, pickle.UnpicklingError) as error:
                raise UserError(f"{path}: cannot read: {str(error).splitlines()[0]}") from None

    return lambda scratch: taken_over(tensors(), architecture_of(model), shapes(model), scratch, folder)


def to_deepspeed(path: Path, output: Path, numbers: bool) -> str:
    """Writes the checkpoint that `path` names, a tensor at a time, and returns its name in `output`.

        global_step100_universal/zero/model.norm.weight/{fp32,exp_avg,exp_avg_sq,step}.pt
        global_step100_universal/zero/optimizer_state.pt             of the optimizer as a whole
        global_step100_universal/mp_rank_00_model_states.pt          of the engine
        latest_universal                                             the first's name

    Steps are plain `numbers`, which ZeRO 3 asks for, or tensors. Raises UserError; then nothing is left.
    """
    checkpoint = find_checkpoint(path)
    weights = Weights([checkpoint])
    moments = {kind: Weights([checkpoint], f"optimizer.{kind}.") for kind in ("exp_avg", "exp_avg_sq")}
    steps = Weights([checkpoint], "optimizer.step.")
    for kind, held in (moments | {"step": steps}).items():
        if missing := weights.shapes.keys() - held.shapes.keys():
            raise UserError(
                f"{checkpoint}: has no {kind} of {min(missing)}: DeepSpeed's loader takes AdamW's state alone: name a "
                "run with optimizer.kind=adamw, or take the weights without it: megalm export"
            )
    model = weights.model
    tokenizer = tokenizer_of(run_of(path, checkpoint), checkpoint, weights.state)
    words = min(known(model.vocab_size), tokenizer.vocab_size if tokenizer else known(model.vocab_size))
    theirs = list(entries(weights.shapes, architecture_of(model)))
    step = read_manifest(checkpoint).step
    tag = f"global_step{step}_universal"
    with new_directory(output, NOTHING_OURS, overwrite=False) as directory:
        zero = directory / tag / "zero"
        for entry in theirs:
            folder = zero / entry.theirs
            folder.mkdir(parents=True)
            for name, held in ({"fp32": weights} | moments).items():
                # A part of a tensor is copied, as torch saves all of what it is a part of. Where the model there has
                # more rows of the vocabulary, the loader adds them.
                tensor = joined(held, entry, torch.float32, words).clone()
                _save({"param": tensor, "vocab_tensor": entry.ours[0] in VOCABULARY}, folder / f"{name}.pt")
            count = steps.tensor(entry.ours[0])
            done = int(count) if numbers else count
            _save(done, folder / "step.pt")
        # The loader goes through its optimizer's groups and these in step, and lets these replace its hyper-parameters.
        # Those are the DeepSpeed config's to say, so these are empty, and as many as there can be.
        groups: list[dict[str, Any]] = [{} for _ in theirs]
        of_zero_3 = {"state": {0: {"step": done}}, "param_groups": groups}
        whole = {"ds_version": VERSION, "param_groups": groups, "optimizer_state_dict": of_zero_3}
        _save(whole, zero / "optimizer_state.pt")
        engine = {
            "global_steps": step,
            "global_samples": weights.state["position"]["consumed_samples"],
            "skipped_steps": 0,
            "lr_scheduler": {"last_batch_iteration": step - 1},  # as DeepSpeed's own have it
            "dp_world_size": 1,
            "mp_world_size": 1,
            "ds_version": VERSION,
        }
        _save(engine, directory / tag / ENGINE)
        if numbers:  # one tensor would be counted up by each of ZeRO 3's groups; without this file it refuses to load
            _save(engine, directory / tag / f"zero_pp_rank_0_{ENGINE}")
        write_atomic(directory / "latest_universal", tag.encode())
    return tag


def _save(content: object, path: Path) -> None:
    with replacing(path) as temporary:
        torch.save(content, temporary)


READERS = {"megatron": megatron, "deepspeed": deepspeed}
WRITER = "to_deepspeed"
ENGINE = "mp_rank_00_model_states.pt"
VERSION = "0.19.0"  # of DeepSpeed, whose form is written

if __name__ == "__main__":
    sys.exit(main())
