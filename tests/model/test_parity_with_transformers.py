"""The model's logits and gradients against Hugging Face transformers, with the same weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from peers import llama_name, randomised

from megalm.checkpoint.huggingface.architectures import GPT
from megalm.checkpoint.huggingface.names import entries
from megalm.config.sections import Model, RopeScaling
from megalm.model.transformer import ModelInputs

VOCAB, LENGTH, BATCH = 211, 48, 3
BASE = {
    "num_layers": 3, "hidden_size": 64, "num_heads": 8, "num_kv_heads": 2, "head_dim": 8, "ffn_size": 176,
    "vocab_size": VOCAB, "max_positions": 128,
}  # fmt: skip
HF = {
    "num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 176, "vocab_size": VOCAB, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "attn_implementation": "eager",
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens_BS = torch.randint(VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(2))
    return tokens_BS, torch.arange(LENGTH).repeat(BATCH), torch.arange(0, BATCH * LENGTH + 1, LENGTH, dtype=torch.int32)


LLAMAS = {
    "llama": ({}, {}),
    "llama, all heads": ({"num_kv_heads": 8}, {"num_key_value_heads": 8}),
    "llama, tied": ({"tie_embeddings": True}, {"tie_word_embeddings": True}),
    "llama 3 rope scaling": (
        {"rope_theta": 500000.0, "rope_scaling": RopeScaling(factor=8.0, original_length=32)},
        {"rope_parameters": LLAMA3_ROPE},
    ),
    "llama, wide heads": ({"head_dim": 16}, {"head_dim": 16}),
}
FAMILIES = {
    **{name: (transformers.LlamaConfig, ours, theirs) for name, (ours, theirs) in LLAMAS.items()},
    "qwen 3": (transformers.Qwen3Config, {"qk_norm": True}, {}),
    "qwen 3, tied": (
        transformers.Qwen3Config,
        {"qk_norm": True, "tie_embeddings": True},
        {"tie_word_embeddings": True},
    ),
    "qwen 2": (transformers.Qwen2Config, {"qkv_bias": True}, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 20}, {"sliding_window": 20}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_equal_those_of_transformers(family: str) -> None:
    hf_config, ours, theirs = FAMILIES[family]
    model = randomised(Model(**{**BASE, **ours}))
    peer = transformers.AutoModelForCausalLM.from_config(
        hf_config(**{**HF, **theirs}), attn_implementation="eager"
    ).float()
    weights = {llama_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    if model.head is None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    peer.load_state_dict(weights, strict=True)

    tokens_BS, positions_T, segments = inputs()
    peer_logits_BSV = peer(tokens_BS).logits
    logits_TV = model.logits(model.hidden(tokens_BS.flatten(), positions_T, segments))
    assert (logits_TV - peer_logits_BSV.flatten(0, 1)).abs().max() <= 1e-4
    assert peer_logits_BSV.std() > 0.3, "logits this flat would agree by chance"

    peer(tokens_BS, labels=tokens_BS).loss.backward()
    labels_BS = tokens_BS.roll(-1, 1)
    counted_BS = torch.ones_like(tokens_BS, dtype=torch.bool)
    counted_BS[:, -1] = False
    batch = ModelInputs(tokens_BS.flatten(), positions_T, segments, labels_BS.flatten(), counted_BS.flatten())
    objective, _ = model(batch)
    (objective / counted_BS.sum()).backward()
    peers = dict(peer.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, peers[llama_name(name)].grad, rtol=1e-3, atol=1e-5)


def test_gpt2_is_a_configuration() -> None:
    config = Model(
        num_layers=3, hidden_size=64, num_heads=4, num_kv_heads=4, head_dim=16, ffn_size=256, vocab_size=VOCAB,
        max_positions=128, position="learned", norm="layernorm", activation="gelu_tanh", qkv_bias=True,
        attention_bias=True, ffn_bias=True, tie_embeddings=True,
    )  # fmt: skip
    model = randomised(config)
    peer = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=3, n_embd=64, n_head=4, n_positions=128, vocab_size=VOCAB)
    ).eval()
    ours = {name: parameter.detach() for name, parameter in model.named_parameters()}
    weights = {"lm_head.weight": ours["embedding.weight"]}
    for entry in entries(ours, GPT):
        value = torch.cat([ours[name] for name in entry.ours])
        weights[entry.theirs] = value.t() if entry.transposed and value.ndim == 2 else value
    peer.load_state_dict(weights, strict=True)
    tokens_BS, positions_T, segments = inputs()
    logits_TV = model.logits(model.hidden(tokens_BS.flatten(), positions_T, segments))
    assert (logits_TV - peer(tokens_BS).logits.flatten(0, 1)).abs().max() <= 1e-4
