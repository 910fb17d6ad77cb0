from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megalm.data.manifest import Manifest, Shard, TokenizerRecord
from megalm.errors import UserError

MANIFEST = Manifest(
    tokenizer=TokenizerRecord("/data/tok", "bpe", "f00d", 1000, 0),
    dtype="uint16",
    skipped={"empty": 2, "malformed JSON": 1},
    shards=(Shard("shard-00000", 3, 30, 90, "aa", "bb"), Shard("shard-00002", 1, 5, 12, "cc", "dd")),
)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    assert Manifest.load(tmp_path) == MANIFEST
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_totals_are_sums_over_the_shards(tmp_path: Path) -> None:
    MANIFEST.save(tmp_path)
    content = json.loads((tmp_path / "manifest.json").read_bytes())
    assert (content["documents"], content["tokens"], content["text_bytes"]) == (4, 35, 102)


def test_the_fingerprint_names_the_data_and_not_where_its_tokenizer_lies() -> None:
    moved = replace(MANIFEST, tokenizer=replace(MANIFEST.tokenizer, path="/elsewhere"))
    assert moved.fingerprint == MANIFEST.fingerprint
    other_shard = replace(MANIFEST.shards[1], bin_checksum="ce")
    others = [
        replace(MANIFEST, shards=(MANIFEST.shards[0], other_shard)),
        replace(MANIFEST, shards=MANIFEST.shards[::-1]),
        replace(MANIFEST, tokenizer=replace(MANIFEST.tokenizer, fingerprint="feed")),
        replace(MANIFEST, dtype="int32"),
    ]
    assert len({manifest.fingerprint for manifest in [MANIFEST, *others]}) == 5


def test_a_directory_without_a_manifest_is_not_prepared_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no manifest\.json inside, so it is not prepared data"):
        Manifest.load(tmp_path)
    with pytest.raises(UserError, match="nowhere: there is no such directory"):
        Manifest.load(tmp_path / "nowhere")


def edited(path: tuple[str | int, ...], value: Any) -> Callable[[Any], Any]:
    def edit(content: Any) -> Any:
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return content

    return edit


def without(key: str) -> Callable[[Any], Any]:
    return lambda content: {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda content: [content], "not a megalm data manifest"),
        (without("format"), "not a megalm data manifest"),
        (edited(("format",), "other"), "not a megalm data manifest"),
        (edited(("version",), 2), "version 2 is not the one"),
        (without("version"), "'version' is missing"),
        (without("shards"), "'shards' is missing"),
        (without("tokens"), "'tokens' is missing"),
        (edited(("tokens",), 36), "tokens is not the sum"),
        (edited(("dtype",), "int64"), "dtype 'int64' is none of"),
        (edited(("skipped",), 3), "damaged"),
        (edited(("skipped", "empty"), "3"), "not a count"),
        (edited(("tokenizer",), None), "damaged"),
        (edited(("tokenizer", "eod"), 1000), "outside of the vocabulary"),
        (edited(("tokenizer", "fingerprint"), 7), "fingerprint is not text"),
        (edited(("shards", 0, "tokens"), -1), "tokens is not a count"),
        (edited(("shards", 0, "tokens"), 1.5), "tokens is not a count"),
        (edited(("shards", 0, "documents"), True), "documents is not a count"),
        (edited(("shards", 0, "name"), "../secret"), "plain file names"),
        (edited(("shards", 0, "name"), "shard-00002"), "distinct"),
        (edited(("shards", 0, "extra"), 1), "damaged"),
    ],
)
def test_a_malformed_manifest_is_one_line_that_names_the_file(
    tmp_path: Path, edit: Callable[[Any], Any], reason: str
) -> None:
    MANIFEST.save(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))
    with pytest.raises(UserError, match=reason) as caught:
        Manifest.load(tmp_path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"a": }'])
def test_what_is_no_json_is_one_line_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json: damaged \(") as caught:
        Manifest.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_is_nested_without_end_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"manifest.json: damaged"):
        Manifest.load(tmp_path)
