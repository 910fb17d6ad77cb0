"""`manifest.json` of a prepared data directory: the only file that is read whole when training starts.

    DIR/manifest.json                              written last: a directory without one is not prepared data
    DIR/shard-00000.bin, DIR/shard-00000.idx, ...  tokens, in Megatron's format (`megalm.data.indexed`)

It records what the tokens mean (tokenizer, end-of-document id), how many there are in each shard, and each file's
checksum. Its `fingerprint` names the data: equal fingerprints mean equal tokens in equal order.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from megalm.errors import UserError
from megalm.files import write_atomic

NAME = "manifest.json"
FORMAT = "megalm-data"
VERSION = 1
DTYPES = ("uint16", "int32")


@dataclass(frozen=True)
class TokenizerRecord:
    """The tokenizer that made the tokens; `path` is where it was then, `fingerprint` is what it was."""

    path: str
    kind: str
    fingerprint: str
    vocab_size: int
    eod: int


@dataclass(frozen=True)
class Shard:
    """One .bin/.idx pair: `tokens` counts each document's end-of-document token, `text_bytes` is its text as UTF-8."""

    name: str
    documents: int
    tokens: int
    text_bytes: int
    bin_checksum: str
    idx_checksum: str


@dataclass(frozen=True)
class Manifest:
    """A prepared data directory. `skipped` counts the records that were left out, by reason."""

    tokenizer: TokenizerRecord
    dtype: str
    skipped: dict[str, int]
    shards: tuple[Shard, ...]

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """xxh3-128 of the manifest's canonical JSON, less the tokenizer's path: moving a file does not change data."""
        content = self.to_json()
        del content["tokenizer"]["path"]
        return _digest(content)

    def to_json(self) -> dict[str, Any]:
        """What the file holds."""
        totals = {"documents": self.documents, "tokens": self.tokens, "text_bytes": self.text_bytes}
        return {
            "format": FORMAT,
            "version": VERSION,
            **asdict(self),
            "shards": [asdict(s) for s in self.shards],
            **totals,
        }

    def save(self, directory: Path) -> None:
        """Writes `directory/manifest.json` in one indivisible step, with a checksum of its own."""
        content = self.to_json()
        content["checksum"] = _checksum(content)
        text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomic(directory / NAME, text.encode())

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Reads and checks `directory/manifest.json`; a `UserError` names the file where it is missing or malformed."""
        path = directory / NAME
        if not directory.is_dir():
            raise UserError(f"{directory}: there is no such directory: write it with `megalm data prepare`")
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise UserError(
                f"{directory}: no {NAME} inside, so it is not prepared data: write it with `megalm data prepare`"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: damaged ({_one_line(error)}): prepare the data again") from None
        try:
            return cls._from_json(content)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged ({_one_line(error)}): prepare the data again") from None

    @classmethod
    def _from_json(cls, content: Any) -> Manifest:
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f'this is not a megalm data manifest (no "format": "{FORMAT}")')
        if content["version"] != VERSION:
            raise UserError(f"version {content['version']!r} is not the one that this megalm reads ({VERSION})")
        manifest = cls(
            tokenizer=_typed(TokenizerRecord, content["tokenizer"]),
            dtype=content["dtype"],
            skipped={str(reason): _count(count) for reason, count in dict(content["skipped"]).items()},
            shards=tuple(_typed(Shard, shard) for shard in content["shards"]),
        )
        if manifest.dtype not in DTYPES:
            raise ValueError(f"dtype {manifest.dtype!r} is none of {', '.join(DTYPES)}")
        if not 0 <= manifest.tokenizer.eod < manifest.tokenizer.vocab_size:
            raise ValueError("the end-of-document id is outside of the vocabulary")
        names = [shard.name for shard in manifest.shards]
        if len(set(names)) != len(names) or any(Path(name).name != name for name in names):
            raise ValueError("shard names are not distinct plain file names")
        for total in ("documents", "tokens", "text_bytes"):
            if content[total] != getattr(manifest, total):
                raise ValueError(f"{total} is not the sum over the shards")
        # Last, as it says least of what is wrong. What others write, or older versions wrote, has no checksum.
        if "checksum" in content and content["checksum"] != _checksum(content):
            raise ValueError("its checksum is not that of what it says")
        return manifest


def _checksum(content: dict[str, Any]) -> str:
    """The digest of all else in a manifest."""
    return _digest({key: value for key, value in content.items() if key != "checksum"})


def _digest(content: dict[str, Any]) -> str:
    """xxh3-128 of canonical JSON."""
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())


def _typed(kind: type, fields: dict[str, Any]) -> Any:
    """An instance of the flat dataclass `kind` whose fields are text or counts, or an error that names the field."""
    for name, annotation in kind.__annotations__.items():
        if annotation == "int":
            _count(fields[name], name)
        elif not isinstance(fields[name], str):
            raise TypeError(f"{name} is not text")
    return kind(**fields)


def _count(value: Any, name: str = "count") -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise TypeError(f"{name} is not a count")
    return value


def _one_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing"
    return " ".join(str(error).split())
