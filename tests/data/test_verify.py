"""`megalm data verify`: every flipped byte is found, and every damaged file named."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.cli import main
from megalm.data.prepare import Settings, prepare
from megalm.data.verify import verify
from megalm.errors import UserError


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    texts = [f"document {i}: " + "né 日本 😀\n\t" * (i % 7 + 1) for i in range(40)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([tmp_path / "in.jsonl"], "byte", tmp_path / "out", Settings(unit_bytes=1000))
    return tmp_path / "out"


def flip(path: Path, at: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_data_as_it_was_prepared_is_intact(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told: list[tuple[int, int]] = []
    assert verify(prepared, lambda done, total: told.append((done, total))) == []
    size = sum(path.stat().st_size for path in prepared.glob("shard-*"))
    assert told[-1] == (size, size)
    assert main(["data", "verify", str(prepared), str(prepared)]) == 0
    assert capsys.readouterr().out == f"{prepared}: intact\n" * 2


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_flipped_byte_anywhere_in_a_shard_is_found_and_only_its_file_named(prepared: Path, suffix: str) -> None:
    rng = random.Random(suffix)
    paths = sorted(prepared.glob(f"*{suffix}"))
    for _ in range(60):
        path = rng.choice(paths)
        at = rng.randrange(path.stat().st_size)
        flip(path, at)
        (problem,) = verify(prepared)
        assert problem.startswith(f"{path}: ")
        flip(path, at)
    assert verify(prepared) == []


def test_a_changed_value_anywhere_in_the_manifest_is_found(prepared: Path) -> None:
    path = prepared / "manifest.json"
    content = path.read_bytes()
    values = [
        i
        for i, byte in enumerate(content)
        if chr(byte).isalnum() and content[:i].rfind(b":") > content[:i].rfind(b"\n")
    ]
    for at in random.Random(0).sample(values, 60):
        flip(path, at)
        with pytest.raises(UserError, match=r"manifest\.json: "):
            verify(prepared)
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda d: (d / "shard-00001.bin").unlink(), "shard-00001.bin: the file is missing"),
        (lambda d: (d / "shard-00001.idx").unlink(), "shard-00001.idx: the file is missing"),
        (lambda d: os.truncate(d / "shard-00001.bin", 5), "shard-00001.bin: altered"),
        (lambda d: os.truncate(d / "shard-00001.idx", 0), "shard-00001.idx: altered"),
        (lambda d: shutil.copy(d / "shard-00000.idx", d / "shard-00001.idx"), "shard-00001.idx: altered"),
        (lambda d: shutil.copy(d / "shard-00000.idx", d / "shard-99999.idx"), "shard-99999.idx: not in manifest.json"),
        (lambda d: (d / "manifest.json").unlink(), "no manifest.json inside"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json: damaged"),
    ],
)
def test_the_command_names_what_is_damaged(
    prepared: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], reason: str
) -> None:
    damage(prepared)
    assert main(["data", "verify", str(prepared)]) == 2
    captured = capsys.readouterr()
    assert reason in captured.out
    assert reason in captured.err
    assert captured.err.count("\n") == 1


def test_shards_that_never_fitted_the_manifest_are_found(prepared: Path) -> None:
    """A directory whose checksums are right, and whose index is another's."""
    manifest = json.loads((prepared / "manifest.json").read_text())
    del manifest["checksum"]
    shutil.copy(prepared / "shard-00000.idx", prepared / "shard-00001.idx")
    manifest["shards"][1]["idx_checksum"] = manifest["shards"][0]["idx_checksum"]
    (prepared / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = verify(prepared)
    assert "shard-00001" in problem


def test_all_problems_of_all_directories_are_listed(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(prepared, other)
    damaged = [*sorted(prepared.glob("*.bin")), sorted(other.glob("*.idx"))[0]]
    for path in damaged:
        flip(path)
    assert main(["data", "verify", str(prepared), str(tmp_path / "nowhere"), str(other)]) == 2
    captured = capsys.readouterr()
    for path in damaged:
        assert str(path) in captured.out
    assert f"{tmp_path / 'nowhere'}: there is no such directory" in captured.out
    assert f"(and {len(damaged)} more, listed above)" in captured.err
