"""What a run is: one typed section for each part of the YAML file. Every field's docstring is its documentation.

Unknown keys are refused. A field whose default is `None` and whose docstring says "derived" is filled in by
`megalm.config.load`, so that the resolved config, which is written to the run directory, has no hidden value.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Name = str


class Section(BaseModel):
    """The manner of all sections: immutable, typed, unknown keys refused, documented by docstrings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class Run(Section):
    dir: str
    """Run directory: config, metrics, log, TensorBoard events and checkpoints go there."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Seed of the initialisation and of the order of samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes a GPU if there is one."""
    compile: bool = False
    """Compile each transformer block with `torch.compile`: slower to start, faster afterwards."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in the backward pass: none, the feed-forward's inner ones (`selective`), or whole
    blocks (`full`)."""


class RopeScaling(Section):
    kind: Literal["llama3"] = "llama3"
    """Llama 3's frequency-dependent scaling."""
    factor: float = Field(8.0, ge=1)
    """How many times longer than `original_length` sequences may become."""
    low_freq_factor: float = Field(1.0, gt=0)
    """Wavelengths above `original_length / low_freq_factor` are scaled by the whole factor."""
    high_freq_factor: float = Field(4.0, gt=0)
    """Wavelengths below `original_length / high_freq_factor` are left as they are."""
    original_length: int = Field(8192, gt=0)
    """Sequence length of the unscaled frequencies."""


class Model(Section):
    preset: str | None = None
    """Name of a preset (`megalm config presets`); the section's other keys override it."""
    num_layers: int = Field(gt=0)
    """Number of transformer blocks."""
    hidden_size: int = Field(gt=0)
    """Width of the residual stream."""
    num_heads: int = Field(gt=0)
    """Number of query heads."""
    num_kv_heads: int | None = Field(None, gt=0)
    """Number of key/value heads; derived: `num_heads`."""
    head_dim: int | None = Field(None, gt=0)
    """Width of a head; derived: `hidden_size / num_heads`."""
    ffn_size: int = Field(gt=0)
    """Inner width of the feed-forward layer."""
    vocab_size: int | None = Field(None, gt=0)
    """Rows of the embedding; derived: the tokenizer's vocabulary."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head, too."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of the normalisation layers."""
    norm_eps: float = Field(1e-5, gt=0)
    """Added to the variance in normalisation layers."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """Feed-forward kind: gated SiLU, exact GELU, or GELU's tanh approximation (GPT-2 and 3)."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary positions, or a learned position embedding of `max_positions` rows (GPT-2 and 3)."""
    max_positions: int | None = Field(None, gt=0)
    """Longest position; derived: `data.sequence_length`."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies for long contexts."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections (Qwen 2, GPT)."""
    attention_bias: bool = False
    """Bias on the attention output projection (GPT)."""
    ffn_bias: bool = False
    """Biases in the feed-forward layer (GPT)."""
    qk_norm: bool = False
    """RMSNorm on each query and key head (Qwen 3)."""
    sliding_window: int | None = Field(None, gt=0)
    """A token sees this many tokens, itself included (Mistral); `None`: all before it."""
    attention_softcap: float | None = Field(None, gt=0)
    """Attention scores s become `cap * tanh(s / cap)`."""
    logit_softcap: float | None = Field(None, gt=0)
    """Output logits z become `cap * tanh(z / cap)`."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of the squared log-normaliser in the training loss (PaLM, section 5)."""
    document_attention: bool = True
    """Tokens attend only within their own document; positions start anew at each document."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights; output projections get `init_std / sqrt(2 * num_layers)`."""


class Tokenizer(Section):
    path: str
    """`byte`, a directory written by `megalm tokenizer train`, a `tokenizer.json`, or a sentencepiece `.model`."""


class Source(Section):
    name: Name = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name in metrics and reports."""
    path: str
    """Directory written by `megalm data prepare`."""
    weight: float = Field(1.0, gt=0)
    """Share of the training tokens, relative to the other sources' weights."""


class Validation(Section):
    samples: int = Field(64, ge=0)
    """Sequences held out of training at the end of EACH source; 0 holds out none."""


class Data(Section):
    sequence_length: int = Field(gt=0)
    """Tokens a sequence."""
    sources: list[Source] = Field(min_length=1)
    """What to train on, blended by weight."""
    validation: Validation = Validation()
    """What is held out for evaluation."""


class BatchRamp(Section):
    start: int = Field(gt=0)
    """Global batch size of the first step."""
    increment: int = Field(gt=0)
    """By how much it grows at a time, until `batch.global_size`."""
    samples: int = Field(gt=0)
    """Number of sequences over which it grows."""


class Batch(Section):
    global_size: int = Field(gt=0)
    """Sequences a step."""
    micro_size: int | None = Field(None, gt=0)
    """Sequences that go through the model at once; derived: the largest divisor of all batch sizes with at most
    8,192 tokens."""
    ramp: BatchRamp | None = None
    """Start with smaller batches."""


class Pipeline(Section):
    size: int = Field(1, gt=0)
    """Number of pipeline stages."""
    schedule: Literal[
        "gpipe", "1f1b", "interleaved", "looped-bfs", "zb-h1", "interleaved-zb", "zbv", "dualpipev", "auto"
    ] = "1f1b"
    """Order of forward and backward passes over the stages; with one stage all are the same."""
    chunks: int = Field(1, gt=0)
    """Model chunks a rank."""


class Zero(Section):
    stage: Literal[0, 1, 2, 3] = 1
    """What is sharded over data ranks: 1 optimizer state, 2 gradients too, 3 parameters too."""


class Parallel(Section):
    tensor: int = Field(1, gt=0)
    """Ranks that share each layer's matrices."""
    pipeline: Pipeline = Pipeline()
    """Ranks that share the layers."""
    data: int | Literal["auto"] = "auto"
    """Ranks that share the batch; `auto` takes all that are left."""
    zero: Zero = Zero()
    """Sharding over the data ranks."""


class Optimizer(Section):
    kind: Literal["adamw"] = "adamw"
    """AdamW (arXiv 1711.05101), fused where the device has it."""
    learning_rate: float = Field(3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay; not applied to norms, biases and embeddings."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm; `null`: never."""


class Schedule(Section):
    kind: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """Learning rate after the warm-up: flat then linear decay (`wsd`), cosine, linear, or flat."""
    steps: int | None = Field(None, gt=0)
    """Length of the run in steps; give this or `tokens`."""
    tokens: int | None = Field(None, gt=0)
    """Length of the run in tokens, rounded up to whole steps; give this or `steps`."""
    warmup_steps: int | None = Field(None, ge=0)
    """Linear warm-up from 0; derived: 1% of the run."""
    warmup_tokens: int | None = Field(None, ge=0)
    """The warm-up in tokens, in place of `warmup_steps`."""
    decay_steps: int | None = Field(None, ge=0)
    """Length of the final decay (`wsd` only); derived: 20% of the run."""
    decay_tokens: int | None = Field(None, ge=0)
    """The final decay in tokens, in place of `decay_steps`."""
    min_ratio: float = Field(0.1, ge=0, le=1)
    """Last learning rate, as a share of the peak."""


class Precision(Section):
    compute: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; parameters, gradients and optimizer state are float32."""


class Checkpoint(Section):
    every: int | None = Field(None, gt=0)
    """Steps between checkpoints; derived: a tenth of the run. The last step is always saved."""
    keep: int = Field(3, gt=0)
    """How many of the newest checkpoints are kept."""


class Evaluate(Section):
    every: int | None = Field(None, gt=0)
    """Steps between evaluations on the held-out samples; derived: a tenth of the run. The last step is always
    evaluated."""


class Log(Section):
    every: int = Field(1, gt=0)
    """Steps between lines in `metrics.jsonl` and the terminal."""
    tensorboard: bool = True
    """Write TensorBoard events, too."""


class Config(Section):
    run: Run
    model: Model
    tokenizer: Tokenizer
    data: Data
    batch: Batch
    parallel: Parallel = Parallel()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    precision: Precision = Precision()
    checkpoint: Checkpoint = Checkpoint()
    evaluate: Evaluate = Evaluate()
    log: Log = Log()
