from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from megalm.data.tokenizer import Tokenizer, load_tokenizer
from megalm.data.train_tokenizer import train_tokenizer
from megalm.errors import UserError

KINDS = ["byte", "sentencepiece", "bpe"]
CORPUS = (
    "def main():\n    print('hello, world')\n\n\nclass Thing(object):\n\tx = 1234\n    return self.x\r\n",
    "The quick brown fox jumps over the lazy dog.  It did so 17 times, in  three   days.\n",
    "Größe, naïve café, 日本語のテキスト、そして絵文字 😀👍🏽 и русский текст.\n",
)
AWKWARD = [
    "",
    " ",
    "   leading and trailing   ",
    "a\n\n    b\tc \t\n",
    "\r\n\r\n",
    "\0\x01\x7f\x85",
    "<|endoftext|>",
    "a<|endoftext|>b<unk><s></s><0x41>",
    "▁",
    "▁▁ a▁b ▁",
    "日本語 😀👨‍👩‍👧 🇩🇪",
    "e\u0301 é ﬁ ① Ａ",
    "\u2028\u2029\u200b\ufeff\ufffd\U0010ffff",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text(
    st.sampled_from(" \n\t\r▁a<|endoftext>0é日😀\0"), max_size=60
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directory of a small tokenizer of each kind."""
    directory = tmp_path_factory.mktemp("tokenizers")
    corpus = directory / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in CORPUS * 10))
    for kind, vocab_size in (("sentencepiece", 400), ("bpe", 330)):
        train_tokenizer(kind, vocab_size, [corpus], directory / kind)
    return {"byte": Path("byte"), **{kind: directory / kind for kind in KINDS[1:]}}


@pytest.fixture(scope="session")
def all_tokenizers(trained: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: load_tokenizer(str(path)) for kind, path in trained.items()}


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, all_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return all_tokenizers[request.param]


def check_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.byte_length(ids) == len(text.encode())
    assert tokenizer.eod not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts_come_back_as_they_went(tokenizer: Tokenizer, text: str) -> None:
    check_round_trip(tokenizer, text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@settings(max_examples=300)
def test_every_text_comes_back_as_it_went(all_tokenizers: dict[str, Tokenizer], kind: str, text: str) -> None:
    check_round_trip(all_tokenizers[kind], text)


def test_a_batch_is_its_texts_one_by_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(AWKWARD) == [tokenizer.encode(text) for text in AWKWARD]


@pytest.mark.parametrize("texts", [AWKWARD, ["one"], []])
def test_documents_are_their_ids_one_after_the_other(tokenizer: Tokenizer, texts: list[str]) -> None:
    tokens, lengths = tokenizer.encode_documents([text.encode() for text in texts])
    expected = [tokenizer.encode(text) for text in texts]
    assert (tokens.dtype, lengths.dtype) == ("int32", "int64")
    assert tokens.tolist() == [i for ids in expected for i in ids]
    assert lengths.tolist() == [len(ids) for ids in expected]


def test_the_end_of_document_token_spells_nothing(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.eod, *tokenizer.encode("ab"), tokenizer.eod, *tokenizer.encode("c"), tokenizer.eod]
    assert tokenizer.decode(ids) == "abc"
    assert tokenizer.byte_length(ids) == 3


def test_bytes_that_are_no_utf8_become_replacement_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🜁")
    assert len(ids) > 1, "no token of the corpus spells this character"
    assert "\ufffd" in tokenizer.decode(ids[:-1])
    assert tokenizer.byte_length(ids[:1]) + tokenizer.byte_length(ids[1:]) == 4


def test_every_id_of_the_vocabulary_can_be_decoded_and_no_other(tokenizer: Tokenizer) -> None:
    tokenizer.decode(range(tokenizer.vocab_size))
    for i in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"id {i} is outside of the vocabulary"):
            tokenizer.decode([i])


def test_trained_tokenizers_have_the_vocabulary_asked_for_and_use_it(all_tokenizers: dict[str, Tokenizer]) -> None:
    assert {kind: t.vocab_size for kind, t in all_tokenizers.items()} == {"byte": 257, "sentencepiece": 400, "bpe": 330}
    for kind in KINDS[1:]:
        text = "".join(CORPUS)
        assert len(all_tokenizers[kind].encode(text)) < 0.7 * len(text.encode())


@pytest.mark.parametrize("kind", KINDS[1:])
def test_the_same_text_gives_the_same_tokenizer_in_another_process(trained: dict[str, Path], kind: str) -> None:
    first = trained[kind]
    script = f"""
from pathlib import Path
from megalm.data.train_tokenizer import train_tokenizer
train_tokenizer({kind!r}, {load_tokenizer(str(first)).vocab_size}, [Path({str(first.parent / "corpus.jsonl")!r})],
                Path({str(first.parent / f"{kind}-again")!r}), overwrite=True)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
    for path in first.iterdir():
        assert (first.parent / f"{kind}-again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_file_given_directly_is_the_tokenizer_of_its_directory(trained: dict[str, Path], kind: str) -> None:
    file = next(path for path in trained[kind].iterdir() if path.name.startswith("tokenizer."))
    direct, whole = load_tokenizer(str(file)), load_tokenizer(str(trained[kind]))
    assert (direct.kind, direct.vocab_size, direct.eod) == (whole.kind, whole.vocab_size, whole.eod)
    assert direct.fingerprint == whole.fingerprint
    assert direct.encode("hello") == whole.encode("hello")


def test_fingerprints_tell_tokenizers_apart(all_tokenizers: dict[str, Tokenizer]) -> None:
    assert len({tokenizer.fingerprint for tokenizer in all_tokenizers.values()}) == 3


def test_sentencepiece_itself_reads_the_model_in_the_same_way(trained: dict[str, Path]) -> None:
    plain = SentencePieceProcessor(model_file=str(trained["sentencepiece"] / "tokenizer.model"))
    ours = load_tokenizer(str(trained["sentencepiece"]))
    for text in AWKWARD:
        if "▁" not in text:
            assert ours.encode(text) == plain.encode(text)
    assert plain.id_to_piece(ours.eod) == "<|endoftext|>"


# --- tokenizers of others


def hugging_face(special: bool = True, eod: str = "</s>") -> bytes:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2, "<": 3, "/": 4, "s": 5, ">": 6}, [])
    )
    tokenizer.add_special_tokens([tokenizers.AddedToken("<pad>", special=True)])
    tokenizer.add_tokens([tokenizers.AddedToken(eod, special=special)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<pad> $A", special_tokens=[("<pad>", 7)])
    return tokenizer.to_str().encode()


@pytest.mark.parametrize("special", [True, False])
def test_another_tokenizer_json_is_used_without_its_truncation_padding_and_templates(
    tmp_path: Path, special: bool
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(hugging_face(special))
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.kind, tokenizer.vocab_size, tokenizer.eod) == ("bpe", 9, 8)
    assert tokenizer.encode("abab</s>") == [0, 1, 0, 1, 3, 4, 5, 6]
    assert tokenizer.byte_length([0, 1, 2, 7, 8]) == 4


def test_another_model_file_keeps_its_own_end_token_and_prefix(tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS), model_writer=file, vocab_size=400, model_type="bpe", byte_fallback=True,
            minloglevel=2,
        )  # fmt: skip
    plain = SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.kind, tokenizer.eod) == ("sentencepiece", plain.eos_id())
    for text in ("the lazy dog", "a▁b", "</s>"):
        assert tokenizer.encode(text) == plain.encode(text)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_tokenizer_without_an_end_token_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "tokenizer.json":
        path.write_bytes(hugging_face(eod="<stop>"))
    else:
        with path.open("wb") as file:
            SentencePieceTrainer.train(
                sentence_iterator=iter(CORPUS), model_writer=file, vocab_size=80, eos_id=-1, minloglevel=2
            )
    with pytest.raises(UserError, match=rf"{name}: no end-of-document token"):
        load_tokenizer(str(path))


# --- bad input

BREAK: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "garbage": lambda content: b"\xff\x00garbage",
    "other JSON": lambda content: b"[1, 2]",
}


@pytest.mark.parametrize("change", BREAK)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_damaged_tokenizer_file_is_one_line_that_names_it(
    trained: dict[str, Path], tmp_path: Path, kind: str, change: str
) -> None:
    source = next(path for path in trained[kind].iterdir() if path.name.startswith("tokenizer."))
    file = tmp_path / source.name
    file.write_bytes(BREAK[change](source.read_bytes()))
    record = tmp_path / "megalm-tokenizer.json"
    record.write_bytes((trained[kind] / record.name).read_bytes())
    for path in (file, tmp_path):  # the file itself, and as part of its directory
        with pytest.raises(UserError, match=r"damaged") as caught:
            load_tokenizer(str(path))
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_one_flipped_bit_in_a_directory_is_found(trained: dict[str, Path], tmp_path: Path, kind: str) -> None:
    for path in trained[kind].iterdir():
        content = bytearray(path.read_bytes())
        if path.name.startswith("tokenizer."):
            content[len(content) // 3] ^= 1
        (tmp_path / path.name).write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.(json|model): damaged: its checksum"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"kind": "other", "checksum": "", "vocab_size": 1, "eod": 0}', b"\xff"]
)
def test_a_damaged_record_is_one_line_that_names_it(trained: dict[str, Path], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "megalm-tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"megalm-tokenizer\.json: damaged"):
        load_tokenizer(str(tmp_path))


def test_what_is_no_tokenizer_is_refused_by_name(trained: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"nowhere: no such file or directory"):
        load_tokenizer(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"notes\.txt: of no known kind"):
        load_tokenizer(str(tmp_path / "notes.txt"))
    with pytest.raises(UserError, match=r"no megalm-tokenizer\.json inside"):
        load_tokenizer(str(tmp_path))
    record = trained["bpe"] / "megalm-tokenizer.json"
    (tmp_path / record.name).write_bytes(record.read_bytes())
    with pytest.raises(UserError, match=r"tokenizer\.json: the file is missing"):
        load_tokenizer(str(tmp_path))


def test_loading_a_tokenizer_does_not_import_torch(trained: dict[str, Path]) -> None:
    script = f"""
import sys
from megalm.data.tokenizer import load_tokenizer
for path in {[str(path) for path in trained.values()]!r}:
    load_tokenizer(path).encode("a")
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
