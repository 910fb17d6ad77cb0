"""The rest of an export: the tokenizer as AutoTokenizer loads it, the card's facts, and what a base model is for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import peft
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import read_metrics, write_config
from sentencepiece import SentencePieceTrainer
from tiktoken_files import write_ranks

from megalm.cli import main
from megalm.data.huggingface_tokenizer import write_tokenizer
from megalm.data.tiktoken_file import TiktokenTokenizer, load_tiktoken
from megalm.data.tokenizer import Tokenizer, load_tokenizer
from megalm.data.train_tokenizer import train_tokenizer

TEXTS = [
    "def main():\n    print('hello, world')\n\n\nclass Thing(object):\n\tx = 1234\n    return self.x\r\n",
    "The quick brown fox jumps over the lazy dog.  It did so 17 times, in  three   days. I'm sure we'll see.\n",
    "Größe, naïve café, ÉCOLE école, 日本語のテキスト 😀👍🏽 и русский текст.        aaaaaaaaa\n",
]
KINDS = ["byte", "bpe", "template", "tiktoken", "sentencepiece", "unigram", "normalised"]
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60) | st.lists(
    st.sampled_from([*TEXTS, " ", "  \n\n", "'S", "12345", "é", "Ab", "aB/", "\t\r\n", "aaa", "0x1F"]), max_size=6
).map("".join)


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Path, list[str]]]:
    """Of each kind: ours, the directory that was written, and what was said."""
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20))
    found = {}
    for kind in KINDS:
        path = folder / kind
        if kind in ("bpe", "sentencepiece"):
            train_tokenizer(kind, 380, [folder / "corpus.jsonl"], path)
        elif kind == "template":  # as Llama 3's, which puts a token before every text
            path = folder / "tokenizer.json"
            content = json.loads((folder / "bpe" / "tokenizer.json").read_bytes())
            first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
            content["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
            }
            path.write_text(json.dumps(content))
        elif kind == "tiktoken":
            path = write_ranks(folder / "bpe" / "tokenizer.json", folder / "cl100k_base.tiktoken")
        elif kind in ("unigram", "normalised"):  # as Llama 2's, and as T5's
            path = folder / f"{kind}.model"
            normalised = kind == "normalised"
            SentencePieceTrainer.train(
                sentence_iterator=iter(TEXTS * 20), model_prefix=str(folder / kind), vocab_size=400,
                model_type="bpe" if normalised else "unigram", byte_fallback=not normalised, minloglevel=2,
                normalization_rule_name="nmt_nfkc" if normalised else "identity", hard_vocab_limit=False,
                remove_extra_whitespaces=normalised, user_defined_symbols=["<tool>"], eos_piece="</s>",
            )  # fmt: skip
        ours = load_tokenizer(kind if kind == "byte" else str(path))
        written = folder / f"hf-{kind}"
        written.mkdir()
        said = write_tokenizer(ours, written, 4096)
        (written / "config.json").write_text(json.dumps({"model_type": "llama"}))
        found[kind] = ours, written, said
    return found


@pytest.fixture(scope="session")
def loaded(
    tokenizers: dict[str, tuple[Tokenizer, Path, list[str]]],
) -> dict[str, tuple[Tokenizer, transformers.PreTrainedTokenizerBase]]:
    return {kind: (ours, transformers.AutoTokenizer.from_pretrained(at)) for kind, (ours, at, _) in tokenizers.items()}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50)
@given(text=TEXT)
def test_the_exported_tokenizer_gives_the_same_ids_and_text(
    kind: str, loaded: dict[str, tuple[Tokenizer, transformers.PreTrainedTokenizerBase]], text: str
) -> None:
    ours, theirs = loaded[kind]
    ids = theirs(text, split_special_tokens=True).input_ids
    assert ids == ours.encode(text)
    if kind not in ("unigram", "normalised"):  # these change text
        assert theirs.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_a_document_is_known_and_the_limit_too(
    kind: str, loaded: dict[str, tuple[Tokenizer, transformers.PreTrainedTokenizerBase]]
) -> None:
    ours, theirs = loaded[kind]
    assert (theirs.eos_token_id, theirs.model_max_length) == (ours.eod, 4096)
    assert max(theirs.get_vocab().values()) + 1 == ours.vocab_size
    assert theirs.bos_token_id is None


def test_what_a_tokenizer_json_cannot_say_is_said(
    tokenizers: dict[str, tuple[Tokenizer, Path, list[str]]], ranks_of_other_words: TiktokenTokenizer, tmp_path: Path
) -> None:
    assert {kind for kind, (_, _, said) in tokenizers.items() if said} == {"sentencepiece"}
    assert "(U+2581) for a space" in tokenizers["sentencepiece"][2][0]
    ranks_of_other_words.encode_batch = lambda texts: [[0] for _ in texts]  # type: ignore[method-assign]
    assert 'encodes "Hello, world!' in write_tokenizer(ranks_of_other_words, tmp_path, None)[0]


@pytest.fixture
def ranks_of_other_words(tokenizers: dict[str, tuple[Tokenizer, Path, list[str]]]) -> TiktokenTokenizer:
    return load_tiktoken(tokenizers["tiktoken"][1].parent / "cl100k_base.tiktoken")


@pytest.fixture(scope="session")
def base_model(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, exported."""
    folder = tmp_path_factory.mktemp("base")
    config = write_config(data, folder / "run")
    short = ["schedule={steps: 4}", "evaluate.every=2", "checkpoint.every=1", "model.vocab_size=300"]
    assert main(["train", config, *short]) == 0
    assert main(["export", str(folder / "run"), "--output", str(folder / "hf"), "--step", "3"]) == 0
    return folder / "hf"


def test_the_card_has_the_runs_facts_and_padding_rows_are_left_out(base_model: Path) -> None:
    card = (base_model / "README.md").read_text()
    lines = read_metrics(base_model.parent / "run")
    third = next(line for line in lines if line["step"] == 3)
    second = next(line for line in lines if line["step"] == 2 and line.get("kind") == "evaluation")
    for fact in [
        f"| tokens | {third['tokens']:,} |",
        *(f"| tokens of `{name}` | {count:,} |" for name, count in third["tokens_by_source"].items()),
        f"| hash of all samples, in order | {third['data_hash']} |",
        f"| training loss, step 3 | {third['loss']:.6g} |",
        f"| validation loss, all sources, step 2 | {second['loss']:.6g} |",
        "| optimizer.learning_rate | 0.003 |",
        "| vocab_size | 257 |",
    ]:
        assert fact in card
    assert transformers.AutoConfig.from_pretrained(base_model).vocab_size == 257
    assert transformers.GenerationConfig.from_pretrained(base_model).eos_token_id == 256
    assert {oct(os.stat(path).st_mode)[-3:] for path in base_model.iterdir()} == {"644"}


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_fine_tuning_the_export_lowers_the_loss(base_model: Path, lora: bool, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(base_model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base_model)
    if lora:
        settings = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, settings)
    texts = [f"question {i}: what follows {i}? answer: {i + 1}." for i in range(32)]
    tokenizer.pad_token = tokenizer.eos_token
    examples = [dict(tokenizer(text, padding="max_length", max_length=48)) for text in texts]
    for example in examples:
        pairs = zip(example["input_ids"], example["attention_mask"], strict=True)
        example["labels"] = [token if seen else -100 for token, seen in pairs]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=12, per_device_train_batch_size=16, learning_rate=1e-2, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=examples)
    before = trainer.evaluate(examples)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(examples)["eval_loss"] < before - 0.05
