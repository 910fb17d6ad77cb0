"""What a run is: one typed section for each part of the YAML file. Every field's docstring is its documentation.

Unknown keys are refused and nothing is converted silently: text is no number, 3.0 is no whole number. A field whose
default is `None` and whose docstring says "derived" is filled in by `megalm.config.load`, so that the resolved config,
which is written to the run directory, has no hidden value. Relative paths are relative to the working directory.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
FilePath = Annotated[str, Field(pattern=r"^[^\x00-\x1f]+$")]
Clock = Annotated[str, Field(pattern=r"^[0-9]+:[0-5][0-9]:[0-5][0-9]$")]
DecayRate = Annotated[float, Field(ge=0, lt=1)]
T = TypeVar("T")
PipelineSchedule = Literal[
    "gpipe", "1f1b", "interleaved", "looped-bfs", "zb-h1", "interleaved-zb", "zbv", "dualpipev", "auto"
]


def known(value: T | None) -> T:
    """A derived default of a resolved config, where it is never None."""
    assert value is not None, "only a resolved config may be used"
    return value


class Section(BaseModel):
    """The manner of all sections: immutable, typed, unknown keys refused, documented by docstrings."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Run(Section):
    dir: FilePath
    """Run directory: config, metrics, log, TensorBoard events and checkpoints go there."""
    init_from: FilePath | None = None
    """Where the weights of a new run are from: what `megalm import` wrote, another run's directory, or a checkpoint.
    Optimizer, schedule and data start anew; a run that has a checkpoint of its own goes on from that."""
    group: Name | None = None
    """Unix group whose members may read what the run writes; `null`: its owner alone may."""
    seed: int = Field(default=1234, ge=0, lt=2**63)
    """Seed of the initialisation and of the order of samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes a GPU if there is one."""
    compile: bool = False
    """Compile each transformer block with `torch.compile`: slower to start, faster afterwards."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, all but the results of matrix products and attention
    (`selective`), or whole blocks (`full`)."""
    time_limit: Annotated[float, Field(gt=0)] | Clock | None = None
    """Seconds, or `H:MM:SS`, from the start of the command (restarts included), within which the run saves and stops,
    to go on when it is started again; `null`: it runs to its end."""
    timeout: float = Field(default=600.0, gt=0, le=1e6)
    """Seconds after which a rank that does not answer ends the run; more than any rank takes to write its part of a
    checkpoint."""


class RopeScaling(Section):
    kind: Literal["llama3"] = "llama3"
    """Llama 3's frequency-dependent scaling."""
    factor: float = Field(default=8.0, ge=1)
    """How many times longer than `original_length` sequences may become."""
    low_freq_factor: float = Field(default=1.0, gt=0)
    """Wavelengths above `original_length / low_freq_factor` are scaled by the whole factor."""
    high_freq_factor: float = Field(default=4.0, gt=0)
    """Wavelengths below `original_length / high_freq_factor` are left as they are."""
    original_length: int = Field(default=8192, gt=0)
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
    num_kv_heads: int | None = Field(default=None, gt=0)
    """Number of key/value heads; derived: `num_heads`."""
    head_dim: int | None = Field(default=None, gt=0)
    """Width of a head; derived: `hidden_size / num_heads`."""
    ffn_size: int = Field(gt=0)
    """Inner width of the feed-forward layer."""
    vocab_size: int | None = Field(default=None, gt=0)
    """Rows of the embedding; derived: the tokenizer's vocabulary."""
    tie_embeddings: bool = False
    """Use the embedding matrix as the output head, too."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Kind of the normalisation layers."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance in normalisation layers."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """Feed-forward kind: gated SiLU, exact GELU, or GELU's tanh approximation (GPT-2 and 3)."""
    position: Literal["rope", "learned"] = "rope"
    """Rotary positions, or a learned position embedding of `max_positions` rows (GPT-2 and 3)."""
    max_positions: int | None = Field(default=None, gt=0)
    """Longest position; derived: `data.sequence_length`."""
    rope_theta: float = Field(default=10000.0, gt=0)
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
    sliding_window: int | None = Field(default=None, gt=0)
    """A token sees this many tokens, itself included (Mistral); `None`: all before it."""
    attention: Literal["auto", "fused_softmax"] = "auto"
    """How attention is computed: flash attention on GPUs and our own kernels on CPUs that have the instructions, and
    products over blocks elsewhere (`auto`), or two matrix products with our own softmax between (`fused_softmax`),
    which sinks need."""
    attention_sinks: bool = False
    """A learned logit a head that takes its share of the attention and attends to nothing (gpt-oss; `fused_softmax`
    only)."""
    attention_softcap: float | None = Field(default=None, gt=0)
    """Attention scores s become `cap * tanh(s / cap)`."""
    logit_softcap: float | None = Field(default=None, gt=0)
    """Output logits z become `cap * tanh(z / cap)`."""
    z_loss: float = Field(default=0.0, ge=0)
    """Weight of the squared log-normaliser in the training loss (PaLM, section 5)."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of each label's weight that is spread evenly over the vocabulary, in the training loss (arXiv
    1512.00567, section 7)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the embedding's, attention's and feed-forward layer's outputs that is dropped in training."""
    document_attention: bool = True
    """Tokens attend only within their own document; positions start anew at each document."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; output projections get `init_std / sqrt(2 * num_layers)`."""


class Tokenizer(Section):
    path: FilePath
    """`byte`, a directory written by `megalm tokenizer train`, a `tokenizer.json`, or a sentencepiece `.model`."""


class Source(Section):
    name: Name
    """Name in metrics and reports."""
    path: FilePath
    """Directory written by `megalm data prepare`."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the training tokens, relative to the other sources' weights; derived: 1, or none with `data.stages`."""
    max_epochs: float | None = Field(default=None, gt=0)
    """How often the run may go through the source at most; a run that wants more is refused before it starts."""


class Validation(Section):
    samples: int = Field(default=64, ge=0)
    """Sequences held out of training at the end of EACH source; 0 holds out none."""


class Stage(Section):
    name: Name | None = None
    """Name in reports; derived: `stage-1`, `stage-2`, ..."""
    tokens: int | None = Field(default=None, gt=0)
    """Length in tokens; the last stage may leave it out: it lasts to the end of the run."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Share of the stage's tokens of each source that takes part, by its name."""


class FillInTheMiddle(Section):
    rate: float = Field(default=0.5, ge=0, le=1)
    """Share of documents that are rearranged (arXiv 2207.14255)."""
    spm_rate: float = Field(default=0.5, ge=0, le=1)
    """Share of these in the order suffix, prefix, middle; the others are in the order prefix, suffix, middle."""
    prefix: int = Field(ge=0)
    """Id of the token before the prefix."""
    middle: int = Field(ge=0)
    """Id of the token before the middle."""
    suffix: int = Field(ge=0)
    """Id of the token before the suffix."""


class Data(Section):
    sequence_length: int = Field(gt=0)
    """Tokens a sequence."""
    sources: list[Source] = Field(min_length=1)
    """What to train on, blended by weight."""
    stages: list[Stage] | None = Field(default=None, min_length=1)
    """Blends one after the other, such as pre-training and annealing; each source goes on where it stopped."""
    order: Literal["stateless", "window", "megatron"] = "stateless"
    """Stretches of text from anywhere (`stateless`), documents shuffled and packed whole inside of windows (`window`),
    or what Megatron-LM makes of the same text (`megatron`), for runs that come from there."""
    window_tokens: int | None = Field(default=None, gt=0)
    """Tokens that are shuffled and packed together (`window` only); derived: 16,777,216."""
    split: str | None = Field(default=None, pattern=r"^[0-9]*\.?[0-9]+(,[0-9]*\.?[0-9]+){0,2}$")
    """Megatron's `--split` of the documents, of which the first share is trained on (`megatron` only); derived:
    969,30,1."""
    fim: FillInTheMiddle | None = None
    """Rearrange documents so that the model learns to fill in the middle."""
    workers: int = Field(default=1, gt=0, le=64)
    """Threads that prepare batches ahead. They never change what a batch holds."""
    validation: Validation = Validation()
    """What is held out for evaluation."""


class BatchRamp(Section):
    start: int = Field(gt=0)
    """Global batch size of the first step."""
    increment: int = Field(gt=0)
    """By how much it grows at a time, until `batch.global_size`."""
    samples: int = Field(gt=0)
    """Number of sequences over which it grows; each size gets an equal share of them."""


class Batch(Section):
    global_size: int = Field(gt=0)
    """Sequences a step."""
    micro_size: int | None = Field(default=None, gt=0)
    """Sequences that go through the model at once; derived: the largest divisor of a data rank's share of
    all batch sizes with at most 8,192 tokens."""
    ramp: BatchRamp | None = None
    """Start with smaller batches."""


class Pipeline(Section):
    size: int = Field(default=1, gt=0)
    """Number of pipeline ranks."""
    schedule: PipelineSchedule = "1f1b"
    """Order of forward and backward passes over the stages; with one stage all are the same."""
    chunks: int | None = Field(default=None, gt=0)
    """Stages a rank; derived: 1, or 2 for the schedules that need several."""
    split: str | None = Field(default=None, pattern=r"^[1-9][0-9]*(,[1-9][0-9]*)*$")
    """Layers of each stage, in the order of the layers, such as `5,6,6,5`; derived: such that the slowest stage is
    fastest."""
    costs_from: FilePath | None = None
    """Run directory with a recorded step (`log.timeline`) of the same model, whose measured costs decide the stages and
    the order of `auto`; `null`: the model's operations do."""
    memory_cap: float | None = Field(default=None, gt=0)
    """Micro-batches of which a rank with an equal share of the layers may keep all activations at once: `auto` keeps to
    it, and other schedules are refused if they need more; `null`: no limit."""


class Zero(Section):
    stage: int = Field(default=1, ge=0, le=3)
    """What is sharded over data ranks: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too; with one data
    rank all are the same."""
    shard: int | None = Field(default=None, gt=0)
    """Data ranks, neighbours, that share one copy; groups of them replicate it (hybrid sharding); derived: all data
    ranks, or 1 with stage 0."""
    engine: Literal["fsdp", "deepspeed"] = "fsdp"
    """What shards: torch's FSDP2, or DeepSpeed with the settings of the section `deepspeed` (without a pipeline)."""
    offload: Literal["none", "cpu"] = "none"
    """Where parameters and optimizer state rest: on the device, or in the host's memory."""


class Parallel(Section):
    tensor: int = Field(default=1, gt=0)
    """Ranks that share each layer's matrices."""
    sequence_sharding: bool = True
    """Tensor ranks share the activations between the layers' matrices, too, by rows of tokens."""
    tensor_overlap: int = Field(default=1, gt=0)
    """Chunks into which a gather before a matrix product is cut, so that each travels while another is multiplied."""
    pipeline: Pipeline = Pipeline()
    """Ranks that share the layers."""
    data: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    """Ranks that share the batch; `auto` takes all that are left."""
    zero: Zero = Zero()
    """Sharding over the data ranks."""


class Optimizer(Section):
    kind: Literal["adamw", "muon"] = "adamw"
    """AdamW (arXiv 1711.05101), fused where the device has it; or Muon, whose momentum is made orthogonal, for the
    blocks' matrices, with AdamW for all else and AdamW's learning rate (arXiv 2502.16982)."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    betas: Annotated[tuple[DecayRate, DecayRate], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    momentum: DecayRate = 0.95
    """Decay rate of Muon's momentum (`muon` only)."""
    nesterov: bool = True
    """Whether Muon looks one step ahead along its momentum (`muon` only)."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay; not applied to norms, biases and embeddings."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm; `null`: never."""


class Schedule(Section):
    kind: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """Learning rate after the warm-up: flat then linear decay (`wsd`), cosine, linear, or flat."""
    steps: int | None = Field(default=None, gt=0)
    """Length of the run in steps; give this or `tokens`."""
    tokens: int | None = Field(default=None, gt=0)
    """Length of the run in tokens, in place of `steps`; the resolved config has it in steps, rounded up."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up from 0; derived: 1% of the run."""
    warmup_tokens: int | None = Field(default=None, ge=0)
    """The warm-up in tokens, in place of `warmup_steps`."""
    decay_steps: int | None = Field(default=None, ge=0)
    """Length of the final decay (`wsd` only); derived: 20% of the run."""
    decay_tokens: int | None = Field(default=None, ge=0)
    """The final decay in tokens, in place of `decay_steps`."""
    min_ratio: float = Field(default=0.1, ge=0, le=1)
    """Last learning rate, as a share of the peak."""


class Precision(Section):
    compute: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; parameters, gradients and optimizer state are float32."""


class Checkpoint(Section):
    every: int | None = Field(default=None, gt=0)
    """Steps between checkpoints; derived: a tenth of the run. The last step is always saved."""
    keep: int = Field(default=3, gt=0)
    """How many of the newest checkpoints are kept."""
    keep_every: int | None = Field(default=None, gt=0)
    """Checkpoints whose step is a multiple of this are kept for ever; `null`: none."""
    path: str | None = Field(default=None, min_length=1)
    """Where they go: a directory, or a URL such as `s3://bucket/run` of anything that fsspec has a package for; `null`:
    `checkpoints` in `run.dir`."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written; takes host memory for a copy of what each rank saves."""
    on_corrupt: Literal["fallback", "refuse"] = "fallback"
    """When the newest checkpoint is damaged: go on from the one before, or refuse."""


class Evaluate(Section):
    every: int | None = Field(default=None, gt=0)
    """Steps between evaluations on the held-out samples; derived: a tenth of the run. The last step is always
    evaluated."""


class Log(Section):
    every: int = Field(default=1, gt=0)
    """Steps between lines in `metrics.jsonl` and the terminal."""
    zeros: bool = False
    """Report the share of the gradient's entries that are zero, too."""
    tensorboard: bool = True
    """Write TensorBoard events, too."""
    timeline: bool = False
    """Record when each action of the run's second step ran, on all pipeline ranks, in `timeline.json`, for `megalm plan
    schedule --from-run`."""


class Config(Section):
    """A megalm run."""

    run: Run
    """Where the run lives and how it computes."""
    model: Model
    """The shape of the transformer."""
    tokenizer: Tokenizer
    """What turns text into tokens."""
    data: Data
    """What is read."""
    batch: Batch
    """How many sequences make a step."""
    parallel: Parallel = Parallel()
    """How the work is shared between processes."""
    deepspeed: dict[str, Any] = {}
    """With `parallel.zero.engine: deepspeed`, what its own configuration is to have besides what follows from this
    one, by DeepSpeed's names."""
    optimizer: Optimizer = Optimizer()
    """How gradients become updates."""
    schedule: Schedule
    """Length of the run, and the learning rate over it."""
    precision: Precision = Precision()
    """Number formats."""
    checkpoint: Checkpoint = Checkpoint()
    """When the state is saved."""
    evaluate: Evaluate = Evaluate()
    """When the model is evaluated."""
    log: Log = Log()
    """What is reported."""
