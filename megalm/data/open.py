"""From a run's config to what it reads: tokenizer, sources, loader, and what the run wants of each source."""

from __future__ import annotations

from dataclasses import dataclass

from megalm.config.batches import plan_batches
from megalm.config.sections import Config, known
from megalm.data.dataset import OpenFiles, Source
from megalm.data.fim import FillInTheMiddle
from megalm.data.loader import Loader
from megalm.data.needs import Need, refuse_unmet, token_needs
from megalm.data.order import OrderOptions, Stage
from megalm.data.tokenizer import Tokenizer, load_tokenizer
from megalm.errors import UserError


@dataclass(frozen=True)
class RunData:
    """What a run reads, all of it checked."""

    tokenizer: Tokenizer
    loader: Loader
    needs: list[Need]
    """What the whole run takes of each source."""


def open_run_data(config: Config) -> RunData:
    """The data of a resolved config. Raises a UserError for whatever is wrong with it; writes nothing."""
    data = config.data
    tokenizer = load_tokenizer(config.tokenizer.path)
    rows = config.model.vocab_size or tokenizer.vocab_size
    for mark in ("prefix", "middle", "suffix") if data.fim else ():
        if (token := getattr(data.fim, mark)) >= rows or token == tokenizer.eod:
            what = "the end of documents" if token == tokenizer.eod else "no id of the model"
            raise UserError(f"data.fim.{mark}={token} is {what}: choose another below model.vocab_size={rows}")
    samples = plan_batches(config.batch).first_sample(known(config.schedule.steps))
    files = OpenFiles()
    loader = Loader(
        [Source(source.name, source.path, tokenizer.fingerprint, files) for source in data.sources],
        _weights(config),
        data.sequence_length,
        config.run.seed,
        tokenizer.eod,
        config.model.document_attention,
        data.validation.samples,
        options=_options(config, samples),
        fim=FillInTheMiddle(**data.fim.model_dump()) if data.fim else None,
        workers=data.workers,
    )
    needs = token_needs(
        loader.order.mixture,
        loader.order.places.epoch_samples,
        samples,
        data.sequence_length,
        loader.source_names,
        [source.max_epochs for source in data.sources],
    )
    refuse_unmet(needs)
    return RunData(tokenizer, loader, needs)


def _options(config: Config, samples: int) -> OrderOptions:
    data = config.data
    if data.order == "window":
        return OrderOptions("window", window_tokens=known(data.window_tokens))
    if data.order == "megatron":
        return OrderOptions("megatron", split=known(data.split), samples=samples)
    return OrderOptions()


def _weights(config: Config) -> list[float] | list[Stage]:
    """The sources' weights, or the stages with their lengths in samples: each boundary is rounded up to a sample."""
    data = config.data
    if data.stages is None:
        return [known(source.weight) for source in data.sources]
    number = {source.name: i for i, source in enumerate(data.sources)}
    stages, tokens, first = [], 0, 0
    for stage in data.stages[:-1]:
        tokens += known(stage.tokens)
        end = -(-tokens // data.sequence_length)
        stages.append(Stage(known(stage.name), {number[n]: w for n, w in stage.weights.items()}, end - first))
        first = end
    last = data.stages[-1]
    return [*stages, Stage(known(last.name), {number[n]: w for n, w in last.weights.items()}, None)]
