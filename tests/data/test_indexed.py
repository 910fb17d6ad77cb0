from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megalm._indexed_dataset import Writer
from megalm.data.indexed import open_shard, token_dtype
from megalm.data.manifest import Manifest, Shard, TokenizerRecord
from megalm.errors import UserError


@pytest.mark.parametrize(
    ("dtype", "documents", "tokens", "reason"),
    [
        ("uint16", 3, 8, ""),
        ("int32", 3, 8, "uint16 tokens, while the manifest says int32"),
        ("uint16", 2, 8, "3 documents, while the manifest says 2"),
        ("uint16", 3, 9, "8 tokens, while the manifest says 9"),
    ],
)
def test_a_shard_must_be_what_the_manifest_says(
    tmp_path: Path, dtype: str, documents: int, tokens: int, reason: str
) -> None:
    with Writer(tmp_path / "shard-00000", "uint16") as writer:
        writer.append(np.arange(8, dtype=np.int32), np.array([3, 1, 4]))
    shard = Shard("shard-00000", documents, tokens, 0, "", "")
    manifest = Manifest(TokenizerRecord("byte", "byte", "", 257, 256), dtype, {}, (shard,))
    if reason:
        with pytest.raises(UserError, match=rf"{tmp_path}/shard-00000\.idx: {reason}"):
            open_shard(tmp_path, manifest, shard)
    else:
        reader = open_shard(tmp_path, manifest, shard)
        assert [reader.document(i).tolist() for i in range(3)] == [[0, 1, 2], [3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    ("vocab_size", "name"), [(257, "uint16"), (65499, "uint16"), (65500, "int32"), (65536, "int32")]
)
def test_small_vocabularies_are_stored_in_two_bytes_as_megatron_does(vocab_size: int, name: str) -> None:
    assert token_dtype(vocab_size).name == name
