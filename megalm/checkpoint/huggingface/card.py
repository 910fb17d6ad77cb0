"""The model card, README.md: what the run that made a model was, from its checkpoint and its metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [base-model, megalm]
---

# {title}

A base language model: it continues text, and was trained to do nothing else. Fine-tune it before it is to follow
instructions.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
tokens = model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=40)
print(tokenizer.decode(tokens[0]))
```

{sections}"""


def model_card(
    title: str, model: Mapping[str, Any], facts: Mapping[str, Any], state: Mapping[str, Any], lines: Sequence[Mapping]
) -> str:
    """`model` is the model section, `facts` what is to be said first, `state` a checkpoint's, `lines` the run's metrics
    up to it."""
    sections = [_table("Model", {**facts, **{key: value for key, value in model.items() if value is not None}})]
    if "source" in state:
        sections.append(_table("Origin", {"imported from": state["source"]}))
    if "config" in state:
        config, position = state["config"], state["position"]
        others = set() if config["optimizer"]["kind"] == "muon" else {"momentum", "nesterov"}
        optimizer = {f"optimizer.{key}": value for key, value in config["optimizer"].items() if key not in others}
        schedule = {f"schedule.{key}": value for key, value in config["schedule"].items() if value is not None}
        training = {
            "steps": position["step"],
            "tokens": position["tokens"],
            "sequences": position["consumed_samples"],
            "sequence length": config["data"]["sequence_length"],
            "batch, in sequences": config["batch"]["global_size"],
            "precision": config["precision"]["compute"],
            "seed": str(config["run"]["seed"]),
            **_last(lines),
            **optimizer,
            **schedule,
        }
        data = {f"tokens of `{name}`": count for name, count in position["tokens_by_source"].items()}
        data |= {"order": config["data"]["order"], "hash of all samples, in order": position["data_hash"]}
        data |= {f"fingerprint of `{name}`": f"`{fingerprint}`" for name, fingerprint in state["sources"].items()}
        sections += [_table("Training", training), _table("Data", data)]
    return CARD.format(title=title, sections="\n".join(sections))


def _last(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The last losses."""
    training = [line for line in lines if "kind" not in line]
    evaluations = [line for line in lines if line.get("kind") == "evaluation"]
    found: dict[str, Any] = {}
    if training:
        found[f"training loss, step {training[-1]['step']}"] = training[-1]["loss"]
    for line in evaluations[-1:]:
        for name, score in {"all sources": line, **line["sources"]}.items():
            where = f"{name}, step {line['step']}"
            found[f"validation loss, {where}"] = score["loss"]
            found[f"bits per byte, {where}"] = score["bits_per_byte"]
    return found


def _table(title: str, rows: Mapping[str, Any]) -> str:
    body = "\n".join(f"| {key} | {_shown(value)} |" for key, value in rows.items())
    return f"## {title}\n\n| | |\n|---|---|\n{body}\n"


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("|", "\\|")
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
