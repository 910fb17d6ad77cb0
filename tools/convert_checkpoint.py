"""Other frameworks' checkpoints of a GPT or Llama to one that a megalm run can start from.

    python tools/convert_checkpoint.py megatron checkpoints/iter_0001000 --config run.yaml --output start
    python tools/convert_checkpoint.py deepspeed checkpoints/universal --config run.yaml --output start
    megalm train run.yaml run.init_from=start

megatron     a `torch_dist` directory of Megatron-LM, of any layout
deepspeed    a universal checkpoint (`python -m deepspeed.checkpoint.ds_to_universal`) of a model of transformers

The model section of the config says what the model is; it is checked against every tensor. Weights are taken, not the
optimizer's state. Nothing in the files is run: Megatron's .metadata is a pickle, of which only the classes that
describe tensors are let through, and torch reads tensors with `weights_only`.
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

from megalm.checkpoint.huggingface import architecture_of, taken_over
from megalm.checkpoint.interop import from_megatron
from megalm.cli import exit_code
from megalm.config import load_config
from megalm.config.sections import Model
from megalm.data.tokenizer import load_tokenizer
from megalm.errors import UserError
from megalm.train.build import with_vocabulary
from megalm.train.exchange import shapes, start_from

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
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code; a mistake is a line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=READERS)
    parser.add_argument("input", type=Path, metavar="DIR")
    parser.add_argument("--config", type=Path, required=True, metavar="YAML", help="of the run that is to start")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)

    def convert() -> None:
        config = load_config(options.config, world_size=None)
        model = with_vocabulary(config, load_tokenizer(config.tokenizer.path)).model
        read = READERS[options.kind](options.input, model)
        start_from(model, read, options.input, options.output, say=lambda line: None)
        print(f"Wrote {options.output}: megalm train {options.config} run.init_from={options.output}")

    return exit_code(convert)


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

    return lambda scratch: from_megatron(model, shapes(model), tensors, read)


def deepspeed(directory: Path, model: Model) -> Any:
    """Gives our parameters out of a universal checkpoint, or the newest one in a directory of them."""
    latest = directory / "latest_universal"
    folder = (directory / latest.read_text().strip() if latest.is_file() else directory) / "zero"
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


READERS = {"megatron": megatron, "deepspeed": deepspeed}

if __name__ == "__main__":
    sys.exit(main())
