"""What a user can get wrong on the command line or in a config: one line that names it and its mend, exit code 2."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from megalm.cli import main

CONFIG = """
run: {dir: runs/tiny}
model: {preset: llama-tiny, num_layers: 8, hidden_size: 128, num_heads: 8, num_kv_heads: 4, ffn_size: 384}
tokenizer: {path: byte}
data:
  sequence_length: 256
  sources: [{name: code, path: data/code, weight: 0.7}, {name: docs, path: data/docs, weight: 0.3}]
batch: {global_size: 32, micro_size: 4}
schedule: {kind: wsd, steps: 200, warmup_steps: 20, decay_steps: 40}
"""


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong command line gives."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("megalm: error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return captured.err


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text(CONFIG)
    return "config.yaml"


OVERRIDES = [
    # unknown names, with the nearest known one
    ("model.num_layer=3", "model.num_layer: unknown key. Did you mean 'num_layers'?"),
    ("modle.num_layers=3", "modle: unknown section. Did you mean 'model'?"),
    ("steps=10", "steps: unknown section. Did you mean 'schedule.steps'?"),
    ("foo=1", "foo: unknown section. The sections are run, model, tokenizer, data,"),
    ("model.zzz=1", "model.zzz: unknown key. The keys of model are preset, num_layers,"),
    ("data.sources.0.wieght=1", "data.sources.0.wieght: unknown key. Did you mean 'weight'?"),
    ("data.validation.sample=1", "data.validation.sample: unknown key. Did you mean 'samples'?"),
    ("model.rope_scaling.factr=3", "model.rope_scaling.factr: unknown key. Did you mean 'factor'?"),
    ("model.preset=llama-tny", "model.preset='llama-tny' is not a preset. Did you mean 'llama-tiny'?"),
    ("model.preset=zzz", "model.preset='zzz' is not a preset. They are llama-tiny,"),
    ("run={dir: 3, sed: 4}", "run.sed: unknown key. Did you mean 'seed'? (and 1 more)"),
    # wrong types: nothing is converted
    ("model.num_layers=three", "model.num_layers='three' must be a whole number"),
    ('model.num_layers="3"', "model.num_layers='3' must be a whole number: remove the quotes"),
    ("model.num_layers=3.7", "model.num_layers=3.7 must be a whole number"),
    ("model.num_layers=true", "model.num_layers=true must be a whole number"),
    ("model.vocab_size=1e3", "model.vocab_size=1000.0 must be a whole number: write 1_000"),
    ("run.compile=yes", "run.compile='yes' must be true or false: write true without quotes"),
    ("run.compile=1", "run.compile=1 must be true or false"),
    ("run.dir=5", 'run.dir=5 must be text: quote it: "5"'),
    ("run.dir=", "run.dir=null must be text"),
    ("run.dir=a: b", "run.dir={'a': 'b'} must be text"),
    ('run.dir=""', "run.dir='' must be text of characters that can be printed, and not empty"),
    ('tokenizer.path="a\\0b"', "tokenizer.path='a\\x00b' must be text of characters that can be printed"),
    ('optimizer.learning_rate="1e-3"', "optimizer.learning_rate='1e-3' must be a number: remove the quotes"),
    ("optimizer.betas=0.9", "optimizer.betas=0.9 must be a list"),
    ("optimizer.betas=[0.9]", "optimizer.betas.1 is missing"),
    ("optimizer.betas=[0.9, 0.9, 0.9]", "optimizer.betas=[0.9, 0.9, 0.9] has too many elements: it takes 2"),
    ("parallel.data=x", "parallel.data='x' must be a whole number or 'auto'"),
    ("parallel.zero=1", "parallel.zero=1 must be a mapping of keys"),
    ("parallel.zero.stage=true", "parallel.zero.stage=true must be a whole number"),
    ("data.sources=x", "data.sources='x' must be a list"),
    ("data.sources=[3]", "data.sources.0=3 must be a mapping of keys"),
    ("model=5", "model=5 must be a mapping of keys"),
    ("log=[1, 2]", "log=[1, 2] must be a mapping of keys"),
    # values out of range
    ("model.num_layers=-3", "model.num_layers=-3 must be greater than 0"),
    ("batch.global_size=0", "batch.global_size=0 must be greater than 0"),
    ("run.seed=-1", "run.seed=-1 must be greater than or equal to 0"),
    ("run.seed=99999999999999999999", "run.seed=99999999999999999999 must be less than 9223372036854775808"),
    ("run.device=gpu", "run.device='gpu' must be 'auto', 'cpu' or 'cuda'. Did you mean 'cpu'?"),
    ("precision.compute=bf16", "precision.compute='bf16' must be 'float32' or 'bfloat16'. Did you mean 'bfloat16'?"),
    ("schedule.kind=wds", "schedule.kind='wds' must be 'wsd', 'cosine', 'linear' or 'constant'. Did you mean 'wsd'?"),
    ("schedule.min_ratio=1.5", "schedule.min_ratio=1.5 must be less than or equal to 1"),
    ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1=1.0 must be less than 1"),
    ("optimizer.learning_rate=1e999", "optimizer.learning_rate=inf must be a finite number"),
    ("optimizer.learning_rate=.nan", "optimizer.learning_rate=nan must be a finite number"),
    ("parallel.data=0", "parallel.data=0 must be greater than 0 or 'auto'"),
    ("parallel.zero.stage=4", "parallel.zero.stage=4 must be less than or equal to 3"),
    ("data.sources=[]", "data.sources=[] has too few elements: it needs at least 1"),
    ("data.sources.0.weight=0", "data.sources.0.weight=0 must be greater than 0"),
    ("data.sources.0.name=a/b", "data.sources.0.name='a/b' must be text of letters, digits,"),
    ("data.order=random", "data.order='random' must be 'stateless', 'window' or 'megatron'"),
    ("data.sources.0.max_epochs=0", "data.sources.0.max_epochs=0 must be greater than 0"),
    ("data.workers=0", "data.workers=0 must be greater than 0"),
    ("data.split=x", "data.split='x' must be up to three numbers with commas, such as 969,30,1"),
    ("data.stages=[]", "data.stages=[] has too few elements: it needs at least 1"),
    ("data.stages=[{weights: {}}]", "data.stages.0.weights={} has too few elements: it needs at least 1"),
    ("data.stages=[{weights: [code]}]", "data.stages.0.weights=['code'] must be a mapping of keys"),
    ("data.stages=[{weights: {code: 0}}]", "data.stages.0.weights.code=0 must be greater than 0"),
    ("data.fim={rate: 2, prefix: 1, middle: 2, suffix: 3}", "data.fim.rate=2 must be less than or equal to 1"),
    # what is missing
    ("run={}", "run.dir is missing: set it (Run directory: config, metrics,"),
    (
        "model={}",
        "model.num_layers is missing: set it, or name a model.preset (Number of transformer blocks) (and 3 more)",
    ),
    ("batch.ramp={start: 8}", "batch.ramp.increment is missing: set it (By how much it grows at a time"),
    # overrides that are none
    ("nokey", "override 'nokey' is not key=value: write, for example, batch.global_size=64"),
    ("=5", "override '=5' is not key=value"),
    ("a..b=5", "override 'a..b=5' is not key=value"),
    ("run.dir.x=5", "run.dir.x: run.dir is a value, not a section: set run.dir=5 alone"),
    ("data.sources.2.weight=1", "data.sources.2: data.sources is a list: its elements are 0 to 1"),
    ("data.sources.-1.weight=1", "data.sources.-1: data.sources is a list: its elements are 0 to 1"),
    ("data.sources.code.weight=1", "data.sources.code: data.sources is a list: its elements are 0 to 1"),
    ("run.dir=[1", "run.dir=[1: expected ',' or ']', but got '<stream end>': check brackets"),
    ("run.dir=@x", "run.dir=@x: found character '@' that cannot start any token: check brackets"),
    ("run.dir=#5", "run.dir=#5: # starts a comment in YAML: quote the value, for example 'run.dir=\"#5\"'"),
    ("run.dir=*x", "run.dir=*x: found undefined alias 'x'"),
    (
        "run.dir=[&a [1, 1], " + ", ".join(f"&{b} [*{a}, *{a}]" for a, b in pairwise("abcdefghijklmnopqrst")) + "]",
        "more than 100000 values",
    ),
    ("log.every=!!python/name:os.system", "the tag tag:yaml.org,2002:python/name:os.system is not known: remove it"),
    ("log={every: 1, every: 2}", "log={every: 1, every: 2}: the key 'every' is given twice: keep one"),
    ("log={1: 2}", "log={1: 2}: the key 1 is not text: quote it"),
    ("run.seed=" + "9" * 50, "9999999999... has 50 digits: write a smaller number"),
    ("run.dir=" + "[" * 5000, ": nested too deeply"),
    # rules between keys
    ("model.num_heads=6", "model.num_heads=6 does not divide model.hidden_size=128: choose 1, 2, 4,"),
    ("model.num_kv_heads=3", "model.num_kv_heads=3 does not divide model.num_heads=8: choose 1, 2, 4 or 8"),
    ("model.attention_sinks=true", "choose model.attention=fused_softmax, or leave out the sinks"),
    ("model.head_dim=17", "model.head_dim=17 is odd, which rotary positions cannot be: choose 18"),
    ("model.hidden_size=120", "gives heads of 15, odd, which rotary positions cannot be: set model.head_dim=16"),
    (
        "model={preset: gpt2, max_positions: 128}",
        "data.sequence_length=256 is longer than model.max_positions=128: shorten the one or raise the other",
    ),
    (
        "model={preset: gpt2, rope_scaling: {}}",
        "model.rope_scaling has no meaning with model.position='learned': remove it",
    ),
    (
        "model.rope_scaling={low_freq_factor: 4}",
        "model.rope_scaling.low_freq_factor=4.0 is not less than high_freq_factor=4.0",
    ),
    ("data.sources.0.name=docs", "data.sources has 2 sources named 'docs': give each its own name"),
    (
        "data.window_tokens=512",
        "data.window_tokens=512 has no meaning with data.order='stateless': remove it, or choose order window",
    ),
    (
        "data.split=9,1",
        "data.split=9,1 has no meaning with data.order='stateless': remove it, or choose order megatron",
    ),
    (
        "data.fim={prefix: 1, middle: 1, suffix: 3}",
        "data.fim.prefix, middle and suffix are not three different tokens: give each its own id",
    ),
    (
        "data.stages=[{weights: {code: 1, docs: 1}}]",
        "data.sources.0.weight=0.7 has no meaning with data.stages, which have weights of their own: remove it",
    ),
    (
        "parallel.zero.offload=cpu",
        "parallel.zero.offload=cpu needs at least 2 data ranks with parallel.zero.engine=fsdp",
    ),
    ("batch.micro_size=5", "batch.micro_size=5 does not divide batch.global_size=32: choose 1, 2, 4, 8, 16 or 32"),
    ("batch.ramp={start: 32, increment: 4, samples: 9}", "batch.ramp.start=32 is not less than batch.global_size=32"),
    (
        "batch.ramp={start: 8, increment: 16, samples: 9}",
        "batch.ramp.increment=16 does not divide batch.global_size - batch.ramp.start=24: choose 1, 2, 3, 4,",
    ),
    (
        "batch.ramp={start: 8, increment: 6, samples: 9}",
        "batch.micro_size=4 does not divide batch.ramp.increment=6: choose 1, 2, 3 or 6",
    ),
    ("schedule={}", "schedule has no length: set schedule.steps or schedule.tokens"),
    ("schedule.tokens=5", "schedule.steps=200 and schedule.tokens=5 say the same thing: keep one of them"),
    ("schedule.warmup_tokens=5", "schedule.warmup_steps=20 and schedule.warmup_tokens=5 say the same thing"),
    ("schedule.decay_tokens=5", "schedule.decay_steps=40 and schedule.decay_tokens=5 say the same thing"),
    ("schedule.kind=cosine", "schedule.decay_steps=40 has no meaning with schedule.kind='cosine': remove it"),
    (
        "schedule.warmup_steps=190",
        "schedule.warmup_steps=190 + schedule.decay_steps=40 is longer than the run (schedule.steps=200): shorten",
    ),
    (
        "schedule={tokens: 81920, decay_tokens: 81921}",
        "schedule.decay_tokens=81921 is longer than the run (schedule.tokens=81920, 10 steps): shorten",
    ),
    ("parallel.pipeline.chunks=2", "parallel.pipeline.chunks=2 has no meaning with pipeline.size=1: set chunks=1"),
    (
        "parallel.tensor_overlap=2",
        "parallel.tensor_overlap=2 has no meaning with parallel.tensor=1: set tensor_overlap=1",
    ),
    ("optimizer.momentum=0.9", "optimizer.momentum=0.9 has no meaning with optimizer.kind='adamw': remove it"),
]


@pytest.mark.parametrize(("override", "message"), OVERRIDES, ids=[override[:40] for override, _ in OVERRIDES])
def test_a_wrong_override_is_named_with_its_mend(
    override: str, message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in mistake(capsys, "train", config, override)
    assert sorted(map(str, Path().iterdir())) == [config], "nothing is left behind"


STAGES = [
    ("[{weights: {code: 1}}]", "data.sources.1 ('docs') is in no stage's weights: add it to one, or leave it out"),
    (
        "[{tokens: 9, weights: {code: 1, dcos: 1}}, {weights: {docs: 1}}]",
        "data.stages.0.weights.dcos: no source has this name. Did you mean 'docs'?",
    ),
    (
        "[{tokens: 9, weights: {zzzz: 1, code: 1}}, {weights: {docs: 1}}]",
        "data.stages.0.weights.zzzz: no source has this name. The sources are code, docs.",
    ),
    (
        "[{weights: {code: 1}}, {weights: {docs: 1}}]",
        "data.stages.0.tokens is missing: set it; only the last stage may leave it out",
    ),
    (
        "[{tokens: 1638400, weights: {code: 1}}, {weights: {docs: 1}}]",
        "data.stages.1 starts after 1,638,400 tokens, and the run (schedule.steps=200) has 1,638,400: shorten",
    ),
    (
        "[{tokens: 1000000, weights: {code: 1}}, {tokens: 630208, weights: {docs: 1}}]",
        "data.stages end after 1,630,208 tokens, and the run (schedule.steps=200) has 1,638,400: leave out",
    ),
]


@pytest.mark.parametrize(("stages", "message"), STAGES)
def test_wrong_stages_are_named_with_their_mend(
    stages: str, message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = "data.sources=[{name: code, path: data/code}, {name: docs, path: data/docs}]"
    assert message in mistake(capsys, "train", config, sources, f"data.stages={stages}")
    assert "data.stages has no meaning with data.order='megatron'" in mistake(
        capsys, "train", config, sources, "data.order=megatron", "data.stages=[{weights: {code: 1, docs: 1}}]"
    )


LAYOUTS = [
    (
        "data.order=window data.window_tokens=255",
        1,
        "data.window_tokens=255 is less than data.sequence_length=256: a window holds many sequences, make it larger",
    ),
    ("data.order=megatron data.split=0,1", 1, "data.split='0,1' trains on nothing: raise its first number"),
    (
        "data.order=megatron run.seed=4294967296",
        1,
        "run.seed=4294967296 is too large for data.order='megatron': choose",
    ),
    ("parallel.tensor=3", 3, "parallel.tensor=3 does not divide model.num_heads=8: choose 1, 2, 4 or 8"),
    (
        "model.ffn_size=387 parallel.tensor=2",
        2,
        "parallel.tensor=2 does not divide model.ffn_size=387: choose 1, 3, 9,",
    ),
    (
        "model.num_heads=24 model.num_kv_heads=6 model.head_dim=16 parallel.tensor=4",
        4,
        "parallel.tensor=4 neither divides model.num_kv_heads=6 nor is a multiple of it: choose 1, 2, 3 or 6",
    ),
    ("parallel.tensor=2", 3, "parallel.tensor=2 does not divide this run's 3 processes: start a multiple of 2"),
    (
        "parallel={tensor: 2, data: 2}",
        8,
        "makes 4 processes, this run has 8: start 4, or choose tensor=2, pipeline.size=1, data=4; or tensor=2, "
        "pipeline.size=2, data=2; or tensor=4, pipeline.size=1, data=2",
    ),
    (
        "parallel={tensor: 4, pipeline: {size: 4}}",
        8,
        "start 16, or choose tensor=2, pipeline.size=4, data=1; or tensor=4, pipeline.size=2, data=1; or",
    ),
    ("parallel.tensor=2", 37, "start a multiple of 2, or choose another number: no layout of 37 fits the model and"),
    ("parallel.pipeline.size=16", 16, "parallel.pipeline.size=16 is more than model.num_layers=8: every chunk needs"),
    (
        "parallel.pipeline.size=2 parallel.pipeline.split=3,3,2",
        2,
        "parallel.pipeline.split='3,3,2' has 3 numbers for 2 stages: give each stage one",
    ),
    (
        "parallel.pipeline.size=2 parallel.pipeline.split=3,4",
        2,
        "parallel.pipeline.split='3,4' has 7 layers, and model.num_layers=8: share out all of them",
    ),
    (
        "parallel.pipeline.size=2 parallel.pipeline.split=8,0",
        2,
        "parallel.pipeline.split='8,0' must be numbers above 0 with commas, such as 5,6,6,5",
    ),
    (
        "parallel.pipeline.size=4 parallel.pipeline.chunks=4 parallel.pipeline.schedule=interleaved",
        4,
        "parallel.pipeline.size=4 * parallel.pipeline.chunks=4 is more than model.num_layers=8",
    ),
    ("batch.global_size=30", 4, "batch.global_size=30 cannot be shared between 4 data ranks: choose a multiple of 4"),
    (
        "parallel.tensor=2",
        1,
        "parallel.tensor=2 needs at least 2 processes, this run has 1: start 2, or choose tensor=1, pipeline.size=1, "
        "data=1",
    ),
    ("parallel.data=2", 1, "parallel.data=2 needs at least 2 processes, this run has 1"),
    (
        "parallel={tensor: 2, pipeline: {size: 4}}",
        1,
        "parallel.tensor=2 * parallel.pipeline.size=4 needs at least 8 processes, this run has 1",
    ),
    ("run.seed=1", 16, "batch.micro_size=4 does not divide batch.global_size / 16 data ranks=2: choose 1 or 2"),
]


@pytest.mark.parametrize(("overrides", "processes", "message"), LAYOUTS)
def test_keys_or_a_layout_that_do_not_fit_are_named_with_its_mend(
    overrides: str, processes: int, message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in mistake(
        capsys, "config", "show", config, "--processes", str(processes), *re.split(r" (?=\w+(?:\.\w+)*=)", overrides)
    )


FILES = [
    (b"", "config.yaml is empty: write sections such as `run: {dir: runs/first}`"),
    (b"- 1\n", "config.yaml holds no mapping"),
    (b"run: {dir: x}\nlog: {every: 1}\nlog: {every: 2}\n", "config.yaml:3:1: the key 'log' is given twice: keep one"),
    (b"run:\n  dir: a: b\n", "config.yaml:2:9: mapping values are not allowed here"),
    (b"run:\n\tdir: x\n", "config.yaml:2:1: found character '\\t' that cannot start any token"),
    (b"run: {dir: x\n", "config.yaml:2:1: expected ',' or '}'"),
    (b"run: {dir: \xff}\n", "config.yaml: byte 11 is not UTF-8: save the config as UTF-8 text"),
    (b"run: {dir: \x00}\n", "config.yaml: unacceptable character #x0000"),
    (b"run: !!python/object/apply:os.system [x]\n", "tag:yaml.org,2002:python/object/apply:os.system is not known"),
    (b"---\nrun: {}\n---\nrun: {}\n", "config.yaml:3:1: but found another document"),
    (b"run: &a [*a]\n", "config.yaml: nested too deeply"),
    (b"run: {dir: x}\n", "model is missing: set it (The shape of the transformer) (and 4 more)"),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=[message[:40] for _, message in FILES])
def test_a_wrong_config_file_is_named_with_the_place(
    content: bytes, message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(config).write_bytes(content)
    assert message in mistake(capsys, "train", config)


COMMAND_LINES = [
    ("nope", "No such command 'nope' (see megalm --help)"),
    ("trian", "No such command 'trian'. Did you mean 'train'? (see megalm --help)"),
    ("config shwo", "No such command 'shwo'. Did you mean 'show'? (see megalm config --help)"),
    ("tokenizer trian", "No such command 'trian'. Did you mean 'train'?"),
    ("--nope", "No such option: --nope (see megalm --help)"),
    ("train", "Missing argument 'CONFIG' (see megalm train --help)"),
    ("train config.yaml --dry-rn", "No such option: --dry-rn (Possible options: --dry-run)"),
    ("train nowhere.yaml", "nowhere.yaml: No such file or directory: give the path of a YAML config"),
    ("train .", ".: Is a directory: give the path of a YAML config"),
    ("train config.yaml/x", "config.yaml/x: Not a directory"),
    ("config show", "Missing argument 'CONFIG'"),
    ("config show config.yaml --processes 0", "Invalid value for '--processes'"),
    ("config schema more", "Got unexpected extra argument(s) (more)"),
    ("generate", "Missing argument 'CHECKPOINT'"),
    ("generate nowhere --prompt x", "Invalid value for 'CHECKPOINT': path 'nowhere' does not exist"),
    ("generate .", "nothing to go on with: give --prompt TEXT, --prompts FILE or --interactive"),
    ("generate . --prompt x --interactive", "the last one alone"),
    ("generate . --prompts nowhere", "Invalid value for '--prompts': file 'nowhere' does not exist"),
    ("generate . --prompt x --stop=", "--stop is empty: give the text to stop at"),
    ("generate . --prompt x --top-k -1", "Invalid value for '--top-k'"),
    ("generate . --prompt x --nproc 0", "Invalid value for '--nproc'"),
    ("generate . --prompt", "Option '--prompt' requires an argument"),
    ("generate . --prompt x --temperature -1", "Invalid value for '--temperature': Input should be greater than"),
    ("generate . --prompt x --temperature nan", "Invalid value for '--temperature'"),
    ("generate . --prompt x --temperature inf", "Invalid value for '--temperature'"),
    ("generate . --prompt x --temperature hot", "Invalid value for '--temperature': Input should be a valid number"),
    ("generate . --prompt x --top-p 1.5", "Invalid value for '--top-p': Input should be less than or equal to 1"),
    ("generate . --prompt x --top-p nan", "Invalid value for '--top-p'"),
    ("generate . --prompt x --max-new-tokens 0", "Invalid value for '--max-new-tokens'"),
    ("generate . --prompt x --max-new-tokens 1.5", "Invalid value for '--max-new-tokens'"),
    ("generate . --prompt x --seed -1", "Invalid value for '--seed'"),
    ("generate . --prompt x --seed 9223372036854775808", "Invalid value for '--seed'"),
    ("evaluate .", "nothing to evaluate: give --data DIR, --choices FILE or --task NAME"),
    ("evaluate . --choices nowhere", "Invalid value for '--choices': file 'nowhere' does not exist"),
    ("evaluate . --data . --limit 5", "--task-folder and --limit are about benchmarks: give --task NAME, too"),
    ("evaluate . --data nowhere", "Invalid value for '--data': dir 'nowhere' does not exist"),
    ("evaluate . --data . config.yaml", "dir 'config.yaml' is a file"),
]


@pytest.mark.parametrize(("line", "message"), COMMAND_LINES)
def test_a_wrong_command_line_is_named_with_the_help_to_see(
    line: str, message: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in mistake(capsys, *line.split())


def test_line_ends_and_odd_characters_in_names_keep_the_message_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no where.yaml" in mistake(capsys, "train", "no\nwhere.yaml")
    mistake(capsys, "train", "no\u2028where\x85.yaml")
    mistake(capsys, "no\nsuch command")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "config.yaml", "parallel.tensor=2", "--nproc", "1"],
        ["train", "config.yaml", "model.num_layer=3"],
        ["config", "shwo"],
        ["train", "nowhere.yaml"],
        ["train", "\udcff.yaml"],
    ],
)
def test_the_installed_command_ends_in_one_line_and_2(arguments: list[str], config: str) -> None:
    script = Path(sys.executable).with_name("megalm")
    done = subprocess.run([script, *arguments], capture_output=True, text=True, timeout=60, errors="surrogateescape")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("megalm: error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["train", ""], ["data", "prepare", "--input", "", "--tokenizer", "byte"]])
def test_an_empty_argument_is_refused_and_never_the_current_directory(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is empty: is a variable of the shell not set?" in mistake(capsys, *arguments)
