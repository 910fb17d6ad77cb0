"""Exact counts of parameters and of floating-point operations. Pure arithmetic on the config.

A training step's operations: a matrix product with n weights costs 2n a token forward and 4n backward; attention costs
4 H E operations for each (query, key) pair that is seen forward, and 8 H E backward. Recomputation is not counted
(that is the usual meaning of model FLOPs, PaLM, arXiv 2204.02311, appendix B). An embedding look-up costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from megalm.config.sections import Model, known
from megalm.parallel.pipeline.partition import Piece


def parameter_count(model: Model, vocab_size: int) -> int:
    """Parameters of a model whose embedding has `vocab_size` rows, every norm and bias included."""
    width = model.hidden_size
    head = model.head_dim or width // model.num_heads
    queries, keys = model.num_heads * head, (model.num_kv_heads or model.num_heads) * head
    norm = width * (2 if model.norm == "layernorm" else 1)
    inner = model.ffn_size * (2 if model.activation == "swiglu" else 1)

    attention = width * (queries + 2 * keys) + queries * width
    attention += model.qkv_bias * (queries + 2 * keys) + model.attention_bias * width + model.qk_norm * 2 * head
    attention += model.attention_sinks * model.num_heads
    feed_forward = width * inner + model.ffn_size * width + model.ffn_bias * (inner + width)
    positions = (model.max_positions or 0) * width if model.position == "learned" else 0
    embeddings = vocab_size * width * (1 if model.tie_embeddings else 2)
    return model.num_layers * (attention + feed_forward + 2 * norm) + norm + positions + embeddings


def matrix_parameters(config: Model) -> int:
    """Weights that take part in a matrix product for each token: all blocks' matrices and the head."""
    heads = config.num_heads + known(config.num_kv_heads)
    attention = config.hidden_size * known(config.head_dim) * 2 * heads
    feed_forward = config.hidden_size * config.ffn_size * (3 if config.activation == "swiglu" else 2)
    return config.num_layers * (attention + feed_forward) + known(config.vocab_size) * config.hidden_size


def pipeline_pieces(config: Model, sequence_length: int, recompute: str = "none") -> tuple[Piece, ...]:
    """What embedding, each block and the head cost a token, in operations; documents that fill their sequence. What is
    kept of a block is the unit of activations."""
    head = 2 * known(config.vocab_size) * config.hidden_size
    block = 2 * matrix_parameters(config) // config.num_layers - head // config.num_layers
    pairs = seen_pairs((0, sequence_length), config.sliding_window) / sequence_length
    attention = 4 * config.num_heads * known(config.head_dim) * pairs
    again = {"none": 0.0, "selective": 0.0, "full": block + attention}[recompute]
    layer = Piece(block + attention, block + 2 * attention + again, block, activation=1)
    # The head's gradients are computed with its loss (megalm.ops.cross_entropy).
    return (Piece(0, 0, 0), *[layer] * config.num_layers, Piece(3 * head, 0, 0))


def seen_pairs(segments: Sequence[int], window: int | None) -> int:
    """Number of (query, key) pairs of causal attention inside segments with cumulative ends `[0, ..., T]`."""
    pairs = 0
    for start, end in pairwise(segments):
        length = end - start
        full = length * (length + 1) // 2
        hidden = length - window if window is not None and length > window else 0
        pairs += full - hidden * (hidden + 1) // 2
    return pairs


def training_flops(config: Model, tokens: int, pairs: int) -> int:
    """Operations of the forward and backward pass over `tokens` tokens with `pairs` seen (query, key) pairs."""
    attention = 12 * config.num_layers * config.num_heads * known(config.head_dim) * pairs
    return 6 * matrix_parameters(config) * tokens + attention


def tensor_bytes(
    config: Model,
    tokens: int,
    size: int,
    itemsize: int,
    *,
    sequence: bool,
    recompute: str = "none",
    layers: int | None = None,
    embeds: bool = True,
    predicts: bool = True,
) -> int:
    """Bytes that each of `size` tensor ranks sends, in rings, for a micro-batch of `tokens` tokens, forward and
    backward, with activations of `itemsize` bytes; of the whole model, or of a stage.

    A gather or a scattered sum of activations sends a share (size - 1) / size of tokens * hidden_size elements; a whole
    sum twice that. In these shares, with sequence sharding and without:

        block, forward        4, 4        two gathers and two scattered sums, or two whole sums
        block, backward       6, 4        gathers of the inputs again, scattered sums, gathers of the outputs' gradients
        again, recomputed     4, 4 (full)   2, 0 (selective: sums are kept)
        embedding, head       2, 2        each, forward and backward together

    The loss sends two float32 numbers a token to each other rank, three with label smoothing.
    """
    shares = {"none": 0, "selective": 2 if sequence else 0, "full": 4}[recompute] + (10 if sequence else 8)
    shares = shares * (config.num_layers if layers is None else layers) + 2 * embeds + 2 * predicts
    loss = predicts * (3 if config.label_smoothing else 2) * max(4, itemsize) * tokens * (size - 1)
    return shares * (size - 1) * tokens * config.hidden_size * itemsize // size + loss
