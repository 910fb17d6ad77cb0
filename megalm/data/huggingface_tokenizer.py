"""A tokenizer in the form that transformers' AutoTokenizer loads: tokenizer.json and tokenizer_config.json.

    tokenizer.json     as it is, but no template adds tokens that the model was never shown
    .tiktoken, byte    bytes as letters, merges from the ranks
    sentencepiece      pieces, merges from the scores (BPE) or the scores themselves (unigram); the .model beside it

Byte-pair encodings of both kinds join, again and again, the neighbours whose union is the best token. Merges say the
same as a list of pairs: for each token, from the best, all cuts into two tokens.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megalm.data.tiktoken_file import TiktokenTokenizer
from megalm.data.tokenizer import EOD, SPACE, ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer

ADDING_NOTHING = ("ByteLevel", "Sequence")  # post-processors
PROBES = (
    "Hello, world! It's 2024; x = [1, 22, 333]\n",
    "  def f(self):\n\t\treturn {'a': 0.5}   # spaces   \n\n\n",
    "Größe, naïve, Ελληνικά, русский, 中文 日本語 한국어 😀👩‍👩‍👧 ﬁ ½",
    " leading, trailing ",
)


def write_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int | None) -> list[str]:
    """Writes the files to `directory`; `max_length` is the most tokens that the model takes. Returns what could not be
    expressed, a line each."""
    content, eod = tokenizer_json(tokenizer)
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eod,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        **({"model_max_length": max_length} if max_length else {}),
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(about, indent=2, ensure_ascii=False), encoding="utf-8")
    if isinstance(tokenizer, SentencePieceTokenizer):
        (directory / "tokenizer.model").write_bytes(tokenizer.content)
    return _differences(tokenizer, content)


def _differences(tokenizer: Tokenizer, content: Mapping[str, Any]) -> list[str]:
    """Where the written form encodes probes otherwise."""
    written = HuggingFaceTokenizer(json.dumps(content).encode(), Path("tokenizer.json"))
    different = [probe for probe in PROBES if written.encode(probe) != tokenizer.encode(probe)]
    lines = [f"tokenizer.json encodes {different[0]!r} otherwise than the run's tokenizer did"] if different else []
    if SPACE.encode() in tokenizer.hard_texts:
        lines.append(f"tokenizer.json takes the letter {SPACE} (U+2581) for a space; the run's tokenizer keeps it")
    return lines


def tokenizer_json(tokenizer: Tokenizer) -> tuple[dict[str, Any], str]:
    """What stands in tokenizer.json, and the text of the token that ends a document."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        content = json.loads(tokenizer.content)
        content["post_processor"] = _without_template(content.get("post_processor"))
        content["truncation"] = content["padding"] = None
        eod = next(token for token in content["added_tokens"] if token["id"] == tokenizer.eod)
        eod["special"] = True
        return content, eod["content"]
    if isinstance(tokenizer, ByteTokenizer):
        return _byte_level({bytes([byte]): byte for byte in range(256)}, {EOD: tokenizer.eod}, None), EOD
    if isinstance(tokenizer, TiktokenTokenizer):
        specials = tokenizer.scheme.special_tokens
        eod_text = next(text for text, number in specials.items() if number == tokenizer.eod)
        return _byte_level(tokenizer.ranks, specials, tokenizer.scheme.pattern), eod_text
    assert isinstance(tokenizer, SentencePieceTokenizer)
    return _sentencepiece(tokenizer)


def _without_template(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    if processor is None or processor["type"] not in ADDING_NOTHING:
        return None
    if processor["type"] == "Sequence":
        kept = [part for part in map(_without_template, processor["processors"]) if part]
        return {"type": "Sequence", "processors": kept} if kept else None
    return processor


def _json(
    model: dict[str, Any], specials: Mapping[str, int], defined: Mapping[str, int] = MappingProxyType({}), **parts: Any
) -> dict[str, Any]:
    """`defined` are tokens that a text spells and that are found before all others."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    known = {number: {"id": number, "content": text, **flags, "special": True} for text, number in specials.items()}
    known |= {number: {"id": number, "content": text, **flags, "special": False} for text, number in defined.items()}
    empty = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    return {"version": "1.0", **empty, **parts, "added_tokens": [known[n] for n in sorted(known)], "model": model}


def _byte_level(ranks: Mapping[bytes, int], specials: Mapping[str, int], pattern: str | None) -> dict[str, Any]:
    """Bytes are spelled by letters (GPT-2's `bytes_to_unicode`), and a word that is a token is one at once."""
    letters = _letters()
    spelled = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    merges = _merges(spelled)
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    # Oniguruma takes {1,3}+ for a repetition of {1,3}, not for a possessive one; ++, *+ and ?+ mean the same in both.
    regex = (pattern or "").replace("}+", "}")
    cut = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    words = [cut, bytes_alone] if pattern else [bytes_alone]
    return _json(
        # Special tokens are in the vocabulary, too, since ids of others count on from its size.
        {"type": "BPE", "vocab": {**spelled, **specials}, "merges": merges, "ignore_merges": pattern is not None},
        specials,
        pre_tokenizer={"type": "Sequence", "pretokenizers": words},
        decoder=bytes_alone,
    )


def _letters() -> list[str]:
    """The letter of each byte: itself where it can be printed, else one after U+0100, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def _merges(ranks: Mapping[str, int]) -> list[list[str]]:
    """Pairs to join, the best first: the tokens by rank, each in all its cuts into two tokens."""
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        cuts = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += [list(cut) for cut in sorted(cuts, key=lambda cut: (ranks[cut[0]], ranks[cut[1]]))]
    return merges


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> tuple[dict[str, Any], str]:
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # made by protobuf, without types
    proto, kinds = messages.ModelProto.FromString(tokenizer.content), messages.ModelProto.SentencePiece
    normal = proto.normalizer_spec
    pieces = list(proto.pieces)
    unknown = next(i for i, piece in enumerate(pieces) if piece.type == kinds.UNKNOWN)
    specials = {p.piece: i for i, p in enumerate(pieces) if p.type in (kinds.CONTROL, kinds.UNKNOWN)}
    defined = {p.piece: i for i, p in enumerate(pieces) if p.type == kinds.USER_DEFINED}
    fallback = any(piece.type == kinds.BYTE for piece in pieces)
    if proto.trainer_spec.model_type == proto.trainer_spec.BPE:
        vocabulary = {piece.piece: i for i, piece in enumerate(pieces)}
        # The best is the one of the highest score; pieces of other kinds are never the result of a merge.
        normals = sorted((i for i, p in enumerate(pieces) if p.type == kinds.NORMAL), key=lambda i: -pieces[i].score)
        merges = _merges({pieces[i].piece: rank for rank, i in enumerate(normals)})
        model = {"type": "BPE", "vocab": vocabulary, "merges": merges, "unk_token": pieces[unknown].piece}
        model |= {"fuse_unk": True, "byte_fallback": fallback}
    else:
        scores = [[piece.piece, piece.score] for piece in pieces]
        model = {"type": "Unigram", "vocab": scores, "unk_id": unknown, "byte_fallback": fallback}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    normalizers: list[dict[str, Any]] = []
    decoders: list[dict[str, Any]] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if normal.precompiled_charsmap:
        charsmap = base64.b64encode(normal.precompiled_charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if normal.remove_extra_whitespaces:
        normalizers.append({"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if normal.add_dummy_prefix:
        normalizers.append({"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    normalizers.append(replace)
    content = _json(
        model,
        specials,
        defined,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        decoder={"type": "Sequence", "decoders": decoders},
    )
    return content, pieces[tokenizer.eod].piece
