"""gigatoken against the libraries whose ids it must give."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unicodedata import category

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceTrainer
from test_tiktoken_file import write_ranks

from megalm.data import engine
from megalm.data.engine import ADVERSARIAL, GigatokenEncoder, choose_engine, open_engine
from megalm.data.prepare import Settings, prepare
from megalm.data.tokenizer import Tokenizer, load_tokenizer
from megalm.data.train_tokenizer import train_tokenizer
from megalm.errors import UserError

KINDS = ["bpe", "gpt2", "sentencepiece", "prefixed", "cl100k_base", "o200k_base"]
CORPUS = [
    "def main():\n    print('hello, world')\n\n\nclass Thing(object):\n\tx = 1234\n    return self.x\r\n",
    "The quick brown fox jumps over the lazy dog.  It did so 17 times, in  three   days. I'm sure we'll see.\n",
    "Größe, naïve café, 日本語のテキスト、そして絵文字 😀👍🏽 и русский текст.\n",
]
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=80),
    st.text(st.sampled_from(" \n\t\r▁a<|endoftext|></s>0é日😀\u0301\0'sS.,"), max_size=80),
    st.lists(st.sampled_from([*CORPUS, *ADVERSARIAL]), max_size=3).map("".join),
)


def sentencepiece(prefix: Path, **options: object) -> Path:
    """Trains a model with sentencepiece's own defaults but for `options`."""
    SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 10),
        model_prefix=str(prefix),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        control_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
        **options,
    )
    return prefix.with_suffix(".model")


@pytest.fixture(scope="session")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small tokenizers: ours, and of the kinds that are found elsewhere."""
    pytest.importorskip("gigatoken")
    directory = tmp_path_factory.mktemp("engines")
    corpus = directory / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS * 10))
    for kind, size in (("bpe", 350), ("sentencepiece", 400)):
        train_tokenizer(kind, size, [corpus], directory / kind)
    gpt2 = tokenizers.Tokenizer(tokenizers.models.BPE())
    gpt2.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<pad>", "<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    gpt2.train_from_iterator(CORPUS, trainer)
    gpt2.save(str(directory / "gpt2.json"))
    # As Llama's and Mistral's: a space before every text, control tokens.
    sentencepiece(directory / "prefixed", normalization_rule_name="identity", remove_extra_whitespaces=False)
    for name in ("cl100k_base", "o200k_base"):
        write_ranks(directory / "bpe" / "tokenizer.json", directory / f"{name}.tiktoken")
    files = {"gpt2": "gpt2.json", "prefixed": "prefixed.model"}
    files |= {name: f"{name}.tiktoken" for name in ("cl100k_base", "o200k_base")}
    return {kind: directory / files.get(kind, kind) for kind in KINDS}


@pytest.fixture(scope="session")
def pairs(paths: dict[str, Path]) -> dict[str, tuple[Tokenizer, GigatokenEncoder]]:
    """Reference and fast engine of each kind."""
    references = {kind: load_tokenizer(str(path)) for kind, path in paths.items()}
    return {kind: (reference, GigatokenEncoder(reference)) for kind, reference in references.items()}


def check(pair: tuple[Tokenizer, GigatokenEncoder], texts: list[str]) -> None:
    reference, fast = pair
    tokens, lengths = fast.encode_documents([text.encode() for text in texts])
    expected = reference.encode_batch(texts)
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert tokens.tolist() == [i for ids in expected for i in ids]


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(TEXT, min_size=1, max_size=5))
@settings(max_examples=100)
def test_gigatoken_gives_the_references_ids_for_any_text(
    pairs: dict[str, tuple[Tokenizer, GigatokenEncoder]], kind: str, texts: list[str]
) -> None:
    check(pairs[kind], texts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_passes_the_comparison_at_the_start(
    pairs: dict[str, tuple[Tokenizer, GigatokenEncoder]], kind: str
) -> None:
    said: list[str] = []
    assert choose_engine("auto", pairs[kind][0], [text.encode() for text in CORPUS], said.append) == "gigatoken"
    assert said == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_character_is_encoded_alike_in_any_neighbourhood(
    pairs: dict[str, tuple[Tokenizer, GigatokenEncoder]], kind: str
) -> None:
    step = 11 if kind != "o200k_base" else 3  # its pattern tells marks and letters' cases apart
    characters = [chr(i) for i in range(0, 0x32000, step) if not 0xD800 <= i < 0xE000]
    seldom = [c for c in characters if not "\u3400" < c < "\ud7a4" and not "\U00010500" < c < "\U0001d000"]
    check(pairs[kind], [f"a{c}a 1{c}1.{c}.\n{c} {c}'s_{c}_" for c in seldom])


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_spells_a_special_token_is_text(
    pairs: dict[str, tuple[Tokenizer, GigatokenEncoder]], kind: str
) -> None:
    reference, fast = pairs[kind]
    assert reference.special_tokens
    for special in reference.special_tokens:
        tokens, _ = fast.encode_documents([special.encode(), f"a{special} {special}b".encode()])
        assert reference.eod not in tokens
        check(pairs[kind], [special, f"a{special} {special}b"])


def test_characters_that_are_not_assigned_are_found_wherever_they_stand() -> None:
    for i in (*range(0x800, 0x30000, 97), 0x1ACF, 0xFFFF, 0x2FFFE, 0x10FFFF):
        if category(chr(i)) != "Cs":
            for text in (chr(i), f"é{chr(i)}", f"日{chr(i)}a😀"):
                assert engine._has_unassigned(text.encode()) == (category(chr(i)) == "Cn")
    assert not engine._has_unassigned("plain, é ж".encode())


def test_caches_that_grew_are_dropped_and_the_ids_stay(
    pairs: dict[str, tuple[Tokenizer, GigatokenEncoder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "GROWTH", -(1 << 40))
    monkeypatch.setattr(engine, "RELOAD_BYTES", 100)
    fast = GigatokenEncoder(pairs["bpe"][0])
    first = fast._backend
    for _ in range(3):
        check((pairs["bpe"][0], fast), CORPUS)
    assert fast._backend is not first


def test_shards_do_not_depend_on_the_engine(paths: dict[str, Path], tmp_path: Path) -> None:
    texts = [*CORPUS, *ADVERSARIAL, "<|endoftext|>", "\U00032ac5.j", "\U00033441\u22bc"] * 3
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for kind, path in paths.items():
        outputs = []
        for name in ("reference", "gigatoken"):
            output = tmp_path / f"{kind}-{name}"
            report = prepare([tmp_path / "in.jsonl"], str(path), output, Settings(unit_bytes=30_000), engine=name)
            assert report.engine == name
            outputs.append({file.name: file.read_bytes() for file in output.iterdir()})
        assert outputs[0] == outputs[1]


# --- falling back


def falls_back(tokenizer: Tokenizer, reason: str) -> None:
    said: list[str] = []
    assert choose_engine("auto", tokenizer, [b"text"], said.append) == "reference"
    (line,) = said
    assert line.startswith("encoding with the slower reference: ")
    assert reason in line
    with pytest.raises(UserError, match="--engine gigatoken: "):
        choose_engine("gigatoken", tokenizer, [b"text"], said.append)
    assert choose_engine("reference", tokenizer, [b"text"], said.append) == "reference"
    assert len(said) == 1


def test_where_gigatoken_is_not_installed_the_reference_encodes(
    pairs: dict[str, tuple[Tokenizer, GigatokenEncoder]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    falls_back(pairs["bpe"][0], "gigatoken is not installed (`pip install 'megalm[fast]'`)")


def test_where_gigatoken_cannot_take_a_tokenizer_the_reference_encodes(tmp_path: Path) -> None:
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "text": 1}, unk_token="[UNK]"))
    words.add_special_tokens(["<|endoftext|>"])
    words.save(str(tmp_path / "words.json"))
    falls_back(load_tokenizer(str(tmp_path / "words.json")), "gigatoken")


def test_a_tokenizer_that_gigatoken_reads_differently_is_found_out(tmp_path: Path) -> None:
    falls_back(load_tokenizer(str(sentencepiece(tmp_path / "nfkc"))), "gigatoken gives other ids for this tokenizer")


@pytest.mark.parametrize("where", ["ids", "lengths"])
def test_where_gigatoken_gives_other_ids_the_reference_encodes(
    pairs: dict[str, tuple[Tokenizer, GigatokenEncoder]], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    right = GigatokenEncoder.encode_documents

    def wrong(self: GigatokenEncoder, documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        tokens, lengths = (array.copy() for array in right(self, documents))
        if where == "ids":
            tokens[-1] ^= 1
        else:
            lengths[:2] += [1, -1]
        return tokens, lengths

    monkeypatch.setattr(GigatokenEncoder, "encode_documents", wrong)
    falls_back(pairs["bpe"][0], "gigatoken gives other ids for this tokenizer")


def test_bytes_need_no_engine_and_others_are_refused() -> None:
    said: list[str] = []
    byte = load_tokenizer("byte")
    assert choose_engine("auto", byte, [b"text"], said.append) == "reference"
    assert said == []
    assert open_engine("reference", byte) is byte
    with pytest.raises(UserError, match="--engine warp: no such engine: choose auto, reference, gigatoken"):
        choose_engine("warp", byte, [], said.append)
