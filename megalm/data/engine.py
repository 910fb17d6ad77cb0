"""Encoding at speed: `gigatoken` where it is installed and gives the reference's ids, else the reference itself.

    reference   the library that the tokenizer's format belongs to (`megalm.data.tokenizer`)
    gigatoken   some fifty times faster; byte-pair encodings of tokenizer.json, sentencepiece and tiktoken files

Ids never depend on the engine. Three things see to it: `choose_engine` compares both on the first documents and on
texts that encoders trip over; special tokens are taken out of what gigatoken is given, because it would find them in
plain text; and documents that the two are known to read differently go to the reference (`GigatokenEncoder`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from tempfile import NamedTemporaryFile
from typing import Any, Protocol
from unicodedata import category

import numpy as np

from megalm.data.tiktoken_file import TiktokenTokenizer
from megalm.data.tokenizer import Encoded, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer
from megalm.errors import UserError

ENGINES = ("auto", "reference", "gigatoken")
# gigatoken's caches only grow, on unusual text by thirty bytes a byte: they are dropped when the process has grown by
GROWTH = 144 << 20
RELOAD_BYTES = 4 << 20  # and not before this much text, because something else may be large

ADVERSARIAL = (
    "日本語のテキスト、中文字符，한국어 문장입니다。",
    "😀👍🏽👨‍👩‍👧‍👦🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿☺️",
    "replaced \ufffd\ufffd bytes \ufffd",
    "\0\x01\x7f\x85\xa0\u2028\u2029\u200b\u200d\u3000\ufeff",
    "e\u0301 o\u0308\u0304 n\u0303 Z\u0351\u036b\u0343 हिन्दी ไทย עִבְרִית العَرَبِيَّة",
    "ﬁ ① Ａ ½ ² Ⅷ ŉ ǆ ﷺ",
    "word" * 5000,
    "長" * 4000,
    "0123456789" * 500,
    "=" * 4000 + "-" * 4000,
    " " * 3000 + "x" + "\n" * 3000 + "\t" * 3000 + "\r\n" * 1000,
    " leading, trailing \n \n\n  mixed \t\n\r\n   \t ",
    "I'm you'RE he'll WE'D it's'S 's don't''ve",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # ok\n\n\n\tif x != y:\r\n\t\tpass",
    "https://example.org/a_b-c?d=e&f=%20#g <b>bold</b> \\n \\u0041",
    "<|endoftext|> a<|endoftext|>b <s> </s> <unk> <0x41> <|im_start|> [INST] <pad> [CLS]",
    "▁ a▁b ▁▁▁",
)


class Encoder(Protocol):
    """What turns documents, as UTF-8, into ids."""

    @property
    def batch_bytes(self) -> int:
        """Text that is best encoded together."""

    def encode_documents(self, documents: list[bytes]) -> Encoded: ...


class Unsupported(Exception):
    """gigatoken cannot be used; says why."""


def choose_engine(wanted: str, tokenizer: Tokenizer, first: Sequence[bytes], say: Callable[[str], None]) -> str:
    """`reference` or `gigatoken`: what encodes for `tokenizer`, after a comparison on the documents `first`.

    `wanted` is one of ENGINES: `auto` falls back on the reference and says why, `gigatoken` raises a `UserError`.
    """
    if wanted not in ENGINES:
        raise UserError(f"--engine {wanted}: no such engine: choose {', '.join(ENGINES)}")
    if wanted == "reference" or (wanted == "auto" and tokenizer.kind == "byte"):
        return "reference"
    try:
        _compare(tokenizer, GigatokenEncoder(tokenizer), [*first, *_adversarial(tokenizer)])
    except Unsupported as reason:
        if wanted == "gigatoken":
            raise UserError(f"--engine gigatoken: {reason}: choose --engine auto or reference") from None
        say(f"encoding with the slower reference: {reason}")
        return "reference"
    return "gigatoken"


def open_engine(name: str, tokenizer: Tokenizer) -> Encoder:
    """The engine that `choose_engine` chose."""
    return GigatokenEncoder(tokenizer) if name == "gigatoken" else tokenizer


class GigatokenEncoder:
    """Encodes as `tokenizer` does, with gigatoken; `Unsupported` says why it cannot."""

    batch_bytes = 2 << 20

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._load = _loader(tokenizer)
        self._backend = _tried(self._load)
        self._limit = _resident_bytes() + GROWTH
        self._since_load = 0

    def encode_documents(self, documents: list[bytes]) -> Encoded:
        if self._since_load > RELOAD_BYTES and _resident_bytes() > self._limit:
            self._backend = None  # first, so that both are never there
            self._backend = self._load()
            self._since_load = 0
        self._since_load += sum(map(len, documents))
        try:
            layout = _tried(lambda: self._backend.encode_batch(documents, parallel=False)).layout
        except Unsupported:  # it has panicked over a text that the reference may well encode
            return self._tokenizer.encode_documents(documents)
        tokens, offsets = np.asarray(layout.content.data), np.asarray(layout.offsets.data)
        if hard := [i for i, document in enumerate(documents) if self._is_hard(document)]:
            return self._with_reference(documents, hard, tokens, offsets)
        return tokens, np.diff(offsets)

    def _is_hard(self, document: bytes) -> bool:
        if document.isascii():
            return False
        return any(text in document for text in self._tokenizer.hard_texts) or _has_unassigned(document)

    def _with_reference(
        self, documents: list[bytes], hard: list[int], tokens: np.ndarray, offsets: np.ndarray
    ) -> Encoded:
        parts = np.split(tokens, offsets[1:-1])
        again, lengths = self._tokenizer.encode_documents([documents[i] for i in hard])
        for i, part in zip(hard, np.split(again, np.cumsum(lengths)[:-1]), strict=True):
            parts[i] = part.astype(tokens.dtype)
        return np.concatenate(parts), np.fromiter(map(len, parts), np.int64, len(parts))


def _loader(tokenizer: Tokenizer) -> Callable[[], Any]:
    """A function that makes gigatoken's encoder for `tokenizer`, one that finds no special token in any text."""
    try:
        import awkward  # noqa: F401  gigatoken needs it only at the first call
        import gigatoken
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json
    except ImportError:
        raise Unsupported("gigatoken is not installed (`pip install 'megalm[fast]'`)") from None
    if isinstance(tokenizer, TiktokenTokenizer) and tokenizer.scheme.gigatoken:
        return lambda: _load_tiktoken(gigatoken, tokenizer.content, tokenizer.scheme.gigatoken)
    if isinstance(tokenizer, SentencePieceTokenizer):
        content = _tried(lambda: json.loads(sentencepiece_to_tokenizer_json(tokenizer.content)))
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        content = json.loads(tokenizer.content)
    else:
        raise Unsupported(f"gigatoken has nothing for this {tokenizer.kind} tokenizer")
    plain = _without_specials(tokenizer, content)
    return lambda: gigatoken.Tokenizer.from_json(plain).backend


def _load_tiktoken(gigatoken: Any, content: bytes, pattern: str) -> Any:
    with NamedTemporaryFile(suffix=".tiktoken") as file:  # it takes nothing but a file
        file.write(content)
        file.flush()
        return gigatoken.Tokenizer.from_tiktoken(file.name, pattern, {}).backend


def _tried(function: Callable[[], Any]) -> Any:
    """What `function` gives; `Unsupported` if gigatoken cannot."""
    try:
        return function()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust derives from nothing narrower
        reason = " ".join(str(error).split())
        raise Unsupported(f"gigatoken fails with this tokenizer ({reason})") from None


def _without_specials(tokenizer: Tokenizer, content: dict[str, Any]) -> str:
    """A tokenizer.json whose special tokens are text like any other."""
    added = content.get("added_tokens") or []
    plain = [token for token in added if not (token["special"] or token["content"] in tokenizer.special_tokens)]
    return json.dumps({**content, "added_tokens": plain, "post_processor": None})


def _compare(tokenizer: Tokenizer, fast: GigatokenEncoder, documents: list[bytes]) -> None:
    """Raises `Unsupported` unless both give the same ids."""
    expected, lengths = tokenizer.encode_documents(documents)
    tokens, fast_lengths = _tried(lambda: fast.encode_documents(documents))
    if not (np.array_equal(lengths, fast_lengths) and np.array_equal(expected, tokens)):
        raise Unsupported("gigatoken gives other ids for this tokenizer")


def _adversarial(tokenizer: Tokenizer) -> list[bytes]:
    """Texts that encoders trip over, and what spells the tokenizer's own special tokens."""
    specials = tokenizer.special_tokens
    return [text.encode() for text in (*ADVERSARIAL, "".join(specials), " a ".join(specials)) if text]


def _resident_bytes() -> int:
    """This process's memory now; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _has_unassigned(document: bytes) -> bool:
    """Whether a character of this UTF-8 has no meaning yet: encoders that know different Unicode versions differ there.

    All characters of three and four bytes are decoded at once, from their first bytes on. Of shorter ones none was
    assigned since Unicode 14.
    """
    content = np.frombuffer(document + b"\0", np.uint8)
    starts = np.flatnonzero(content >= 0xE0)
    if len(starts) == 0:
        return False
    lead, second, third = (content[starts + i].astype(np.uint32) for i in range(3))
    three = (lead & 0x0F) << 12 | (second & 0x3F) << 6 | third & 0x3F
    fourth = content[np.minimum(starts + 3, len(content) - 1)] & 0x3F
    four = ((lead & 0x07) << 18 | (second & 0x3F) << 12 | (third & 0x3F) << 6 | fourth) % 0x110000
    return bool(_unassigned()[np.where(lead >= 0xF0, four, three)].any())


@cache
def _unassigned() -> np.ndarray:
    """bool[0x110000]: characters that this Python's Unicode version has not assigned, and those, hardly ever seen, of
    the last planes."""
    unassigned = np.ones(0x110000, bool)
    unassigned[:0x40000] = np.fromiter((category(chr(i)) == "Cn" for i in range(0x40000)), bool, 0x40000)
    return unassigned
