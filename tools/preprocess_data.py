"""`megalm data prepare` for those who come from Megatron: its flags, and its files.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix my-corpus --tokenizer-type GPT2BPETokenizer \\
        --vocab-file vocab.json --merge-file merges.txt --append-eod --workers 8

writes my-corpus_text_document.bin and .idx: the documents in the order of the input, as Megatron's own tool does. Other
than that one, this reads compressed files, parquet and folders as well, leaves out empty documents instead of storing
them, and goes on where it was interrupted if the same command is given again.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megalm._indexed_dataset import merge
from megalm.cli import exit_code, show
from megalm.cli.data import num_cpus, show_report
from megalm.data.prepare import Progress, Settings, prepare
from megalm.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from megalm.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code; a mistake is a line on stderr."""
    options = _parser().parse_args(arguments)

    def preprocess() -> None:
        tokenizer = TOKENIZERS[options.tokenizer_type](options)
        for key in options.json_keys:
            _preprocess(options, tokenizer, key)

    return exit_code(preprocess)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--input", nargs="+", type=Path, required=True, metavar="PATH", help="JSON lines, parquet, folders of them, ..."
    )
    add(
        "--json-keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="where the text is; each key makes a pair of files",
    )
    add(
        "--output-prefix",
        type=Path,
        required=True,
        metavar="PREFIX",
        help="PREFIX_KEY_document.bin and .idx are written",
    )
    add("--tokenizer-type", choices=TOKENIZERS, required=True)
    add("--tokenizer-model", metavar="PATH", help="tokenizer.json or its folder, a .model or a .tiktoken file")
    add("--vocab-file", type=Path, metavar="PATH", help="GPT2BPETokenizer's vocab.json")
    add("--merge-file", type=Path, metavar="PATH", help="GPT2BPETokenizer's merges.txt")
    add("--append-eod", action="store_true", help="end each document with the end-of-document token")
    add("--workers", type=int, default=num_cpus(), metavar="N", help="processes; one a CPU if not given")
    return parser


def _preprocess(options: argparse.Namespace, tokenizer: Tokenizer, key: str) -> None:
    """One pair of files. Its parts are made first, in a directory beside it; killed at any moment, it can go on."""
    watch = show.Stopwatch()
    prefix = options.output_prefix.with_name(f"{options.output_prefix.name}_{key}_document")
    parts = prefix.with_name(f".{prefix.name}.parts")
    with show.progress("Tokenizing") as update:

        def on_progress(at: Progress) -> None:
            update(at.done, at.total, f"{show.size((at.done - at.done_before) / watch.seconds)}/s, ETA")

        settings = Settings(text_key=key, append_eod=options.append_eod, shuffle=False)
        report = prepare(
            options.input,
            tokenizer,
            parts,
            settings,
            workers=options.workers,
            overwrite=True,
            on_progress=on_progress,
            say=lambda line: print(line, file=sys.stderr),
        )
    assert report.manifest is not None
    merge([parts / shard.name for shard in report.manifest.shards], prefix)
    shutil.rmtree(parts)
    show_report(report, prefix, watch.seconds)


def _from_model(options: argparse.Namespace) -> Tokenizer:
    if options.tokenizer_model is None:
        raise UserError(f"--tokenizer-model: {options.tokenizer_type} needs it: give the path of its file")
    path = Path(options.tokenizer_model)
    if (path / "tokenizer.json").exists():
        path = path / "tokenizer.json"
    return load_tokenizer(str(path))


def _sentencepiece(options: argparse.Namespace) -> Tokenizer:
    tokenizer = _from_model(options)
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise UserError(f"--tokenizer-model {options.tokenizer_model}: not a sentencepiece .model file")
    return tokenizer


def _gpt2_bpe(options: argparse.Namespace) -> Tokenizer:
    """What GPT-2's two files say, as a tokenizer.json."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    for name in ("vocab_file", "merge_file"):
        path = getattr(options, name)
        if path is None or not path.exists():
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {path or ''}: {options.tokenizer_type} needs this file: give its path")
    try:
        model = models.BPE.from_file(str(options.vocab_file), str(options.merge_file))
    except Exception as error:  # what `tokenizers` raises is a plain Exception
        reason = " ".join(str(error).split())
        raise UserError(f"--vocab-file {options.vocab_file}, --merge-file {options.merge_file}: {reason}") from None
    whole = tokenizers.Tokenizer(model)
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    whole.add_special_tokens(["<|endoftext|>"])
    return HuggingFaceTokenizer(whole.to_str().encode(), options.vocab_file)


TOKENIZERS: dict[str, Callable[[argparse.Namespace], Tokenizer]] = {
    "HuggingFaceTokenizer": _from_model,
    "SentencePieceTokenizer": _sentencepiece,
    "GPT2BPETokenizer": _gpt2_bpe,
    "TikTokenizer": _from_model,
}


if __name__ == "__main__":
    sys.exit(main())
