"""Which of transformers' architectures a model section is, and its config.json, both ways.

    section of the config          LlamaForCausalLM     RMSNorm, SwiGLU, rotary; biases on all of attention or none
    num_layers: 32       <----->   MistralForCausalLM   + sliding window, no biases
    qkv_bias: true                 Qwen2ForCausalLM     + query, key and value biases; window possible
    ...                            Qwen3ForCausalLM     + norms of queries and keys; window possible
                                   GPT2LMHeadModel      LayerNorm, GELU, learned positions, biases everywhere

What no architecture has is refused with its key, never left out: what is exported computes what was trained. Rotary
keys are written as `rope_theta` and `rope_scaling`, which transformers 4 and 5 read, and are read in both forms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from megalm.config.sections import Model
from megalm.errors import UserError, nearest

COMMON = {  # our key -> theirs
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
GPT2 = {
    "num_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_heads": "n_head",
    "ffn_size": "n_inner",
    "vocab_size": "vocab_size",
    "max_positions": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
PLAIN: dict[str, Any] = {"attention_sinks": False, "attention_softcap": None, "logit_softcap": None}
ROTARY: dict[str, Any] = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "qk_norm": False, **PLAIN}
UNBIASED = {"qkv_bias": False, "attention_bias": False, "ffn_bias": False}


def _qkv_bias(model: Model) -> bool:
    return model.qkv_bias


@dataclass(frozen=True)
class Architecture:
    """A class of transformers: what a model section must say to be one of it, and how config.json says the rest."""

    name: str
    model_type: str
    keys: Mapping[str, str]
    """Our key -> the key in config.json, of numbers and switches that are the same in both."""
    fixed: Mapping[str, Any]
    """Our key -> the one value that it can have here, or a function of the model that gives it."""
    defaults: Mapping[str, Any]
    """Of config.json's keys that may be left out of it."""

    def misfits(self, model: Model) -> Iterator[tuple[str, Any]]:
        """What keeps `model` from being one of these: our key, and the value that it would have to have."""
        for key, wanted in self.fixed.items():
            value = wanted(model) if callable(wanted) else wanted
            if getattr(model, key) != value:
                yield key, value


LLAMA = Architecture(
    "LlamaForCausalLM",
    "llama",
    {**COMMON, "qkv_bias": "attention_bias", "ffn_bias": "mlp_bias"},
    {**ROTARY, "attention_bias": _qkv_bias, "sliding_window": None},
    {"max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False},
)
MISTRAL = Architecture(
    "MistralForCausalLM",
    "mistral",
    {**COMMON, "sliding_window": "sliding_window"},
    {**ROTARY, **UNBIASED},
    {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
)
QWEN2 = Architecture(
    "Qwen2ForCausalLM",
    "qwen2",
    COMMON,
    {**ROTARY, **UNBIASED, "qkv_bias": True},
    {"num_key_value_heads": 32, "max_position_embeddings": 32768},
)
QWEN3 = Architecture(
    "Qwen3ForCausalLM",
    "qwen3",
    {**COMMON, "qkv_bias": "attention_bias"},
    {**ROTARY, "qk_norm": True, "attention_bias": _qkv_bias, "ffn_bias": False},
    {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "attention_bias": False},
)
GPT = Architecture(
    "GPT2LMHeadModel",
    "gpt2",
    GPT2,
    {
        **PLAIN,
        **dict.fromkeys(UNBIASED, True),
        "norm": "layernorm",
        "activation": lambda model: model.activation if model.activation in ACTIVATIONS else "gelu_tanh",
        "position": "learned",
        "qk_norm": False,
        "sliding_window": None,
        "num_kv_heads": lambda model: model.num_heads,
        "head_dim": lambda model: model.hidden_size // model.num_heads,
    },
    {"n_inner": None, "n_positions": 1024, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
)
ARCHITECTURES = (LLAMA, MISTRAL, QWEN2, QWEN3, GPT)  # the first that fits is taken
MAY_BE_MISSING = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_key_value_heads": None, "head_dim": None}
WANTED: dict[str, Any] = {  # of config.json, where it has the key at all
    "hidden_act": "silu",
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
    "add_cross_attention": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}
ROPE_KEYS = {  # ours -> theirs
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_length": "original_max_position_embeddings",
}


def architecture_of(model: Model) -> Architecture:
    """The architecture that computes what a resolved model section says; UserError if there is none."""
    misfits = {architecture.name: list(architecture.misfits(model)) for architecture in ARCHITECTURES}
    closest = min(ARCHITECTURES, key=lambda architecture: len(misfits[architecture.name]))
    if misfits[closest.name]:
        key, value = misfits[closest.name][0]
        raise UserError(
            f"model.{key}={getattr(model, key)} is in no architecture that can be exported; the closest, "
            f"{closest.name}, has {value}: such a model lives in megalm's checkpoints only"
        )
    return closest


def to_config(model: Model, eod: int | None, dtype: str) -> dict[str, Any]:
    """config.json of a resolved model section, whose documents end with the token `eod`."""
    architecture = architecture_of(model)
    config = {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        **{theirs: getattr(model, ours) for ours, theirs in architecture.keys.items()},
        "initializer_range": model.init_std,
        "bos_token_id": None,
        "eos_token_id": eod,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if architecture is GPT:
        dropout = {"embd_pdrop": model.dropout, "resid_pdrop": model.dropout, "attn_pdrop": 0.0}
        return config | {"activation_function": ACTIVATIONS[model.activation], **dropout}
    scaling = model.rope_scaling
    config |= {"hidden_act": "silu", "attention_dropout": 0.0, "rope_theta": model.rope_theta, "rope_scaling": None}
    if scaling is not None:
        factors = {theirs: getattr(scaling, ours) for ours, theirs in ROPE_KEYS.items()}
        config["rope_scaling"] = {"rope_type": scaling.kind, **factors}
    if architecture in (QWEN2, QWEN3):
        window = model.sliding_window
        config |= {"use_sliding_window": window is not None, "sliding_window": window}
        config["max_window_layers"] = model.num_layers if window is None else 0  # layers from here on have the window
    return config


def from_config(config: Mapping[str, Any], where: str) -> tuple[Architecture, Model]:
    """The architecture and the model section that a config.json means; `where` names it in errors.

    Raises UserError for what megalm has no such model of, with the key.
    """
    kinds = {architecture.model_type: architecture for architecture in ARCHITECTURES}
    if (kind := config.get("model_type")) not in kinds:
        raise UserError(
            f"{where}: model_type={kind!r} is none that can be imported: they are {', '.join(kinds)}."
            f"{nearest(str(kind), kinds)}"
        )
    architecture = kinds[kind]
    for key, wanted in WANTED.items():
        if key in config and config[key] not in (wanted, None):
            raise UserError(f"{where}: {key}={config[key]!r} is in no model of megalm, which has {wanted!r} only")
    known = {**MAY_BE_MISSING, **architecture.defaults, **config}
    if missing := [theirs for theirs in architecture.keys.values() if theirs not in known]:
        raise UserError(f"{where}: has no {missing[0]}: is it the config.json of a {kind} model?")
    fields = {ours: known[theirs] for ours, theirs in architecture.keys.items()}
    fields = {key: wanted for key, wanted in architecture.fixed.items() if not callable(wanted)} | fields
    if architecture is GPT:
        fields["activation"] = _activation(config.get("activation_function", "gelu_new"), where)
        fields["ffn_size"] = fields["ffn_size"] or 4 * fields["hidden_size"]
    else:
        fields |= _rotary(config, where)
    if architecture in (LLAMA, QWEN3):
        fields["attention_bias"] = fields["qkv_bias"]
    if architecture in (QWEN2, QWEN3):
        fields["sliding_window"] = _window(config, known["num_hidden_layers"], where)
    try:
        model = Model.model_validate(fields | {"init_std": config.get("initializer_range", 0.02)})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return architecture, model.model_copy(
        update={
            "num_kv_heads": model.num_kv_heads or model.num_heads,
            "head_dim": model.head_dim or model.hidden_size // model.num_heads,
        }
    )


def _activation(name: str, where: str) -> str:
    ours = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
    if name not in ours:
        raise UserError(f"{where}: activation_function={name!r} is none of {', '.join(ours)}")
    return ours[name]


def _rotary(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_scaling` and `rope_theta`."""
    said = {key: value for key in ("rope_scaling", "rope_parameters") for key, value in (config.get(key) or {}).items()}
    theta = said.pop("rope_theta", config.get("rope_theta", 10000.0))
    kind = said.pop("type", "default")
    kind = said.pop("rope_type", kind)
    if said.pop("partial_rotary_factor", None) not in (None, 1.0) or kind not in ("default", "llama3"):
        raise UserError(f"{where}: rope_type={kind!r} with {said}: megalm has the types default and llama3")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if missing := [theirs for theirs in ROPE_KEYS.values() if theirs not in said]:
        raise UserError(f"{where}: rope_type='llama3' has no {missing[0]}")
    return {"rope_theta": theta, "rope_scaling": {ours: said[theirs] for ours, theirs in ROPE_KEYS.items()}}


def _window(config: Mapping[str, Any], layers: int, where: str) -> int | None:
    """Qwen's sliding window, which all layers have here or none."""
    if not config.get("use_sliding_window", False) or (window := config.get("sliding_window", 4096)) is None:
        return None
    first = config.get("max_window_layers", 28)
    kinds = config.get("layer_types") or [("full", "sliding")[n >= first] + "_attention" for n in range(layers)]
    if len(set(kinds)) > 1:
        raise UserError(f"{where}: only some layers have the sliding window; megalm's models have it in all or none")
    return window if "sliding_attention" in kinds else None
