from __future__ import annotations

from pathlib import Path

import pytest
from runs import read_metrics

from megalm.train.metrics import Metrics


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (b"", [0, 1, 2]),
        (b'{"step":3,"lo', [0, 1, 2]),
        (b'{"step":3}', [0, 1, 2]),
        (b'\0\0\0\0\n{"step":3}\n', [0, 1, 2, 3]),
        (b'{"step":3}\n{"step":4}\n', [0, 1, 2, 3]),
        (b'[3]\n{"step":3}\n', [0, 1, 2, 3]),
        (b'{"step":"x"}\n{"step":3}\n', [0, 1, 2, 3]),
    ],
)
def test_a_run_that_goes_on_keeps_the_whole_lines_up_to_its_checkpoint(
    tmp_path: Path, damage: bytes, kept: list[int]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":0}\n{"step":1}\n{"step":2}\n' + damage)
    metrics = Metrics(path, None, last_step=3)
    metrics.write({"step": 4})
    metrics.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [*kept, 4]
