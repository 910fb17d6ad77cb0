from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prepared import write_prepared

from megalm.cli import main
from megalm.data.dataset import Source
from megalm.data.manifest import Manifest
from megalm.data.prepare import Settings, prepare
from megalm.errors import UserError
from megalm.files import file_checksum

WriteSource = Callable[..., Path]


@pytest.fixture
def prepared(tmp_path: Path) -> list[Path]:
    """Two directories of several shards each, and skipped records, made from text."""
    directories = []
    for name in ("one", "two"):
        texts = [f"{name} {i} " * (i % 5) for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare([tmp_path / f"{name}.jsonl"], "byte", tmp_path / name, Settings(unit_bytes=500))
        directories.append(tmp_path / name)
    return directories


def tokens_of(directory: Path) -> list[int]:
    manifest = Manifest.load(directory)
    source = Source("s", directory, manifest.tokenizer.fingerprint)
    out = np.empty(source.tokens, np.int64)
    source.read(0, out)
    return out.tolist()


def test_the_tokens_are_those_of_the_inputs_back_to_back(prepared: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "whole"
    assert main(["data", "merge", *map(str, prepared), "--output", str(output)]) == 0
    assert tokens_of(output) == tokens_of(prepared[0]) + tokens_of(prepared[1])
    manifests = [Manifest.load(directory) for directory in prepared]
    assert all(len(manifest.shards) > 1 for manifest in manifests)
    merged = Manifest.load(output)
    [shard] = merged.shards
    assert merged.documents == sum(manifest.documents for manifest in manifests)
    assert merged.text_bytes == sum(manifest.text_bytes for manifest in manifests)
    assert merged.skipped == {"empty": 24}
    assert merged.tokenizer == manifests[0].tokenizer
    assert file_checksum(output / "shard-00000.bin") == shard.bin_checksum
    assert sorted(os.listdir(output)) == ["manifest.json", "shard-00000.bin", "shard-00000.idx"]
    assert main(["data", "verify", str(output)]) == 0


def test_an_output_that_is_there_is_replaced_only_when_told(prepared: list[Path], tmp_path: Path) -> None:
    command = ["data", "merge", *map(str, prepared), "--output", str(tmp_path / "whole")]
    assert [main(command), main(command), main([*command, "--overwrite"])] == [0, 2, 0]


def test_directories_of_other_tokenizers_or_dtypes_are_refused_by_name(tmp_path: Path) -> None:
    from megalm.data.merge import merge

    first = write_prepared(tmp_path / "first", [[[1, 0]]])
    other = write_prepared(tmp_path / "other", [[[1, 0]]], tokenizer_fingerprint="abc")
    small = write_prepared(tmp_path / "small", [[[1, 0]]], dtype="uint16", vocab_size=300)
    with pytest.raises(UserError, match=rf"{other}: .* abc\), while {first} was .* f00d\)"):
        merge([first, other], tmp_path / "whole")
    with pytest.raises(UserError, match=rf"{small}: stored as uint16, while {first} is stored as int32"):
        merge([first, small], tmp_path / "whole")
    with pytest.raises(UserError, match=rf"{tmp_path}/none: there is no such directory"):
        merge([first, tmp_path / "none"], tmp_path / "whole")
    assert not (tmp_path / "whole").exists()


def test_altered_data_are_refused_and_not_given_a_new_checksum(
    prepared: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (prepared[1] / "shard-00001.bin").open("rb+") as file:
        file.write(b"\x07")
    assert main(["data", "merge", *map(str, prepared), "--output", str(tmp_path / "whole")]) == 2
    assert f"{prepared[1]}/shard-00001.bin: altered" in capsys.readouterr().err
    assert not (tmp_path / "whole").exists()


def test_directories_without_a_document_leave_nothing_to_merge(tmp_path: Path) -> None:
    from megalm.data.merge import merge

    empty = write_prepared(tmp_path / "empty", [])
    with pytest.raises(UserError, match=rf"{empty}: there is no document"):
        merge([empty], tmp_path / "whole")
