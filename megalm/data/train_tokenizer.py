"""Trains a tokenizer on text, and writes it as a directory that `load_tokenizer` reads.

    documents --every 50th held out--> sentences --> sentencepiece | Hugging Face's BPE trainer --> DIR

Both kinds are byte-pair encodings that can spell any bytes and normalise nothing, so they are lossless. The same text
gives the same tokenizer, byte for byte. From a large corpus an even sample of the documents is taken.
"""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import xxhash

from megalm.data.directory import new_directory
from megalm.data.sources import EMPTY, Unit, list_files, make_units, read_unit
from megalm.data.tokenizer import EOD, FILES, RECORD, HuggingFaceTokenizer, SentencePieceTokenizer
from megalm.data.workers import run_in_workers
from megalm.errors import UserError
from megalm.files import write_atomic

KINDS = tuple(FILES)
SAMPLE_BYTES = 512 << 20
HELD_EVERY = 50
HELD_BYTES = 1 << 20
SENTENCE_LENGTH = 1 << 12  # trainers take time that grows with the square of a word's length
LARGEST = 1 << 22
LINES = re.compile(r"[^\n]*\n+|[^\n]+")
OWNED = re.compile("|".join(re.escape(name) for name in (RECORD, *FILES.values())))
# How a text is cut before pairs are merged: contractions, words with what leads them, up to three digits, punctuation,
# line ends, spaces. The pattern of OpenAI's cl100k and of Llama 3.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


OnProgress = Callable[[int, int], None]
"""Told how many of the inputs' bytes on disk are read, and how many there are."""


@dataclass(frozen=True)
class TrainReport:
    """What was made. `bytes_per_token` is measured on documents held out of training, if `held_bytes` is not 0, else
    on some that were trained on."""

    kind: str
    vocab_size: int
    documents: int
    text_bytes: int
    bytes_per_token: float
    held_bytes: int
    skipped: dict[str, int]


def train_tokenizer(
    kind: str,
    vocab_size: int,
    inputs: Sequence[Path],
    output: Path,
    *,
    text_key: str = "text",
    sample_bytes: int = SAMPLE_BYTES,
    overwrite: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> TrainReport:
    """Trains a tokenizer of `vocab_size` ids, the end-of-document token among them, and writes it to `output`.

    When all is read, merging goes on for a while, in a process of its own, since it hears no signal.
    A `UserError` says what does not fit: inputs, kind, a vocabulary that the text is too small or too varied for.
    """
    if kind not in KINDS:
        raise UserError(f"--kind {kind}: no such kind: choose {' or '.join(KINDS)}")
    smallest = 258 if kind == "sentencepiece" else 257
    if vocab_size < smallest:
        raise UserError(f"--vocab-size {vocab_size}: too small for 256 bytes and special tokens: at least {smallest}")
    if vocab_size > LARGEST:
        raise UserError(f"--vocab-size {vocab_size}: no tokenizer has that many ids: at most {LARGEST}")
    if sample_bytes < 1:
        raise UserError(f"--sample-bytes {sample_bytes}: must be at least 1")
    units = make_units(list_files(inputs).files)
    with new_directory(output, OWNED, overwrite) as directory:
        sample = _Sample(units, text_key, sample_bytes)
        content, sample = _train_in_worker(kind, vocab_size, sample, on_progress)
        file = directory / FILES[kind]
        tokenizer = (SentencePieceTokenizer if kind == "sentencepiece" else HuggingFaceTokenizer)(content, file)
        record = {
            "format": "megalm-tokenizer",
            "version": 1,
            "kind": kind,
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "checksum": xxhash.xxh3_128_hexdigest(content),
        }
        write_atomic(file, content)
        write_atomic(directory / RECORD, (json.dumps(record, indent=2, sort_keys=True) + "\n").encode())
    measured = sample.held or sample.first
    num_bytes = sum(len(text.encode()) for text in measured)
    num_tokens = sum(map(len, tokenizer.encode_batch(measured)))
    return TrainReport(
        kind=kind,
        vocab_size=tokenizer.vocab_size,
        documents=sample.num_documents,
        text_bytes=sample.text_bytes,
        bytes_per_token=num_bytes / num_tokens,
        held_bytes=num_bytes if sample.held else 0,
        skipped=dict(sorted(sample.skipped.items())),
    )


@dataclass
class _Sample:
    """The documents to train on, and what was seen on the way."""

    units: list[Unit]
    text_key: str
    sample_bytes: int
    held: list[str] = field(default_factory=list)
    first: list[str] = field(default_factory=list)
    num_documents: int = 0
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def documents(self, on_progress: OnProgress) -> Iterator[str]:
        """About `sample_bytes` of documents, evenly from all; some are kept in `held` instead, and in `first`."""
        pieces = [piece for unit in self.units for piece in unit]
        total = sum(piece.disk_bytes for piece in pieces)
        share = min(1.0, self.sample_bytes / max(1, sum(piece.text_bytes for piece in pieces)))
        seen = done = held_bytes = first_bytes = 0
        for unit in self.units:
            for record in read_unit(unit, self.text_key):
                done += record.disk_bytes
                if record.problem:
                    self.skipped[record.problem] += 1
                    continue
                seen += 1
                if int(seen * share) == int((seen - 1) * share):
                    continue
                self.num_documents += 1
                size = len(record.text.encode())
                self.text_bytes += size
                if self.num_documents % HELD_EVERY == 0 and held_bytes < HELD_BYTES:
                    held_bytes += size
                    self.held.append(record.text)
                    continue
                if first_bytes < HELD_BYTES:
                    first_bytes += size
                    self.first.append(record.text)
                on_progress(done, total)
                yield record.text
        on_progress(total, total)
        if self.num_documents == 0 and seen:
            raise UserError(
                f"--sample-bytes {self.sample_bytes}: takes none of the {seen} documents: choose more, as the default"
            )
        if self.num_documents == 0:
            faults = {reason: count for reason, count in self.skipped.items() if reason != EMPTY}
            seen_instead = "; ".join(f"{reason}: {count}" for reason, count in sorted(faults.items()))
            raise UserError(f"--input: no documents to train on{f' ({seen_instead})' if faults else ''}")

    def too_small(self, vocab_size: int, largest: int) -> UserError:
        return UserError(
            f"--vocab-size {vocab_size}: the corpus ({self.text_bytes} bytes) is too small for it: give more text, or "
            f"choose at most {largest}"
        )


def _train_in_worker(kind: str, vocab_size: int, sample: _Sample, on_progress: OnProgress) -> tuple[bytes, _Sample]:
    """The trained tokenizer's file, and the sample as it is after all was read."""
    make = partial(partial, _train, kind, vocab_size)  # a worker makes of it what does the task
    what, mend = "the tokenizer's training", "is memory short?"
    with closing(run_in_workers(make, [(0, sample)], 1, on_progress, what=what, mend=mend)) as results:
        _, trained = next(results)
    return trained


def _train(kind: str, vocab_size: int, sample: _Sample, on_progress: OnProgress) -> tuple[bytes, _Sample]:
    train = _train_sentencepiece if kind == "sentencepiece" else _train_bpe
    return train(_sentences(sample.documents(on_progress)), vocab_size, sample), sample


def _sentences(documents: Iterator[str]) -> Iterator[str]:
    """Cuts documents into lines, line ends kept, below the length at which sentencepiece leaves a sentence out."""
    for document in documents:
        for line in LINES.findall(document):
            for start in range(0, len(line), SENTENCE_LENGTH):
                yield line[start : start + SENTENCE_LENGTH]


def _train_sentencepiece(sentences: Iterator[str], vocab_size: int, sample: _Sample) -> bytes:
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    failure: list[BaseException] = []

    def guarded() -> Iterator[str]:  # sentencepiece turns whatever is raised in here into a RuntimeError
        try:
            yield from sentences
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            failure.append(error)
            raise

    try:
        SentencePieceTrainer.train(
            sentence_iterator=guarded(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=4 * SENTENCE_LENGTH,  # in bytes,
            unk_id=0,
            eos_id=1,
            eos_piece=EOD,
            bos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if failure:
            raise failure[0] from None
        if found := re.search(r"too high .* a value <= (\d+)", str(error)):
            raise sample.too_small(vocab_size, int(found[1])) from None
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(
                f"--vocab-size {vocab_size}: too small for the characters of the corpus: choose at least {found[1]}"
            ) from None
        reason = str(error).splitlines()[0]
        raise UserError(f"--input: sentencepiece cannot be trained on this text ({reason}): try --kind bpe") from None
    return model.getvalue()


def _train_bpe(sentences: Iterator[str], vocab_size: int, sample: _Sample) -> bytes:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise sample.too_small(vocab_size, reached)
    return tokenizer.to_str().encode()
