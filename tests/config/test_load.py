from __future__ import annotations

import itertools
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megalm.config import Config, load_config, resolve, to_yaml
from megalm.config.presets import PRESETS
from megalm.config.schema import schema
from megalm.config.text import apply_overrides, parse_yaml
from megalm.errors import UserError

EXAMPLE = """
run: {dir: runs/tiny, seed: 1234}
model: {preset: llama-tiny, num_layers: 8, hidden_size: 128, num_heads: 8, num_kv_heads: 4, ffn_size: 384}
tokenizer: {path: byte}
data:
  sequence_length: 256
  sources: [{name: code, path: data/code, weight: 0.7}, {name: docs, path: data/docs, weight: 0.3}]
  validation: {samples: 64}              # held out of training, from each source
batch: {global_size: 32, micro_size: 4}  # sequences
schedule: {kind: wsd, steps: 200, warmup_steps: 20, decay_steps: 40, min_ratio: 0.1}
optimizer: {kind: adamw, learning_rate: 1.0e-3, betas: [0.9, 0.95], weight_decay: 0.1, clip_norm: 1.0}
precision: {compute: float32}
parallel: {tensor: 1, pipeline: {size: 1, schedule: 1f1b, chunks: 1}, data: auto, zero: {stage: 1}}
checkpoint: {every: 50, keep: 3}
evaluate: {every: 50}
log: {every: 1}
"""
MINIMAL: dict[str, Any] = {
    "run": {"dir": "runs/minimal"},
    "model": {"preset": "llama-tiny"},
    "tokenizer": {"path": "byte"},
    "data": {"sequence_length": 256, "sources": [{"name": "text", "path": "data/text"}]},
    "batch": {"global_size": 24},
    "schedule": {"steps": 250},
}


def with_overrides(*overrides: str, world_size: int | None = 1) -> Config:
    return resolve(apply_overrides(MINIMAL, overrides), world_size)


def test_the_example_of_all_sections_loads(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(EXAMPLE)
    config = load_config(tmp_path / "config.yaml", ["data.sources.0.weight=0.5", "batch.micro_size=8"])
    assert config.model.num_layers == 8
    assert config.model.head_dim == 16
    assert [source.weight for source in config.data.sources] == [0.5, 0.3]
    assert config.batch.micro_size == 8
    assert config.optimizer.betas == (0.9, 0.95)


@settings(max_examples=60)
@given(
    tensor=st.sampled_from([1, 2, 3, 4, 8]),
    pipeline=st.integers(1, 6),
    data=st.none() | st.integers(1, 8),
    processes=st.integers(1, 48),
)
def test_layouts_that_are_proposed_fit(tensor: int, pipeline: int, data: int | None, processes: int) -> None:
    given_ = [f"parallel.tensor={tensor}", f"parallel.pipeline.size={pipeline}", f"parallel.data={data or 'auto'}"]
    try:
        with_overrides(*given_, world_size=processes)
    except UserError as error:
        for sizes in re.findall(r"tensor=(\d+), pipeline.size=(\d+), data=(\d+)", str(error)):
            keys = "tensor", "pipeline.size", "data"
            proposed = [f"parallel.{key}={size}" for key, size in zip(keys, sizes, strict=True)]
            config = with_overrides(*proposed, world_size=processes).parallel
            assert config.tensor * config.pipeline.size * int(config.data) == processes


def test_defaults_are_derived_from_what_is_given() -> None:
    config = with_overrides()
    assert (config.model.num_kv_heads, config.model.head_dim, config.model.max_positions) == (2, 64, 256)
    assert config.model.vocab_size is None
    assert config.batch.micro_size == 24
    assert config.parallel.data == 1
    assert (config.schedule.warmup_steps, config.schedule.decay_steps) == (3, 50)
    assert (config.checkpoint.every, config.evaluate.every) == (25, 25)
    assert with_overrides("model={num_layers: 1, hidden_size: 12, num_heads: 3, ffn_size: 1}").model.num_kv_heads == 3


def test_what_an_order_mode_needs_is_derived_for_it_alone() -> None:
    plain, window, megatron = (
        with_overrides(f"data.order={mode}").data for mode in ("stateless", "window", "megatron")
    )
    assert (plain.window_tokens, plain.split) == (None, None)
    assert (window.window_tokens, window.split) == (2**24, None)
    assert (megatron.window_tokens, megatron.split) == (None, "969,30,1")
    assert with_overrides("data.order=window", "data.window_tokens=1000").data.window_tokens == 1000
    assert plain.sources[0].weight == 1.0


def test_stages_have_names_and_may_end_within_a_batch_of_the_run() -> None:
    sources = "data.sources=[{name: code, path: a}, {name: docs, path: b}]"
    run = 250 * 24 * 256
    for tokens in ("", f"tokens: {run - 1}, ", f"tokens: {run // 2 - 24 * 256 + 1}, ", f"tokens: {5 * run}, "):
        stages = (
            f"[{{tokens: {run // 2}, weights: {{code: 1, docs: 2.5}}}}, {{{tokens}name: anneal, weights: {{docs: 1}}}}]"
        )
        config = with_overrides(sources, f"data.stages={stages}")
        assert config.data.stages is not None
        assert [stage.name for stage in config.data.stages] == ["stage-1", "anneal"]
        assert [source.weight for source in config.data.sources] == [None, None]
        assert resolve(parse_yaml(to_yaml(config), "")) == config


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_only_wsd_has_a_decay_of_its_own(kind: str) -> None:
    assert with_overrides(f"schedule.kind={kind}").schedule.decay_steps is None


def test_derived_lengths_yield_to_given_ones() -> None:
    long_warmup = with_overrides("schedule.warmup_steps=240").schedule
    assert (long_warmup.warmup_steps, long_warmup.decay_steps) == (240, 10)
    long_decay = with_overrides("schedule.decay_steps=249").schedule
    assert (long_decay.warmup_steps, long_decay.decay_steps) == (1, 249)
    one_step = with_overrides("schedule.steps=1").schedule
    assert (one_step.warmup_steps, one_step.decay_steps) == (1, 0)


def test_lengths_in_tokens_become_steps_that_cover_them() -> None:
    per_step = 24 * 256
    tokens = f"schedule={{tokens: {100 * per_step}, warmup_tokens: {5 * per_step + 1}, decay_tokens: {10 * per_step}}}"
    schedule = with_overrides(tokens).schedule
    assert (schedule.steps, schedule.warmup_steps, schedule.decay_steps) == (100, 6, 10)
    assert (schedule.tokens, schedule.warmup_tokens, schedule.decay_tokens) == (None, None, None)
    ramp = "batch.ramp={start: 8, increment: 8, samples: 48}"  # steps of 8, 8, 8, 16, 16, 24, 24, ...
    ramped = with_overrides(ramp, f"schedule={{tokens: {20 * per_step}}}").schedule
    assert ramped.steps == 5 + 18  # 56 samples in 5 steps, then 424 more
    assert with_overrides(ramp).batch.micro_size == 8


def test_a_presets_keys_are_overridden_one_by_one() -> None:
    config = with_overrides("model.preset=llama3.1-8b", "model.rope_scaling.factor=32", "model.num_layers=2")
    assert config.model.num_layers == 2
    assert config.model.hidden_size == 4096
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == 32
    assert config.model.rope_scaling.high_freq_factor == 4
    assert with_overrides("model={preset: llama3.1-8b, rope_scaling: null}").model.rope_scaling is None
    assert with_overrides("model={preset: mistral-7b, sliding_window: null}").model.sliding_window is None


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_a_valid_config(name: str) -> None:
    config = with_overrides(f"model.preset={name}")
    for key, value in PRESETS[name].items():
        assert config.model.model_dump()[key] == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E+3", 1000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-1.5e3", -1500.0),
        ("010", 10),
        ("15_000_000_000_000", 15 * 10**12),
        ("-7", -7),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("on", "on"),
        ("no", "no"),
        ("0x10", "0x10"),
        ("TRUE", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("'1e-3'", "1e-3"),
        ('"true"', "true"),
        ("1f1b", "1f1b"),
        ("e5", "e5"),
        ("[1, 2.0, x]", [1, 2.0, "x"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ("&x [1]", [1]),
    ],
)
def test_scalars_mean_what_yaml_1_2_says(text: str, value: Any) -> None:
    parsed = parse_yaml(text, "here")
    assert parsed == value
    assert type(parsed) is type(value)


def test_numbers_in_exponent_form_are_numbers_in_files_and_overrides(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(EXAMPLE.replace("1.0e-3", "1e-3"))
    assert load_config(tmp_path / "config.yaml").optimizer.learning_rate == 1e-3
    assert with_overrides("optimizer.learning_rate=2e-4").optimizer.learning_rate == 2e-4
    assert with_overrides("optimizer.learning_rate=1").optimizer.learning_rate == 1.0


def test_overrides_make_what_is_missing_and_the_last_one_wins() -> None:
    original = deepcopy(MINIMAL)
    raw = apply_overrides(MINIMAL, ["log.every=3", "log.every=4", "data.sources.0.weight=2", "parallel.zero.stage=0"])
    assert original == MINIMAL
    assert raw["log"] == {"every": 4}
    assert raw["data"]["sources"][0]["weight"] == 2
    assert resolve(raw).parallel.zero.stage == 0


def test_an_empty_section_is_a_section_of_defaults() -> None:
    assert resolve({**MINIMAL, "log": None, "optimizer": None}).log.every == 1


def test_the_data_axis_takes_the_processes_that_are_left() -> None:
    layout = ("parallel.tensor=2", "parallel.pipeline.size=2")
    config = with_overrides(*layout, world_size=12)
    assert config.parallel.data == 3
    assert config.batch.micro_size == 8
    assert with_overrides(*layout, world_size=None).parallel.data == 1
    assert with_overrides(*layout, "parallel.data=4", world_size=None).parallel.data == 4
    assert with_overrides("parallel.tensor=4", world_size=4).model.num_kv_heads == 2, "key/value heads may be repeated"


@given(
    start=st.integers(1, 12),
    increment=st.integers(1, 12),
    jumps=st.integers(1, 6),
    length=st.sampled_from([1, 100, 2048, 4096, 8192, 100_000]),
    ranks=st.sampled_from([1, 2, 3]),
)
def test_the_derived_micro_size_is_the_largest_that_divides_every_batch(
    start: int, increment: int, jumps: int, length: int, ranks: int
) -> None:
    sizes = [start + jump * increment for jump in range(jumps + 1)]
    assume(all(size % ranks == 0 for size in sizes))
    raw = {
        **MINIMAL,
        "data": {**MINIMAL["data"], "sequence_length": length},
        "batch": {"global_size": sizes[-1], "ramp": {"start": start, "increment": increment, "samples": 1000}},
    }
    fitting = [
        micro
        for micro in range(1, sizes[-1] + 1)
        if all(size % (ranks * micro) == 0 for size in sizes) and (micro == 1 or micro * length <= 8192)
    ]
    assert resolve(raw, ranks).batch.micro_size == max(fitting)


paths = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=[chr(c) for c in range(32)]), min_size=1)
positive = st.floats(1e-30, 1e30)


@st.composite
def raw_configs(draw: st.DrawFn) -> dict[str, Any]:
    def maybe(**fields: st.SearchStrategy[Any]) -> dict[str, Any]:
        return {key: draw(values) for key, values in fields.items() if draw(st.booleans())}

    names = draw(st.lists(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True), min_size=1, unique=True))
    steps = draw(st.integers(1, 10**6))
    length = draw(st.integers(1, 512))
    raw: dict[str, Any] = {
        "run": {"dir": draw(paths), **maybe(seed=st.integers(0, 2**63 - 1), compile=st.booleans())},
        "model": {
            "preset": draw(st.sampled_from(list(PRESETS))),
            **maybe(
                norm_eps=positive,
                sliding_window=st.none() | st.integers(1, 100),
                z_loss=positive,
                logit_softcap=st.none() | positive,
                vocab_size=st.integers(2, 10**6),
            ),
        },
        "tokenizer": {"path": draw(paths)},
        "data": {
            "sequence_length": length,
            "sources": [{"name": name, "path": draw(paths), **maybe(weight=positive)} for name in names],
            **maybe(validation=st.fixed_dictionaries({"samples": st.integers(0, 100)})),
        },
        "batch": {
            "global_size": draw(st.sampled_from([48, 96])),
            **maybe(
                ramp=st.just({"start": 16, "increment": 16, "samples": 1000}), micro_size=st.sampled_from([1, 2, 8])
            ),
        },
        "schedule": {
            "kind": draw(st.sampled_from(["wsd", "cosine", "linear", "constant"])),
            **draw(st.sampled_from([{"steps": steps}, {"tokens": steps * 16 * length}])),
            **maybe(min_ratio=st.floats(0, 1)),
        },
        **maybe(
            optimizer=st.fixed_dictionaries(
                {
                    "betas": st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=2),
                    "learning_rate": positive,
                },
            ),
            parallel=st.fixed_dictionaries(
                {
                    "tensor": st.sampled_from([1, 2]),
                    "sequence_sharding": st.just(False),
                    "data": st.sampled_from(["auto", 1, 2]),
                }
            ),
        ),
    }
    return raw


@settings(max_examples=150, deadline=None)
@given(raw_configs())
def test_a_resolved_config_written_as_yaml_loads_to_the_equal_config(raw: dict[str, Any]) -> None:
    config = resolve(raw, None)
    text = to_yaml(config)
    again = parse_yaml(text, "config")
    assert resolve(again, None) == config
    assert to_yaml(resolve(again, None)) == text
    assert list(again) == list(Config.model_fields), "in the order of the sections"


def test_yaml_quotes_text_that_looks_like_something_else(tmp_path: Path) -> None:
    for text in ["1e-3", "019", "on", "null", "2024-01-01", "#x", "a: b", " x ", "é", "1_0", "~"]:
        config = resolve({**MINIMAL, "run": {"dir": text}})
        (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        assert load_config(tmp_path / "config.yaml").run.dir == text


def walk(node: Any) -> list[dict[str, Any]]:
    """Every mapping in a JSON document."""
    if isinstance(node, list):
        return list(itertools.chain.from_iterable(map(walk, node)))
    return [node, *walk(list(node.values()))] if isinstance(node, dict) else []


def test_the_schema_describes_every_key() -> None:
    document = schema()
    objects = [node for node in walk(document) if "properties" in node]
    assert len(objects) > len(Config.model_fields)
    for node in objects:
        assert node["additionalProperties"] is False
        for key, field in node["properties"].items():
            assert field.get("description"), f"{node['title']}.{key}"
    model = document["$defs"]["Model"]
    assert model["properties"]["preset"]["anyOf"][0]["enum"] == list(PRESETS)
    assert model["anyOf"][0] == {"required": ["preset"]}


def test_files_are_utf_8_with_or_without_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + EXAMPLE.encode())
    assert load_config(path).run.seed == 1234
    path.write_bytes(EXAMPLE.encode() + b"# \xff")
    with pytest.raises(UserError, match=r"config\.yaml: byte \d+ is not UTF-8"):
        load_config(path)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_every_example_loads(path: Path) -> None:
    assert resolve(parse_yaml(to_yaml(load_config(path)), "")) == load_config(path)
