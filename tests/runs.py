"""Small training runs on two prepared sources, in this process or in one that can be killed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

CONFIG = """
run: {{dir: {run}, device: cpu}}
model: {{num_layers: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, ffn_size: 64}}
tokenizer: {{path: byte}}
data:
  sequence_length: 64
  sources: [{{name: a, path: {data}/a, weight: 0.7}}, {{name: b, path: {data}/b, weight: 0.3}}]
  validation: {{samples: 4}}
batch: {{global_size: 8, micro_size: 4}}
schedule: {{kind: wsd, steps: 60, warmup_steps: 5, decay_steps: 10}}
optimizer: {{learning_rate: 3.0e-3}}
checkpoint: {{every: 5, keep: 2}}
evaluate: {{every: 30}}
log: {{tensorboard: false}}
"""


def write_config(data: Path, run: Path) -> str:
    """Writes a config for a run in the directory `run` on the sources in `data`; returns the config's path."""
    path = run.with_suffix(".yaml")
    path.write_text(CONFIG.format(run=run, data=data))
    return str(path)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float, float]]:
    """Step, loss and gradient norm (0 for evaluations) of every line."""
    return [(line["step"], line["loss"], line.get("grad_norm", 0.0)) for line in read_metrics(run)]


def start(config: str, *overrides: str, stdout: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
    program = "import sys; from megalm.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "train", config, *overrides]
    return subprocess.Popen(command, stdout=stdout)


def over(process: psutil.Process) -> bool:
    """Whether a process has ended. Where nobody takes leave of orphans, they stay as zombies."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (run / "metrics.jsonl").exists() and f'"step":{step},' in (run / "metrics.jsonl").read_text():
            return
        time.sleep(0.01)
    pytest.fail(f"step {step} was not reached")
