"""Text from a model: one token after the other, with the keys and values of all earlier ones kept.

Shapes: I new tokens, V vocabulary, K key/value heads, E head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megalm.config.sections import known
from megalm.data.tokenizer import Tokenizer
from megalm.errors import UserError
from megalm.model.transformer import LayerCache, Transformer
from megalm.train.run_directory import TrainedModel


def sample(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token from the smallest set of likeliest tokens whose probabilities reach `top_p` (nucleus sampling,
    arXiv 1904.09751); temperature 0 takes the likeliest."""
    if temperature == 0:
        return int(logits_V.argmax())
    # The largest logit first becomes 0, so that no temperature, however small, divides to infinity.
    scaled_V = (logits_V.double() - logits_V.max()) / temperature
    probabilities_V, order_V = torch.softmax(scaled_V, -1).sort(descending=True, stable=True)
    before_V = probabilities_V.cumsum(-1) - probabilities_V
    before_V[0] = -1.0  # the likeliest token is in every set
    probabilities_V = probabilities_V.where(before_V < top_p, 0)
    return int(order_V[torch.multinomial(probabilities_V, 1, generator=generator)])


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: Sequence[int],
    max_new_tokens: int,
    eod: int,
    vocab_size: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Continues `prompt` (at least one token) until `eod`, which is not given, or `max_new_tokens`.

    Only the first `vocab_size` rows of the head stand for tokens; a model may have more.
    """
    config, device = model.config, model.output.weight.device
    capacity = len(prompt) + max_new_tokens
    shape = (capacity, known(config.num_kv_heads), known(config.head_dim))
    caches = [LayerCache(*torch.empty(2, *shape, dtype=model.compute, device=device)) for _ in range(config.num_layers)]
    generator = torch.Generator().manual_seed(seed)
    new_I, done = torch.tensor(prompt, device=device), 0
    for _ in range(max_new_tokens):
        positions_I = torch.arange(done, done + len(new_I), device=device)
        segments = torch.tensor([0, len(new_I)], dtype=torch.int32)
        x_ID = model.hidden(new_I, positions_I, segments, caches)
        done += len(new_I)
        token = sample(model.logits(x_ID[-1:])[0, :vocab_size].cpu(), temperature, top_p, generator)
        if token == eod:
            return
        yield token
        new_I = torch.tensor([token], device=device)


def text_pieces(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterator[int]) -> Iterator[str]:
    """The text of `tokens` piece by piece, where characters that span tokens come whole."""
    ids = list(prompt)
    shown = len(tokenizer.decode(ids))
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd"):
            yield text[shown:]
            shown = len(text)
    yield tokenizer.decode(ids)[shown:]


def continuation(
    trained: TrainedModel, prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> Iterator[str]:
    """The text that follows `prompt`, piece by piece. Raises UserError if the prompt is empty or too long."""
    tokenizer, model = trained.tokenizer, trained.model
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt is not valid UTF-8: give it as text in the terminal's encoding") from None
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError("--prompt is empty: give at least one character to continue")
    limit = known(model.config.max_positions)
    if model.config.position == "learned" and len(ids) + max_new_tokens > limit:
        raise UserError(
            f"--max-new-tokens={max_new_tokens} after a prompt of {len(ids)} tokens passes the model's {limit} learned "
            f"positions: use at most {max(0, limit - len(ids))}"
        )
    tokens = generate(model, ids, max_new_tokens, tokenizer.eod, tokenizer.vocab_size, temperature, top_p, seed)
    return text_pieces(tokenizer, ids, tokens)
