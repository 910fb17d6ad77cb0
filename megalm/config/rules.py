"""The rules between keys: what must divide, fit or agree. Each broken rule is one line with its mend."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import isqrt, log

from megalm.config import deepspeed
from megalm.config.explain import choices
from megalm.config.sections import Batch, Config, Data, Model, Optimizer, Parallel, Pipeline, Schedule, Stage, Zero
from megalm.errors import nearest

CHUNKS = {"gpipe": (1,), "1f1b": (1,), "zb-h1": (1,), "zbv": (2,), "dualpipev": (2,)}
"""Stages a rank of the schedules that leave no choice."""


def broken_rules(config: Config, processes: int) -> Iterator[str]:
    """One line for each rule that a config, its defaults not derived yet, breaks when run by `processes` processes."""
    yield from _model(config.model, config.data.sequence_length)
    yield from _data(config.data, config.run.seed)
    yield from _optimizer(config.optimizer)
    yield from _schedule(config.schedule)
    yield from _ramp(config.batch)
    yield from _layout(config, processes)


def fewest_processes(parallel: Parallel) -> int:
    """The fewest processes that a layout can run on."""
    return parallel.tensor * parallel.pipeline.size * (1 if parallel.data == "auto" else parallel.data)


def data_ranks(parallel: Parallel, processes: int) -> int:
    """Size of the data axis, with `auto` filling what is left."""
    return processes // (parallel.tensor * parallel.pipeline.size) if parallel.data == "auto" else parallel.data


def pipeline_chunks(pipeline: Pipeline) -> int:
    """Stages a rank, as given or as the schedule wants."""
    if pipeline.chunks is not None or pipeline.size == 1:
        return pipeline.chunks or 1
    return CHUNKS.get(pipeline.schedule, (1 if pipeline.schedule == "auto" else 2,))[0]


def split_layers(split: str) -> list[int]:
    """`5,6,6,5` as numbers."""
    return [int(layers) for layers in split.split(",")]


def batch_sizes(batch: Batch) -> Iterator[tuple[str, int]]:
    """Key and value of the numbers whose divisors divide every batch size, that of each step of a ramp included."""
    yield "batch.global_size", batch.global_size
    if batch.ramp is not None:
        yield "batch.ramp.start", batch.ramp.start
        yield "batch.ramp.increment", batch.ramp.increment


def _model(model: Model, sequence_length: int) -> Iterator[str]:
    heads, width, head = model.num_heads, model.hidden_size, model.head_dim
    if head is None:
        yield from _must_divide("model.num_heads", heads, "model.hidden_size", width, ", or set model.head_dim")
    yield from _must_divide("model.num_kv_heads", model.num_kv_heads or heads, "model.num_heads", heads)
    if model.attention_sinks and model.attention != "fused_softmax":
        yield (
            f"model.attention_sinks=true does not go with model.attention={model.attention}: choose "
            "model.attention=fused_softmax, or leave out the sinks"
        )
    if model.position == "rope" and head is not None and head % 2:
        yield f"model.head_dim={head} is odd, which rotary positions cannot be: choose {head + 1}"
    if model.position == "rope" and head is None and width % heads == 0 and width // heads % 2:
        yield (
            f"model.hidden_size={width} / model.num_heads={heads} gives heads of {width // heads}, odd, which rotary "
            f"positions cannot be: set model.head_dim={width // heads + 1}"
        )
    if model.max_positions is not None and sequence_length > model.max_positions:
        yield (
            f"data.sequence_length={sequence_length} is longer than model.max_positions={model.max_positions}: "
            "shorten the one or raise the other"
        )
    scaling = model.rope_scaling
    if scaling is not None and model.position != "rope":
        yield f"model.rope_scaling has no meaning with model.position='{model.position}': remove it"
    if scaling is not None and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield (
            f"model.rope_scaling.low_freq_factor={scaling.low_freq_factor} is not less than "
            f"high_freq_factor={scaling.high_freq_factor}: llama 3 has 1 and 4"
        )


def _data(data: Data, seed: int) -> Iterator[str]:
    for name, count in Counter(source.name for source in data.sources).items():
        if count > 1:
            yield f"data.sources has {count} sources named '{name}': give each its own name"
    for key, mode in (("window_tokens", "window"), ("split", "megatron")):
        if (value := getattr(data, key)) is not None and data.order != mode:
            yield f"data.{key}={value} has no meaning with data.order='{data.order}': remove it, or choose order {mode}"
    if data.window_tokens is not None and data.window_tokens < data.sequence_length:
        yield (
            f"data.window_tokens={data.window_tokens} is less than data.sequence_length={data.sequence_length}: a "
            "window holds many sequences, make it larger"
        )
    if data.split is not None and float(data.split.split(",")[0]) == 0:
        yield f"data.split='{data.split}' trains on nothing: raise its first number"
    if data.order == "megatron" and seed >= 2**32:
        yield f"run.seed={seed} is too large for data.order='megatron': choose one below {2**32}"
    if data.fim is not None and len({data.fim.prefix, data.fim.middle, data.fim.suffix}) < 3:
        yield "data.fim.prefix, middle and suffix are not three different tokens: give each its own id"
    if data.stages is not None:
        yield from _stages(data, data.stages)


def _stages(data: Data, stages: list[Stage]) -> Iterator[str]:
    names = [source.name for source in data.sources]
    if data.order == "megatron":
        yield "data.stages has no meaning with data.order='megatron': remove it, or choose order stateless or window"
    for number, source in enumerate(data.sources):
        if source.weight is not None:
            yield (
                f"data.sources.{number}.weight={source.weight} has no meaning with data.stages, which have weights of "
                "their own: remove it"
            )
        if all(source.name not in stage.weights for stage in stages):
            yield f"data.sources.{number} ('{source.name}') is in no stage's weights: add it to one, or leave it out"
    for number, stage in enumerate(stages):
        for name in stage.weights:
            if name not in names:
                hint = nearest(name, names) or f" The sources are {', '.join(names)}."
                yield f"data.stages.{number}.weights.{name}: no source has this name.{hint}"
        if stage.tokens is None and number < len(stages) - 1:
            yield f"data.stages.{number}.tokens is missing: set it; only the last stage may leave it out"


def _optimizer(optimizer: Optimizer) -> Iterator[str]:
    for key in ("momentum", "nesterov"):
        value = getattr(optimizer, key)
        if optimizer.kind != "muon" and value != Optimizer.model_fields[key].default:
            yield f"optimizer.{key}={value} has no meaning with optimizer.kind='{optimizer.kind}': remove it"


def _schedule(schedule: Schedule) -> Iterator[str]:
    if schedule.steps is None and schedule.tokens is None:
        yield "schedule has no length: set schedule.steps or schedule.tokens"
    for steps, tokens in (("steps", "tokens"), ("warmup_steps", "warmup_tokens"), ("decay_steps", "decay_tokens")):
        if getattr(schedule, steps) is not None and getattr(schedule, tokens) is not None:
            given = f"schedule.{steps}={getattr(schedule, steps)} and schedule.{tokens}={getattr(schedule, tokens)}"
            yield f"{given} say the same thing: keep one of them"
    for key in ("decay_steps", "decay_tokens"):
        if schedule.kind != "wsd" and getattr(schedule, key) is not None:
            yield (
                f"schedule.{key}={getattr(schedule, key)} has no meaning with schedule.kind='{schedule.kind}': "
                "remove it, or choose kind wsd"
            )


def _ramp(batch: Batch) -> Iterator[str]:
    ramp = batch.ramp
    if ramp is None:
        return
    grows = batch.global_size - ramp.start
    if grows <= 0:
        yield f"batch.ramp.start={ramp.start} is not less than batch.global_size={batch.global_size}: make it smaller"
    else:
        yield from _must_divide("batch.ramp.increment", ramp.increment, "batch.global_size - batch.ramp.start", grows)


def _layout(config: Config, processes: int) -> Iterator[str]:
    parallel, model, batch = config.parallel, config.model, config.batch
    tensor, stages, chunks = parallel.tensor, parallel.pipeline.size, pipeline_chunks(parallel.pipeline)
    yield from _processes(config, processes)
    yield from _must_divide("parallel.tensor", tensor, "model.num_heads", model.num_heads)
    yield from _must_divide("parallel.tensor", tensor, "model.ffn_size", model.ffn_size)
    if model.vocab_size is not None and model.vocab_size < tensor:
        yield f"parallel.tensor={tensor} is more than model.vocab_size={model.vocab_size}: choose less"
    keys = model.num_kv_heads or model.num_heads
    if keys % tensor and tensor % keys:
        yield (
            f"parallel.tensor={tensor} neither divides model.num_kv_heads={keys} nor is a multiple of it: "
            f"choose {choices(_divisors(keys, tensor))}, or a multiple of {keys}"
        )
    if parallel.sequence_sharding:
        yield from _must_divide("parallel.tensor", tensor, "data.sequence_length", config.data.sequence_length)
    if parallel.tensor_overlap > 1 and (tensor == 1 or not parallel.sequence_sharding):
        why = "parallel.tensor=1" if tensor == 1 else "parallel.sequence_sharding=false"
        yield f"parallel.tensor_overlap={parallel.tensor_overlap} has no meaning with {why}: set tensor_overlap=1"
    if chunks > 1 and stages == 1:
        yield f"parallel.pipeline.chunks={chunks} has no meaning with pipeline.size=1: set chunks=1"
    if stages > 1 and chunks not in (allowed := CHUNKS.get(parallel.pipeline.schedule, (chunks,))):
        yield (
            f"parallel.pipeline.chunks={chunks} does not fit parallel.pipeline.schedule={parallel.pipeline.schedule}, "
            f"which has {allowed[0]}: leave it out"
        )
    if stages * chunks > model.num_layers:
        product = f"parallel.pipeline.size={stages}" + (f" * parallel.pipeline.chunks={chunks}" if chunks > 1 else "")
        yield f"{product} is more than model.num_layers={model.num_layers}: every chunk needs a layer, choose less"
    if (split := parallel.pipeline.split) is not None:
        layers = split_layers(split)
        if len(layers) != stages * chunks:
            yield (
                f"parallel.pipeline.split='{split}' has {len(layers)} numbers for {stages * chunks} stages: give each "
                "stage one"
            )
        elif sum(layers) != model.num_layers:
            yield (
                f"parallel.pipeline.split='{split}' has {sum(layers)} layers, and model.num_layers={model.num_layers}: "
                "share out all of them"
            )

    data = max(data_ranks(parallel, processes), 1)
    yield from _offload(parallel.zero, data)
    if parallel.zero.stage == 0 and (parallel.zero.shard or 1) > 1:
        yield (
            f"parallel.zero.shard={parallel.zero.shard} has no meaning with parallel.zero.stage=0, which shards "
            "nothing: remove it, or choose stage 1, 2 or 3"
        )
    yield from _must_divide("parallel.zero.shard", parallel.zero.shard or data, "the data ranks", data)
    yield from deepspeed.broken_rules(config, data)
    for key, size in batch_sizes(batch):
        if size % data:
            yield f"{key}={size} cannot be shared between {data} data ranks: choose a multiple of {data}"
            break
        share = f"{key} / {data} data ranks" if data > 1 else key
        if broken := list(_must_divide("batch.micro_size", batch.micro_size or 1, share, size // data)):
            yield from broken
            break


def _offload(zero: Zero, data: int) -> Iterator[str]:
    if zero.engine == "fsdp" and zero.offload == "cpu" and data == 1:
        yield (
            "parallel.zero.offload=cpu needs at least 2 data ranks with parallel.zero.engine=fsdp: "
            "set parallel.zero.engine=deepspeed, or offload=none"
        )


def _processes(config: Config, processes: int) -> Iterator[str]:
    parallel = config.parallel
    factors = {"parallel.tensor": parallel.tensor, "parallel.pipeline.size": parallel.pipeline.size}
    if parallel.data != "auto":
        factors["parallel.data"] = parallel.data
    named = " * ".join(f"{key}={size}" for key, size in factors.items() if size > 1) or "parallel.data=1"
    need, fits = fewest_processes(parallel), _fitting(config, processes)
    if processes < need:
        yield f"{named} needs at least {need} processes, this run has {processes}: start {need}, or choose {fits}"
    elif parallel.data == "auto" and processes % need:
        yield (
            f"{named} does not divide this run's {processes} processes: start a multiple of {need}, or choose {fits}"
        )
    elif parallel.data != "auto" and processes != need:
        yield f"{named} makes {need} processes, this run has {processes}: start {need}, or choose {fits}"


def _fitting(config: Config, processes: int) -> str:
    """The layouts of this many processes that the model and the batch allow and that are nearest to the given one."""
    parallel, model = config.parallel, config.model
    keys = model.num_kv_heads or model.num_heads
    wanted = parallel.tensor, parallel.pipeline.size, None if parallel.data == "auto" else parallel.data
    found = []
    for tensor in _all_divisors(processes):
        if model.num_heads % tensor or model.ffn_size % tensor or (keys % tensor and tensor % keys):
            continue
        if parallel.sequence_sharding and config.data.sequence_length % tensor:
            continue
        for pipeline in _all_divisors(processes // tensor):
            data = processes // tensor // pipeline
            chunks = pipeline_chunks(parallel.pipeline) if pipeline > 1 else 1
            if pipeline * chunks <= model.num_layers and all(size % data == 0 for _, size in batch_sizes(config.batch)):
                layout = tensor, pipeline, data
                distance = sum(abs(log(size / want)) for size, want in zip(layout, wanted, strict=True) if want)
                found.append((distance, layout))
    layouts = [f"tensor={t}, pipeline.size={p}, data={d}" for _, (t, p, d) in sorted(found)[:3]]
    return "; or ".join(layouts) or f"another number: no layout of {processes} fits the model and the batch"


def _must_divide(key: str, value: int, of: str, number: int, mend: str = "") -> Iterator[str]:
    if number % value:
        yield f"{key}={value} does not divide {of}={number}: choose {choices(_divisors(number, value))}{mend}"


def _divisors(number: int, value: int) -> list[str]:
    """The divisors of `number`; if they are many, those around `value`."""
    divisors = _all_divisors(number)
    if len(divisors) > 10:
        divisors = [d for d in divisors if d < value][-2:] + [d for d in divisors if d > value][:2]
    return [str(d) for d in divisors]


def _all_divisors(number: int) -> list[int]:
    small = [d for d in range(1, min(isqrt(number), 1_000_000) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
