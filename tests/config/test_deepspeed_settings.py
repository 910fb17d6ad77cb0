from __future__ import annotations

from typing import Any

import pytest

from megalm.config.deepspeed import engine_settings
from megalm.config.load import resolve
from megalm.errors import UserError


def config(zero: dict[str, Any], processes: int = 2, **sections: Any) -> dict[str, Any]:
    pipeline = sections.pop("pipeline", {})
    raw = {
        "run": {"dir": "unused"},
        "model": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "ffn_size": 64},
        "tokenizer": {"path": "byte"},
        "data": {"sequence_length": 64, "sources": [{"name": "a", "path": "unused"}]},
        "batch": {"global_size": 8, "micro_size": 2},
        "schedule": {"steps": 10},
        "parallel": {"zero": {"engine": "deepspeed", **zero}, "pipeline": pipeline},
    }
    return {name: {**raw.get(name, {}), **sections.get(name, {})} for name in raw.keys() | sections.keys()}


def test_settings_follow_from_the_config_and_keep_what_the_user_adds() -> None:
    theirs = {
        "gradient_clipping": 0.0,
        "zero_optimization": {"reduce_bucket_size": 1000, "offload_optimizer": {"pin_memory": True}},
    }
    raw = config({"stage": 3, "offload": "cpu"}, precision={"compute": "bfloat16"}, deepspeed=theirs)
    settings = engine_settings(resolve(raw, 2))
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_clipping"] == 0.0, "whose default is 1"
    assert settings["bf16"] == {"enabled": True}
    assert settings["communication_data_type"] == settings["data_types"]["grad_accum_dtype"] == "fp32"
    assert settings["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 1000,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu"},
    }


BROKEN = {
    "parallel.pipeline.size=2 cannot be run": config({}, pipeline={"size": 2}),
    "parallel.zero.stage=0 cannot be run": config({"stage": 0}),
    "parallel.zero.shard=1 of 2 data ranks cannot be run": config({"shard": 1}),
    "optimizer.kind='muon' cannot be run": config({}, optimizer={"kind": "muon"}),
    "deepspeed.zero_optimization.offload_param has no meaning": config(
        {"stage": 3}, deepspeed={"zero_optimization": {"offload_param": {"device": "nvme"}}}
    ),
    "deepspeed has no meaning with": config({"engine": "fsdp"}, deepspeed={"steps_per_print": 10}),
    "run.compile=true has not been tried": config({"stage": 3}, run={"compile": True}),
    "run.recompute=selective cannot be run": config({"stage": 3}, run={"recompute": "selective"}),
    "deepspeed.optimizer is for the run's own config": config({}, deepspeed={"optimizer": {"type": "Adam"}}),
    "would pass over it. Did you mean 'zero_optimization'?": config({}, deepspeed={"zero_optimisation": {"stage": 2}}),
    "deepspeed.gradient_clipping=1.0 contradicts": config({}, deepspeed={"gradient_clipping": 1.0}),
    "deepspeed.zero_optimization.stage=3 contradicts the rest of the config, which means 2": config(
        {"stage": 2}, deepspeed={"zero_optimization": {"stage": 3}}
    ),
    "deepspeed.zero_optimization=2 contradicts": config({}, deepspeed={"zero_optimization": 2}),
    "deepspeed.bf16.enabled=True contradicts": config({}, deepspeed={"bf16": {"enabled": True}}),
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_deepspeed_cannot_run_is_refused_before_a_start(message: str) -> None:
    with pytest.raises(UserError, match=r"^.+$") as refused:
        resolve(BROKEN[message], 2)
    assert message in str(refused.value)
