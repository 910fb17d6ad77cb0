"""Draws a run's training and validation loss over tokens, from its metrics.jsonl, as a picture."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("output", type=Path, help="picture to write: .png or .svg")
    options = parser.parse_args()
    lines = [json.loads(line) for line in (options.run / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    steps = [line for line in lines if "kind" not in line]
    axes.plot([line["tokens"] for line in steps], [line["loss"] for line in steps], color="0.7", label="training")
    evaluations = [line for line in lines if line.get("kind") == "evaluation"]
    tokens = [line["tokens"] for line in evaluations]
    axes.plot(tokens, [line["loss"] for line in evaluations], "k.-", label="validation")
    for name in evaluations[-1]["sources"] if evaluations else ():
        losses = [line["sources"][name]["loss"] for line in evaluations]
        axes.plot(tokens, losses, linewidth=1, label=f"validation, {name}")
    axes.set(xlabel="tokens", ylabel="loss, nats a token", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(options.output, dpi=120)


if __name__ == "__main__":
    main()
