"""Megatron's tensors to our parameters. Reading its files is `tools/convert_checkpoint.py`'s part.

    decoder.layers.self_attention.linear_qkv.weight  [L, K (H/K + 2) E, D]     of each key/value head: its queries, k, v
    decoder.layers.mlp.linear_fc1.weight             [L, 2F, D]                gate above up, or up alone
    embedding.word_embeddings.weight                 [V + padding, D]

A key without a layer's number has all layers in its first dim; layers that differ have keys of their own. A norm is
the linear layer's before which it stands (`linear_qkv.layer_norm_weight`), or of its own (`input_layernorm.weight`).

Norms' weights are taken as they are, so a model of `--apply-layernorm-1p`, which keeps them less 1, comes out wrong:
nothing among the tensors tells of it.

Shapes: L layers, D hidden, H query heads, K key/value heads, E head dim, F feed-forward, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor

from megalm.checkpoint.huggingface.names import VOCABULARY
from megalm.config.sections import Model, known
from megalm.errors import UserError

LAYER = {  # what stands below each other of ours in one of theirs -> its names, {} for weight or bias
    ("attention.query", "attention.key", "attention.value"): ("self_attention.linear_qkv.{}",),
    ("attention.query_norm",): ("self_attention.q_layernorm.{}",),
    ("attention.key_norm",): ("self_attention.k_layernorm.{}",),
    ("attention.output",): ("self_attention.linear_proj.{}",),
    ("attention_norm",): ("self_attention.linear_qkv.layer_norm_{}", "input_layernorm.{}"),
    ("feed_forward.gate", "feed_forward.up"): ("mlp.linear_fc1.{}",),
    ("feed_forward.up",): ("mlp.linear_fc1.{}",),
    ("feed_forward.down",): ("mlp.linear_fc2.{}",),
    ("feed_forward_norm",): ("mlp.linear_fc1.layer_norm_{}", "pre_mlp_layernorm.{}"),
}
TOP = {
    "embedding.weight": "embedding.word_embeddings.weight",
    "position_embedding.weight": "embedding.position_embeddings.weight",
    "final_norm.weight": "decoder.final_layernorm.weight",
    "final_norm.bias": "decoder.final_layernorm.bias",
    "head.weight": "output_layer.weight",
}
PADDING = 1 << 14
"""More rows than Megatron adds to a vocabulary, whose size it makes a multiple of 128 times the tensor ranks."""
OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")


def from_megatron(
    model: Model,
    shapes: Mapping[str, tuple[int, ...]],
    keys: Collection[str],
    read: Callable[[str], Tensor],
    say: Callable[[str], None],
) -> dict[str, Tensor]:
    """Our parameters, of these `shapes`, out of a checkpoint with these `keys`, each of which is `read` once. `say` is
    told of rows of the vocabulary that are left out.

    Raises UserError for what is missing, of another shape, or would be left out.
    """
    ours: dict[str, Tensor] = {}
    left = {key for key in keys if key.startswith(OF_THE_MODEL) and "_extra_state" not in key}

    def take(key: str) -> Tensor:
        left.discard(key)
        return read(key)

    for name, key in TOP.items():
        if name in shapes:
            if key not in left:
                raise UserError(f"the checkpoint has no tensor '{key}', which the model section asks for")
            ours[name] = tensor = take(key)
            rows = shapes[name][0]
            if name in VOCABULARY and rows < len(tensor) < rows + PADDING:
                ours[name] = tensor[:rows]
                say(f"{name}: left out {len(tensor) - rows} rows, which stand for no token of the config's tokenizer")
    for modules, templates in LAYER.items():
        for kind in ("weight", "bias"):
            names = [f"{module}.{kind}" for module in modules]
            if not all(f"layers.0.{name}" in shapes for name in names) or f"layers.0.{names[0]}" in ours:
                continue
            candidates = [template.format(kind) for template in templates]
            for name, parts in zip(names, _cut(model, modules, _layers(model, candidates, left, take)), strict=True):
                ours.update({f"layers.{number}.{name}": part for number, part in enumerate(parts)})
    if left:
        raise UserError(f"the checkpoint has a tensor '{min(left)}', for which the model section has no use")
    for name, shape in shapes.items():
        if name not in ours:
            raise UserError(f"the checkpoint has nothing for {name}, which the model section asks for")
        if (theirs := tuple(ours[name].shape)) != shape:
            raise UserError(f"the checkpoint's {name} is {list(theirs)}, but the model section makes it {list(shape)}")
    return {name: tensor.float().contiguous() for name, tensor in ours.items()}


def _layers(model: Model, candidates: list[str], left: set[str], take: Callable[[str], Tensor]) -> Tensor:
    """A tensor of all layers, [L, ...]."""
    for name in candidates:
        if f"decoder.layers.{name}" in left:
            stacked = take(f"decoder.layers.{name}")
            if len(stacked) != model.num_layers:
                raise UserError(f"the checkpoint has {len(stacked)} layers, but model.num_layers={model.num_layers}")
            return stacked
        if f"decoder.layers.0.{name}" in left:
            numbered = [f"decoder.layers.{number}.{name}" for number in range(model.num_layers)]
            if missing := [key for key in numbered if key not in left]:
                raise UserError(f"the checkpoint has no tensor '{missing[0]}': is model.num_layers too large?")
            return torch.stack([take(key) for key in numbered])
    raise UserError(f"the checkpoint has no tensor 'decoder.layers.{candidates[0]}', which the model section asks for")


def _cut(model: Model, modules: tuple[str, ...], stacked: Tensor) -> list[Tensor]:
    """What each of our modules has of it, [L, ...]."""
    if len(modules) == 3:
        keys, head = known(model.num_kv_heads), known(model.head_dim)
        group = model.num_heads // keys
        if stacked.shape[1] != keys * (group + 2) * head:
            raise UserError(
                f"the checkpoint's linear_qkv has {stacked.shape[1]} rows, but model.num_heads={model.num_heads}, "
                f"num_kv_heads={keys} and head_dim={head} make {keys * (group + 2) * head}"
            )
        parts = stacked.unflatten(1, (keys, group + 2, head)).split([group, 1, 1], dim=2)
        return [part.flatten(1, 3) for part in parts]
    return list(stacked.chunk(len(modules), dim=1))
