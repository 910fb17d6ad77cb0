"""Files of tiktoken's form, made of other tokenizers."""

from __future__ import annotations

import base64
import json
from pathlib import Path


def write_ranks(tokenizer: Path, path: Path) -> Path:
    """The byte-pair encoding of a byte-level tokenizer.json as a .tiktoken file."""
    vocabulary = json.loads(tokenizer.read_bytes())["model"]["vocab"]
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's alphabet writes as themselves
    others = [byte for byte in range(256) if byte not in letters]
    spelled = {chr(byte): byte for byte in letters} | {chr(256 + i): byte for i, byte in enumerate(others)}
    tokens = [token for token in sorted(vocabulary, key=vocabulary.__getitem__) if token != "<|endoftext|>"]
    lines = [f"{base64.b64encode(bytes(map(spelled.get, token))).decode()} {i}\n" for i, token in enumerate(tokens)]  # type: ignore[arg-type]
    path.write_text("".join(lines))
    return path
