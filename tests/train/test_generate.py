"""Generation against passes without a cache, transformers, prompts alone, and what sampling and stops promise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from hf_models import exported, small
from hypothesis import given
from hypothesis import strategies as st

from megalm.config.sections import Model
from megalm.data.tokenizer import ByteTokenizer
from megalm.errors import UserError
from megalm.model.init import initialise
from megalm.model.transformer import Transformer
from megalm.train import packed
from megalm.train.converse import Conversation
from megalm.train.generate import (
    Piece,
    Sampling,
    Text,
    document,
    encode_prompt,
    next_tokens,
    read_prompts,
    sample,
    write,
)
from megalm.train.passes import Passes
from megalm.train.trained import TrainedModel

SHAPE = {
    "num_layers": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "ffn_size": 80,
    "vocab_size": 97, "max_positions": 256, "init_std": 0.2,
}  # fmt: skip
VARIANTS = {
    "llama": {},
    "qwen 3": {"qk_norm": True, "tie_embeddings": True},
    "gpt": {"norm": "layernorm", "activation": "gelu_tanh", "position": "learned", "qkv_bias": True},
    "capped": {"sliding_window": 5, "attention_softcap": 20.0, "logit_softcap": 10.0},
    "sinks": {"attention": "fused_softmax", "attention_sinks": True, "qk_norm": True},
}
PROMPTS = [[5, 17, 3, 80], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], [60, 61]]
GREEDY = Sampling(temperature=0)


def made(**changes: object) -> Transformer:
    model = Transformer(Model(**{**SHAPE, **changes}))
    initialise(model, seed=3)
    return model


def written(model: Transformer, prompts: Sequence[Sequence[int]], steps: int, sampling: Sampling) -> list[list[int]]:
    """So many new tokens of each prompt, written together."""
    documents = [document(number, prompt, sampling.seed) for number, prompt in enumerate(prompts)]
    for _ in range(steps):
        for one, token in zip(
            documents, next_tokens(Passes.of(model), documents, sampling, model.config.vocab_size or 0), strict=True
        ):
            one.tokens.append(token)
    return [one.tokens[len(prompt) :] for one, prompt in zip(documents, prompts, strict=True)]


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_of_prompts_together_equal_those_alone_without_a_cache(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "TOKENS", 12)  # several micro-batches
    model = made(**VARIANTS[variant])
    together = written(model, PROMPTS, 12, GREEDY)
    for prompt, cached in zip(PROMPTS, together, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(12):
                x_TD = model.hidden(torch.tensor(ids), torch.arange(len(ids)), torch.tensor([0, len(ids)]))
                ids.append(int(model.logits(x_TD)[-1].argmax()))
        assert cached == ids[len(prompt) :]
    assert len({token for tokens in together for token in tokens}) > 6, "constant ones would agree by chance"


@pytest.mark.parametrize("name", ["llama 3", "mistral", "qwen 2", "qwen 3, tied", "gpt 2"])
def test_greedy_tokens_equal_those_of_transformers_from_the_exported_model(name: str, tmp_path: Path) -> None:
    model = small(name)
    peer = transformers.AutoModelForCausalLM.from_pretrained(exported(model, tmp_path), attn_implementation="eager")
    found = written(model, PROMPTS, 24, GREEDY)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        whole = peer.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
        assert tokens == whole[0, len(prompt) :].tolist()
    assert len({token for tokens in found for token in tokens}) > 1, (
        "the same token again and again would agree by chance"
    )


def test_what_a_prompt_gives_depends_on_its_seed_and_not_on_the_prompts_beside_it() -> None:
    model, drawn = made(), Sampling(seed=5, top_p=0.95)
    together = written(model, PROMPTS, 12, drawn)
    assert together == [written(model, [prompt], 12, drawn)[0] for prompt in PROMPTS]
    assert together != written(model, PROMPTS, 12, Sampling(seed=6, top_p=0.95))


def test_sampling_follows_the_probabilities_of_the_nucleus_and_of_the_likeliest() -> None:
    logits_V = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> list[float]:
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
        drawn = [sample(logits_V, sampling, generator) for _ in range(4000)]
        return [drawn.count(token) / 4000 for token in range(4)]

    assert shares() == pytest.approx([0.5, 0.1, 0.3, 0.1], abs=0.04)
    assert shares(top_k=9) == pytest.approx([0.5, 0.1, 0.3, 0.1], abs=0.04)
    assert shares(top_p=0.7) == pytest.approx([0.625, 0, 0.375, 0], abs=0.04)
    assert shares(top_k=2) == pytest.approx([0.625, 0, 0.375, 0], abs=0.04)
    assert shares(top_p=0.6, top_k=2) == shares(top_p=0.5) == shares(top_p=0.0) == shares(top_k=1) == [1, 0, 0, 0]
    assert shares(1e-310) == [1, 0, 0, 0]
    squares = [0.25 / 0.36, 0.01 / 0.36, 0.09 / 0.36, 0.01 / 0.36]
    assert shares(0.5) == pytest.approx(squares, abs=0.04)
    assert sample(logits_V, GREEDY, generator) == 0


class Fixed:
    """Stands in for a model: `next_tokens` gives what a text spells, then the end of the document."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *texts: bytes) -> None:
        self.left = [[*text, 256] for text in texts]
        monkeypatch.setattr("megalm.train.generate.next_tokens", self.next)

    def next(self, _passes: object, documents: list, *_: object) -> list[int]:
        return [self.left[one.number].pop(0) for one in documents]


def pieces(limit: int, stop: Sequence[str], *prompts: str) -> list[Piece]:
    tokenizer = ByteTokenizer()
    documents = [document(number, tokenizer.encode(prompt), 0) for number, prompt in enumerate(prompts)]
    return list(write(None, tokenizer, documents, Sampling(max_new_tokens=limit, stop=tuple(stop))))  # type: ignore[arg-type]


def test_characters_that_span_tokens_come_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    Fixed(monkeypatch, "é€😀z".encode())
    assert [piece.text for piece in pieces(50, [], "a") if piece.text] == ["é", "€", "😀", "z"]
    Fixed(monkeypatch, "é€".encode())
    assert [piece.text for piece in pieces(3, [], "a")] == ["", "é", "\ufffd"], "the last one was cut short"


def test_each_text_ends_for_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    Fixed(monkeypatch, b"one\n\ntwo", b"ab", b"abcdefghijkl", b"x\n")
    found = pieces(8, ["\n\n", "hij"], "p", "p", "p", "p")
    texts = ["".join(piece.text for piece in found if piece.document == number) for number in range(4)]
    ends = {piece.document: piece.end for piece in found if piece.end}
    assert texts == ["one", "ab", "abcdefgh", "x\n"]
    assert ends == {0: "stop", 1: "end", 2: "length", 3: "end"}


@given(st.text("ab€", max_size=12), st.lists(st.text("ab€", min_size=1, max_size=3), max_size=2))
def test_a_text_ends_where_the_first_stop_begins_however_tokens_cut_it(text: str, stop: list[str]) -> None:
    tokenizer = ByteTokenizer()
    spoken, shown = Text(tokenizer, tokenizer.encode("a"), stop), ""
    ended = 0
    for ended, token in enumerate(text.encode(), 1):  # noqa: B007
        shown += spoken.add(token)
        assert text.startswith(shown)
        if spoken.stopped:
            break
    shown += spoken.end()
    # A stop is seen as soon as it stands there, so that of several the first to be complete counts.
    prefix = text.encode()[:ended].decode(errors="ignore")
    places = [prefix.find(s) for s in stop if s in prefix]
    assert shown == text[: min(places, default=len(text))]
    assert spoken.stopped == bool(places) == any(s in text for s in stop)


def stand_in(model: Transformer, **changes: object) -> TrainedModel:
    """A model of bytes as if it came from a checkpoint."""
    config = SimpleNamespace(model=model.config, run=SimpleNamespace(timeout=60.0))
    saved = SimpleNamespace(tokenizer=ByteTokenizer(), positions=model.config.max_positions, config=config)
    return SimpleNamespace(  # type: ignore[return-value]
        saved=saved, tokenizer=saved.tokenizer, passes=Passes.of(model), config=config, **changes
    )


def test_a_conversation_goes_on_from_all_before_it_and_reads_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = stand_in(made(vocab_size=256))  # it cannot end the document
    lengths: list[int] = []
    plain = Passes.read
    monkeypatch.setattr(Passes, "read", lambda self, b, t: lengths.append(len(b[0].tokens_T)) or plain(self, b, t))
    conversation = Conversation(trained, Sampling(max_new_tokens=6, temperature=0))
    answers = ["".join(conversation.go_on(line)) for line in ("first", "then", "", "first")]
    assert answers[3] == answers[0] != answers[1]
    assert answers[2] == ""
    assert lengths[:12] == [5, 1, 1, 1, 1, 1, 5, 1, 1, 1, 1, 1], "the last token and four letters are new"
    whole = document(0, [*b"first", *conversation_tokens(trained, "first"), *b"then"], 0)
    again = write(trained.passes, trained.tokenizer, [whole], Sampling(max_new_tokens=6, temperature=0))
    assert "".join(piece.text for piece in again) == answers[1]


def conversation_tokens(trained: TrainedModel, text: str) -> list[int]:
    """The six greedy tokens after a text."""
    one = document(0, list(text.encode()), 0)
    list(write(trained.passes, trained.tokenizer, [one], Sampling(max_new_tokens=6, temperature=0)))
    return one.tokens[len(text) :]


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_a_prompt_without_room_in_the_models_positions_is_refused(position: str) -> None:
    saved = stand_in(made(vocab_size=257, position=position, max_positions=16)).saved
    assert len(encode_prompt(saved, "--prompt", "x" * 10, 6)) == 10
    with pytest.raises(UserError, match=r"--prompt makes 17 tokens, more than model\.max_positions=16: shorten it"):
        encode_prompt(saved, "--prompt", "x" * 17, 1)
    if position == "learned":
        with pytest.raises(UserError, match="passes the model's 16 learned positions: use at most 6"):
            encode_prompt(saved, "--prompt", "x" * 10, 7)
    with pytest.raises(UserError, match="the text makes 17 tokens"):
        encode_prompt(saved, "the text", "x", 1, before=16)


def test_a_line_that_is_no_prompt_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one\\ntwo"}\n{"prompt": 3}\n')
    with pytest.raises(UserError, match=r'prompts\.jsonl:2: prompt: .*: write lines such as \{"prompt": "Once upon"\}'):
        read_prompts(file)
    file.write_text('{"prompt": "one\\ntwo"}\n')
    assert read_prompts(file) == [(f"{file}:1", "one\ntwo")]
