from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from tiktoken_files import write_ranks

from megalm.data.prepare import prepare
from megalm.data.tiktoken_file import SCHEMES
from megalm.data.tokenizer import Tokenizer, load_tokenizer
from megalm.data.train_tokenizer import train_tokenizer
from megalm.errors import UserError

CORPUS = [
    "def main():\n    print('hello, world')\n\n\nclass Thing(object):\n\tx = 1234\n    return self.x\r\n",
    "The quick brown fox jumps over the lazy dog.  It did so 17 times, in  three   days. I'm sure we'll see.\n",
    "Größe, naïve café, ÉCOLE école, 日本語のテキスト 😀👍🏽 и русский текст.\n",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.lists(
    st.sampled_from([*CORPUS, " ", "  \n\n", "<|endoftext|>", "'S", "12345", "e\u0301", "Ab", "aB/", "\t\r\n"]),
    max_size=6,
).map("".join)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiktoken")
    corpus = directory / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS * 10))
    train_tokenizer("bpe", 350, [corpus], directory / "bpe")
    return write_ranks(directory / "bpe" / "tokenizer.json", directory / "r50k_base.tiktoken")


@pytest.fixture(scope="session")
def pairs(ranks: Path) -> dict[str, tuple[Tokenizer, tiktoken.Encoding]]:
    """Ours, and what tiktoken itself makes of each of OpenAI's names with the same ranks."""
    found = {}
    small = tiktoken.load.load_tiktoken_bpe(str(ranks))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *_, **__: small)
        for name in SCHEMES:
            definition = getattr(openai_public, name)()
            definition.pop("explicit_n_vocab", None)
            path = ranks.with_name(f"{name}.tiktoken")
            path.write_bytes(ranks.read_bytes())
            found[name] = load_tokenizer(str(path)), tiktoken.Encoding(**definition)
    return found


@pytest.mark.parametrize("name", SCHEMES)
@given(texts=st.lists(TEXT, max_size=4))
@settings(max_examples=150)
def test_files_of_openais_names_encode_as_tiktoken_does(
    pairs: dict[str, tuple[Tokenizer, tiktoken.Encoding]], name: str, texts: list[str]
) -> None:
    ours, theirs = pairs[name]
    batch = ours.encode_batch(texts)
    assert batch == theirs.encode_ordinary_batch(texts)
    for text, ids in zip(texts, batch, strict=True):
        assert ours.decode(ids) == text
        assert ours.byte_length(ids) == len(text.encode())
        assert ours.eod not in ids


@pytest.mark.parametrize("name", SCHEMES)
def test_special_tokens_have_openais_ids(pairs: dict[str, tuple[Tokenizer, tiktoken.Encoding]], name: str) -> None:
    ours, theirs = pairs[name]
    assert ours.eod == theirs.eot_token
    assert ours.vocab_size == theirs.n_vocab
    assert set(ours.special_tokens) == theirs.special_tokens_set
    assert ours.decode([ours.eod, *ours.encode("a")]) == "a"
    assert pickle.loads(pickle.dumps(ours)).fingerprint == ours.fingerprint


def test_another_file_says_its_pattern_beside_it(ranks: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.tiktoken"
    path.write_bytes(ranks.read_bytes())
    with pytest.raises(UserError, match=r"its name is none of r50k_base.*say it in mine\.tiktoken\.json"):
        load_tokenizer(str(path))
    beside = tmp_path / "mine.tiktoken.json"
    beside.write_text(json.dumps({"pattern": r"\w+|\W+", "special_tokens": {"<|endoftext|>": 400}}))
    tokenizer = load_tokenizer(str(path))
    theirs = tiktoken.Encoding(
        "mine",
        pat_str=r"\w+|\W+",
        mergeable_ranks=tiktoken.load.load_tiktoken_bpe(str(path)),
        special_tokens={"<|endoftext|>": 400},
    )
    assert [tokenizer.encode(text) for text in CORPUS] == [theirs.encode_ordinary(text) for text in CORPUS]
    assert (tokenizer.eod, tokenizer.vocab_size) == (400, 401)
    fingerprint = tokenizer.fingerprint
    beside.write_text(json.dumps({"pattern": r"\w+|\W", "special_tokens": {"<|endoftext|>": 400}}))
    assert load_tokenizer(str(path)).fingerprint != fingerprint, "the pattern is a part of the tokenizer"


@pytest.mark.parametrize(
    ("content", "beside", "reason"),
    [
        (b"", None, "not a .tiktoken file|its ranks"),
        (b"YQ== 0\nYQ= 1\n", None, "damaged, or not a .tiktoken file"),
        (b"YQ== 0 1\n", None, "damaged, or not a .tiktoken file"),
        (b"YQ== 0\nYg== 0\n", None, "its ranks are not one a token"),
        (b"YQ== 0\n", None, "no token for the byte 0"),
        (None, "{", "not of the form"),
        (None, '{"pattern": "."}', "not of the form"),
        (None, '{"pattern": "(", "special_tokens": {"<|endoftext|>": 400}}', "its pattern is none"),
        (None, '{"pattern": ".", "special_tokens": {"<|endoftext|>": 4}}', "id 4 is a special token's and another's"),
        (None, '{"pattern": ".", "special_tokens": {"<pad>": 400}}', "no end-of-document token"),
    ],
)
def test_files_that_are_damaged_are_refused(
    ranks: Path, tmp_path: Path, content: bytes | None, beside: str | None, reason: str
) -> None:
    path = tmp_path / "r50k_base.tiktoken"
    path.write_bytes(ranks.read_bytes() if content is None else content)
    if beside is not None:
        path.with_name("r50k_base.tiktoken.json").write_text(beside)
    with pytest.raises(UserError, match=reason):
        load_tokenizer(str(path))


def test_a_corpus_is_prepared_with_it_by_several_workers(ranks: Path, tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(CORPUS[i])
    files = sorted(tmp_path.glob("*.txt"))
    report = prepare(files, str(ranks), tmp_path / "out", workers=2, engine="reference")
    assert report.manifest is not None
    assert report.manifest.tokenizer.kind == "tiktoken"
    assert report.manifest.tokens == sum(len(load_tokenizer(str(ranks)).encode(text)) + 1 for text in CORPUS)
