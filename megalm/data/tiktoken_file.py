"""tiktoken's files: a .tiktoken file lists tokens by rank, a line each: base64 of its bytes, and the rank.

Such a file has neither the pattern that cuts text into words nor special tokens. For the encodings that OpenAI
publishes they are known by the file's name; for any other, NAME.tiktoken.json beside it says them:

    {"pattern": "...", "special_tokens": {"<|endoftext|>": 100257}}
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from megalm.data.tokenizer import EOD, WELL_KNOWN_EODS, Tokenizer
from megalm.errors import UserError


class Scheme(NamedTuple):
    """What a .tiktoken file does not say. `gigatoken` is that library's name for the pattern, if it has one."""

    pattern: str
    special_tokens: dict[str, int]
    gigatoken: str = ""


# What OpenAI's encodings are, as tiktoken's own tiktoken_ext/openai_public.py defines them.
_WORDS = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"""
    r"""|\s+(?!\S)|\s"""
)
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = "|".join(
    (
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    )
)
_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}
SCHEMES = {
    "r50k_base": Scheme(_WORDS, {EOD: 50256}, "gpt2"),
    "p50k_base": Scheme(_WORDS, {EOD: 50256}),
    "cl100k_base": Scheme(_CL100K, {EOD: 100257, **_FIM, "<|endofprompt|>": 100276}, "gpt4"),
    "o200k_base": Scheme(_O200K, {EOD: 199999, "<|endofprompt|>": 200018}, "o200k"),
}


class TiktokenTokenizer(Tokenizer):
    """`content` is the bytes of a .tiktoken file, `source` names it in errors."""

    kind = "tiktoken"

    def __init__(self, content: bytes, scheme: Scheme, source: Path) -> None:
        try:
            import tiktoken
        except ImportError:
            raise UserError(
                f"{source}: .tiktoken files need tiktoken: install it with `pip install 'megalm[tiktoken]'`"
            ) from None
        self.ranks = _parse(content, source)
        specials = scheme.special_tokens
        self.eod = next((specials[text] for text in WELL_KNOWN_EODS if text in specials), -1)
        if self.eod < 0:
            raise UserError(f"{source}: no end-of-document token: name one of {', '.join(WELL_KNOWN_EODS[:3])} in it")
        if not all(0 <= number < 2**31 for number in specials.values()):
            raise UserError(f"{source}: the id of a special token is not from 0 to {2**31 - 1}")
        taken = set(self.ranks.values()).intersection(specials.values())
        if taken:
            raise UserError(
                f"{source}: id {min(taken)} is a special token's and another's: these do not belong together"
            )
        try:
            self._encoding = tiktoken.Encoding(
                source.stem, pat_str=scheme.pattern, mergeable_ranks=self.ranks, special_tokens=specials
            )
        except ValueError as error:
            raise UserError(f"{source}: its pattern is none ({' '.join(str(error).split())})") from None
        self.vocab_size = max(*self.ranks.values(), *specials.values()) + 1
        self.special_tokens = tuple(specials)
        self.content, self.scheme, self._source = content, scheme, source
        about = json.dumps([scheme.pattern, specials], sort_keys=True).encode()
        self.fingerprint = xxhash.xxh3_128_hexdigest(content + about)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.content, self.scheme, self._source)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encoding.encode_ordinary(text) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        specials = set(self.scheme.special_tokens.values())
        known = b"".join(self._bytes().get(i, b"") for i in ids if i not in specials)
        return known.decode(errors="replace")

    def _bytes(self) -> dict[int, bytes]:
        if not hasattr(self, "_spelled"):
            self._spelled = {rank: token for token, rank in self.ranks.items()}
        return self._spelled

    def _byte_lengths(self) -> np.ndarray:
        lengths = np.zeros(self.vocab_size, np.int64)
        for token, rank in self.ranks.items():
            lengths[rank] = len(token)
        return lengths


def load_tiktoken(path: Path) -> TiktokenTokenizer:
    """The tokenizer of a .tiktoken file; a `UserError` names what is damaged or not known."""
    beside = path.with_name(f"{path.name}.json")
    if beside.exists():
        try:
            content = json.loads(beside.read_bytes())
            scheme = Scheme(str(content["pattern"]), {str(k): int(v) for k, v in content["special_tokens"].items()})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f'{beside}: not of the form {{"pattern": "...", "special_tokens": {{"<|endoftext|>": 100257}}}}'
            ) from None
    elif path.stem in SCHEMES:
        scheme = SCHEMES[path.stem]
    else:
        raise UserError(
            f"{path}: its name is none of {', '.join(SCHEMES)}, so how it cuts text is not known: say it in "
            f'{beside.name} beside it: {{"pattern": "...", "special_tokens": {{"<|endoftext|>": 100257}}}}'
        )
    return TiktokenTokenizer(path.read_bytes(), scheme, path)


def _parse(content: bytes, source: Path) -> dict[bytes, int]:
    try:
        pairs = [line.split() for line in content.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise UserError(f"{source}: damaged, or not a .tiktoken file: write or fetch it again") from None
    if not ranks or len(set(ranks.values())) != len(pairs) or min(ranks.values()) < 0:
        raise UserError(f"{source}: damaged: its ranks are not one a token: write or fetch it again")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{source}: damaged: no token for the byte {missing[0]}: write or fetch it again")
    return ranks
