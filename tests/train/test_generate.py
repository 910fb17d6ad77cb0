from __future__ import annotations

import pytest
import torch

from megalm.config.sections import Model
from megalm.data.tokenizer import load_tokenizer
from megalm.model.init import initialise
from megalm.model.transformer import Transformer
from megalm.train.generate import generate, sample, text_pieces

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


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_equal_those_without_a_cache(variant: str) -> None:
    model = Transformer(Model(**{**SHAPE, **VARIANTS[variant]}))
    initialise(model, seed=3)
    prompt = [5, 17, 3, 80]
    cached = list(generate(model, prompt, max_new_tokens=20, eod=-1, vocab_size=97, temperature=0))
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(20):
            x_TD = model.hidden(torch.tensor(ids), torch.arange(len(ids)), torch.tensor([0, len(ids)]))
            ids.append(int(model.logits(x_TD)[-1].argmax()))
    assert cached == ids[len(prompt) :]
    assert len(set(cached)) > 3, "a constant continuation would agree by chance"


def test_the_document_end_ends_the_text() -> None:
    model = Transformer(Model(**SHAPE))
    initialise(model, seed=3)
    whole = list(generate(model, [5], max_new_tokens=20, eod=-1, vocab_size=97, temperature=0))
    assert (
        list(generate(model, [5], max_new_tokens=20, eod=whole[7], vocab_size=97, temperature=0))
        == whole[: whole.index(whole[7])]
    )


def test_sampling_follows_the_probabilities_of_the_nucleus() -> None:
    logits_V = torch.tensor([0.5, 0.1, 0.3, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(temperature: float, top_p: float) -> list[float]:
        drawn = [sample(logits_V, temperature, top_p, generator) for _ in range(4000)]
        return [drawn.count(token) / 4000 for token in range(4)]

    assert shares(1.0, 1.0) == pytest.approx([0.5, 0.1, 0.3, 0.1], abs=0.03)
    assert shares(1.0, 0.7) == pytest.approx([0.625, 0, 0.375, 0], abs=0.03)
    assert shares(1.0, 0.5) == shares(1.0, 0.0) == shares(1e-310, 1.0) == [1, 0, 0, 0]
    squares = [0.25 / 0.36, 0.01 / 0.36, 0.09 / 0.36, 0.01 / 0.36]
    assert shares(0.5, 1.0) == pytest.approx(squares, abs=0.03)
    assert sample(logits_V, 0, 1.0, generator) == 0


def test_characters_that_span_tokens_come_whole() -> None:
    tokenizer = load_tokenizer("byte")
    ids = tokenizer.encode("aé€😀z")
    assert list(text_pieces(tokenizer, ids[:1], iter(ids[1:]))) == ["é", "€", "😀", "z", ""]
