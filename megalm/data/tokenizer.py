"""Tokenizers: text to ids and back.

    byte            ids 0 to 255 are bytes, 256 ends a document; needs no training
    sentencepiece   a .model file
    bpe, ...        a Hugging Face tokenizer.json
    tiktoken        a .tiktoken file (`megalm.data.tiktoken_file`)

What `megalm tokenizer train` makes (`megalm.data.train_tokenizer`) is lossless: decode(encode(text)) == text for every
text, because nothing is normalised and what is not in the vocabulary is spelled in bytes. A text that spells out the
end-of-document token is text, and never becomes that token.

A directory that it wrote holds the tokenizer's file and `megalm-tokenizer.json`, with the file's checksum.
"""

from __future__ import annotations

import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import xxhash

from megalm.errors import UserError

RECORD = "megalm-tokenizer.json"
FILES = {"sentencepiece": "tokenizer.model", "bpe": "tokenizer.json"}
EOD = "<|endoftext|>"
WELL_KNOWN_EODS = (EOD, "<|end_of_text|>", "</s>", "<｜end▁of▁sentence｜>", "<eos>", "<|eos|>", "<eod>", "<|eod|>")
SPACE = "▁"  # U+2581, sentencepiece's letter for a space

Encoded = tuple[np.ndarray, np.ndarray]
"""The ids of documents one after the other, int32 or uint32, and int64[documents]: how many each one has."""


class Tokenizer(ABC):
    """Ids are 0 to `vocab_size` - 1; `eod` ends a document; equal fingerprints mean equal tokenizers.

    `content` is the bytes of its file. A tokenizer can be pickled: it goes to worker processes as it was read here.
    """

    kind: str
    vocab_size: int
    eod: int
    fingerprint: str
    content: bytes = b""
    special_tokens: tuple[str, ...] = ()
    """What a text may spell without its becoming the token."""
    batch_bytes: ClassVar[int] = 1 << 20  # the libraries need some hundred bytes a token
    hard_texts: tuple[bytes, ...] = ()
    """UTF-8 that makes `encode_batch` treat a text in its own way."""

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without `eod`."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abstractmethod
    def _byte_lengths(self) -> np.ndarray:
        """int64[vocab_size]: UTF-8 bytes that each id spells."""

    def encode(self, text: str) -> list[int]:
        """The text's ids, without `eod`."""
        return self.encode_batch([text])[0]

    def encode_documents(self, documents: list[bytes]) -> Encoded:
        """The ids of documents in UTF-8, without `eod`."""
        batch = self.encode_batch([document.decode() for document in documents])
        lengths = np.fromiter(map(len, batch), np.int64, len(batch))
        return np.fromiter(chain.from_iterable(batch), np.int32, int(lengths.sum())), lengths

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that the ids spell; bytes that are no UTF-8 become U+FFFD, `eod` becomes nothing."""
        plain = [int(i) for i in ids]
        for i in plain:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside of the vocabulary of {self.vocab_size}")
        return self._decode([i for i in plain if i != self.eod])

    def byte_length(self, ids: Sequence[int] | np.ndarray) -> int:
        """UTF-8 bytes of the text that the ids spell; `eod` and other special tokens count 0."""
        if not hasattr(self, "_lengths"):
            self._lengths = self._byte_lengths()
        return int(self._lengths[np.asarray(ids, np.int64)].sum())


class ByteTokenizer(Tokenizer):
    """UTF-8 itself."""

    kind = "byte"
    vocab_size = 257
    eod = 256
    fingerprint = xxhash.xxh3_128_hexdigest(b"byte")

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_documents(self, documents: list[bytes]) -> Encoded:
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        return np.frombuffer(b"".join(documents), np.uint8).astype(np.int32), lengths

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def _byte_lengths(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int64)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. `content` is the bytes of the .model file, `source` names it in errors."""

    kind = "sentencepiece"

    def __init__(self, content: bytes, source: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            if not content:
                raise ValueError("it is empty")
            self._processor: Any = SentencePieceProcessor(model_proto=content)
        except (RuntimeError, ValueError):
            raise UserError(f"{source}: damaged, or not a sentencepiece model: write or fetch it again") from None
        self.vocab_size = self._processor.vocab_size()
        pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        self._pieces = pieces
        eos = self._processor.eos_id()
        known = {piece: i for i, piece in enumerate(pieces) if self._processor.is_control(i)}
        self.eod = eos if eos >= 0 else next((known[piece] for piece in WELL_KNOWN_EODS if piece in known), -1)
        if self.eod < 0:
            raise UserError(_no_eod(source))
        self.fingerprint = xxhash.xxh3_128_hexdigest(content)
        self.content, self._source = content, source
        self.special_tokens = tuple(known)
        # Text that holds sentencepiece's own letter for a space would come back with a space: spell it in bytes. Not
        # in a model that puts a space before every text: it is not lossless in any case, and cutting would add more.
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        first = self._processor.encode("a")[:1]
        cuts = all(map(self._processor.is_byte, ids)) and bool(first) and not pieces[first[0]].startswith(SPACE)
        self._space_ids = ids if cuts else None
        self.hard_texts = (SPACE.encode(),) if cuts else ()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.content, self._source)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        batch: list[list[int]] = self._processor.encode(texts, num_threads=1)
        if self._space_ids is not None:
            for i, text in enumerate(texts):
                if SPACE in text:
                    batch[i] = self._encode_in_parts(text.split(SPACE), self._space_ids)
        return batch

    def _encode_in_parts(self, parts: list[str], between: list[int]) -> list[int]:
        ids: list[int] = []
        for part in self._processor.encode(parts, num_threads=1):
            ids += part + between
        return ids[: -len(between)]

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def _byte_lengths(self) -> np.ndarray:
        def length(i: int, piece: str) -> int:
            if self._processor.is_byte(i):
                return 1
            if self._processor.is_control(i) or self._processor.is_unknown(i):
                return 0
            return len(piece.replace(SPACE, " ").encode())

        return np.array([length(i, piece) for i, piece in enumerate(self._pieces)], np.int64)


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json of Hugging Face's `tokenizers`. `content` is the file's bytes, `source` names it in errors."""

    def __init__(self, content: bytes, source: Path) -> None:
        # Preparation runs a process a core; threads inside of each would only get in each other's way.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        import tokenizers

        try:
            parsed = json.loads(content)
            added = {token["content"]: token for token in parsed.get("added_tokens") or []}
            eod = next((text for text in WELL_KNOWN_EODS if text in added), None)
            if eod is not None:
                added[eod]["special"] = True  # so that text that spells it is not taken for it
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(parsed))
        except Exception as error:  # what `tokenizers` raises is a plain Exception
            reason = " ".join(str(error).split())
            raise UserError(f"{source}: damaged, or not a tokenizer.json ({reason}): write or fetch it again") from None
        if eod is None:
            raise UserError(_no_eod(source))
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.content, self._source = content, source
        self.special_tokens = tuple(text for text, token in added.items() if token["special"])
        self._vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self._added = added
        self._is_byte_level = '"ByteLevel"' in json.dumps(parsed.get("decoder"))
        self.kind = str(parsed["model"].get("type", "BPE")).lower()
        self.vocab_size = max(self._vocabulary.values()) + 1
        self.eod = self._vocabulary[eod]
        self.fingerprint = xxhash.xxh3_128_hexdigest(content)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.content, self._source)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def _byte_lengths(self) -> np.ndarray:
        def length(token: str) -> int:
            if token in self._added:
                return 0 if self._added[token]["special"] else len(token.encode())
            if self._is_byte_level:  # a letter a byte
                return len(token)
            return 1 if re.fullmatch(r"<0x[0-9A-F]{2}>", token) else len(token.replace(SPACE, " ").encode())

        lengths = np.zeros(self.vocab_size, np.int64)
        for token, i in self._vocabulary.items():
            lengths[i] = length(token)
        return lengths


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer at `path`: `byte`, a directory that `megalm tokenizer train` wrote, a tokenizer.json, a .model or a
    .tiktoken file.

    A `UserError` names what is missing, damaged, or without an end-of-document token.
    """
    if path == "byte":
        return ByteTokenizer()
    location = Path(path)
    if location.is_dir():
        return _load_directory(location)
    if not location.exists():
        raise UserError(
            f"tokenizer {path}: no such file or directory: give `byte`, a directory that `megalm tokenizer train` "
            "wrote, a tokenizer.json, a .model or a .tiktoken file"
        )
    if location.suffix == ".json":
        return HuggingFaceTokenizer(location.read_bytes(), location)
    if location.suffix == ".model":
        return SentencePieceTokenizer(location.read_bytes(), location)
    if location.suffix == ".tiktoken":
        from megalm.data.tiktoken_file import load_tiktoken

        return load_tiktoken(location)
    raise UserError(
        f"tokenizer {path}: of no known kind: give a directory, a tokenizer.json, a .model or a .tiktoken file"
    )


def _load_directory(directory: Path) -> Tokenizer:
    path = directory / RECORD
    try:
        record = json.loads(path.read_bytes())
        kind, checksum, vocab_size, eod = (record[key] for key in ("kind", "checksum", "vocab_size", "eod"))
        file = directory / FILES[kind]
    except FileNotFoundError:
        raise UserError(
            f"tokenizer {directory}: no {RECORD} inside, so `megalm tokenizer train` did not write it: give its "
            "tokenizer.json or .model file"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: damaged: train the tokenizer again") from None
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file}: the file is missing: train the tokenizer again") from None
    if xxhash.xxh3_128_hexdigest(content) != checksum:
        raise UserError(f"{file}: damaged: its checksum is not the one in {RECORD}: train the tokenizer again")
    tokenizer = (SentencePieceTokenizer if kind == "sentencepiece" else HuggingFaceTokenizer)(content, file)
    if (tokenizer.vocab_size, tokenizer.eod) != (vocab_size, eod):
        raise UserError(f"{path}: damaged: not the vocabulary of {file.name}: train the tokenizer again")
    return tokenizer


def _no_eod(source: Path) -> str:
    return f"{source}: no end-of-document token: add one of the special tokens {', '.join(WELL_KNOWN_EODS[:3])}"
