from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import megalm
from megalm.cli import main
from megalm.config import Config, load_config
from megalm.config.presets import PRESETS
from megalm.errors import UserError
from megalm.launch.ranks import Process

CONFIG = """
run: {dir: runs/tiny}
model: {preset: llama-tiny}
tokenizer: {path: byte}
data: {sequence_length: 256, sources: [{name: text, path: data/text}]}
batch: {global_size: 32}
schedule: {steps: 200}
"""
HEAVY = ["torch", "numpy", "pydantic", "yaml", "rich", "transformers", "tokenizers", "sentencepiece"]


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.yaml").write_text(CONFIG)
    return str(tmp_path / "config.yaml")


def replace(monkeypatch: pytest.MonkeyPatch, module: str, **functions: Any) -> None:
    """Puts a module of `functions` in place of `module`."""
    stub = ModuleType(module)
    vars(stub).update(functions)
    monkeypatch.setitem(sys.modules, module, stub)


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    alone = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == alone
    for command in ["train", "evaluate", "generate", "config", "data", "tokenizer"]:
        assert f"\n  {command}" in alone


def test_a_group_without_a_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for command in ["show", "schema", "presets"]:
        assert f"\n  {command}" in captured.out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megalm {megalm.__version__}\n"


@pytest.mark.parametrize("code", ["import megalm", "from megalm.cli import main; main(['--help'])"])
def test_help_loads_nothing_heavy(code: str) -> None:
    program = f"import sys\n{code}\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"


def test_looking_at_configs_and_mistakes_in_them_do_not_load_torch(config: str) -> None:
    for arguments in (["config", "show", config], ["train", config, "model.num_layers=x"]):
        program = f"import sys\nfrom megalm.cli import main\nmain({arguments})\nprint('torch' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "False"


def test_config_show_prints_a_config_that_loads_to_the_same(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", config, "batch.global_size=64", "parallel.tensor=2", "--processes", "8"]) == 0
    shown = tmp_path / "shown.yaml"
    shown.write_text(capsys.readouterr().out)
    assert load_config(shown, world_size=8) == load_config(config, ["batch.global_size=64", "parallel.tensor=2"], 8)
    assert load_config(shown, world_size=8).parallel.data == 4


def test_config_show_takes_as_few_processes_as_the_layout_needs(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", config, "parallel.tensor=2"]) == 0
    assert "  data: 1\n" in capsys.readouterr().out


def test_config_schema_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert list(json.loads(capsys.readouterr().out)["properties"]) == list(Config.model_fields)


def test_config_presets_lists_every_preset_with_its_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "presets"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split("  ")[0] == "preset"
    assert [line.split()[0] for line in lines] == list(PRESETS)
    table = {line.split()[0]: line.split()[1:] for line in lines}
    assert table["llama3-8b"] == ["8.03B", "32", "4096", "32", "8", "14336", "128256"]
    assert table["megatron-1t"][0] == "1.01T"
    assert table["qwen3-0.6b"][0] == "596M"
    assert table["llama-tiny"][:3] == ["3.15M", "+", "vocabulary"]
    assert len({len(line) for line in [title, *lines]}) == 1, "columns are aligned"


def test_train_hands_the_resolved_config_to_the_trainer(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    run = lambda load, process, stop, dry_run: calls.append((load(), dry_run))  # noqa: E731
    replace(monkeypatch, "megalm.train.trainer", run=run)
    assert main(["train", config, "run.seed=5", "--dry-run", "log.every=2"]) == 0
    assert main(["train", config]) == 0
    assert calls == [(load_config(config, ["run.seed=5", "log.every=2"]), True), (load_config(config), False)]


def test_generate_hands_its_options_on_and_prints_what_a_terminal_can_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megalm.parallel.mesh import Mesh
    from megalm.train.generate import Piece, Sampling

    calls: list[Any] = []

    @contextmanager
    def opened(path: Path, process: Process, overrides: list[str], prepare: object) -> Iterator[tuple[Any, Any]]:
        calls.append((path, process.size, overrides))
        yield SimpleNamespace(passes=SimpleNamespace(mesh=Mesh())), [("def f", [1])]

    def pieces(trained: object, prompts: list[list[int]], sampling: Sampling) -> list[Piece]:
        calls.append((prompts, sampling))
        return [Piece(0, " on\n", None), Piece(0, "\x1b[2J\ud800\u3000é", "end")]

    monkeypatch.setattr("megalm.train.trained.opened_model", opened)
    monkeypatch.setattr("megalm.train.generate.continuations", pieces)
    draws = ["--max-new-tokens", "5", "--temperature", "0", "--top-p", "0.5", "--top-k", "3", "--seed", "7"]
    stops = ["--stop", "\n\n", "--stop", "x", "--set", "run.device=cpu"]
    assert main(["generate", str(tmp_path), "--prompt", "def f", *draws, *stops]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("def f on\n")
    assert printed.endswith("\u3000é\n")
    assert "\x1b" not in printed
    assert main(["generate", str(tmp_path), "--prompt", ""]) == 0
    assert calls == [
        (tmp_path, 1, ["run.device=cpu"]), ([[1]], Sampling(5, 0.0, 0.5, 3, 7, ("\n\n", "x"))),
        (tmp_path, 1, ()), ([[1]], Sampling(128, 1.0, 1.0, 0, 0, ())),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("model.x=1 is\nwrong"), 2, "megalm: error: model.x=1 is wrong\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            2,
            "megalm: error: runs/x: No space left on device\n",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "megalm: error: No space left on device\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "megalm: error: x: Permission denied\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_happens_in_a_command_becomes_an_exit_code(
    error: BaseException,
    code: int,
    line: str,
    config: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    stub = ModuleType("megalm.train.trainer")
    stub.run = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megalm.train.trainer", stub)
    assert main(["train", config]) == code
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = ModuleType("megalm.train.trainer")
    stub.run = lambda *_, **__: 1 / 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "megalm.train.trainer", stub)
    with pytest.raises(ZeroDivisionError):
        main(["train", config])


@pytest.mark.parametrize("command", ["schema", "presets"])
def test_a_reader_that_has_enough_ends_the_command_quietly(command: str) -> None:
    script = Path(sys.executable).with_name("megalm")
    process = subprocess.Popen([script, "config", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=60) == 1
