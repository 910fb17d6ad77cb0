"""What a micro-batch says of its tokens, against the same found token by token."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalm.data.loader import assemble

EOD = 0


def slow_assemble(rows: list[list[int]], document_attention: bool) -> dict[str, list]:
    """The same, token by token."""
    result: dict[str, list] = {name: [] for name in ("tokens", "labels", "loss_mask", "positions", "segments")}
    for row in rows:
        position, new_segment = 0, True
        for token, label in pairwise(row):
            if new_segment:
                result["segments"].append(len(result["tokens"]))
                position, new_segment = 0, False
            ends_document = document_attention and token == EOD
            result["tokens"].append(token)
            result["labels"].append(label)
            result["loss_mask"].append(not ends_document)
            result["positions"].append(position)
            position += 1
            new_segment = ends_document
    result["segments"].append(len(result["tokens"]))
    return result


@given(
    rows=st.integers(1, 12).flatmap(
        lambda length: st.lists(
            st.lists(st.integers(0, 3), min_size=length + 1, max_size=length + 1), min_size=1, max_size=6
        )
    ),
    document_attention=st.booleans(),
)
def test_documents_positions_and_masks_equal_those_found_token_by_token(
    rows: list[list[int]], document_attention: bool
) -> None:
    batch = assemble(np.array(rows, np.int64), np.zeros(len(rows), np.int64), EOD, document_attention)
    slow = slow_assemble(rows, document_attention)
    assert batch.tokens_T.tolist() == slow["tokens"]
    assert batch.labels_T.tolist() == slow["labels"]
    assert batch.loss_mask_T.tolist() == slow["loss_mask"]
    assert batch.positions_T.tolist() == slow["positions"]
    assert batch.segments.tolist() == slow["segments"]
    assert batch.sequence_length == len(rows[0]) - 1
    types = [batch.tokens_T.dtype, batch.labels_T.dtype, batch.positions_T.dtype, batch.segments.dtype]
    assert types == [np.int64, np.int64, np.int64, np.int32]


def test_the_example_in_the_loaders_header_is_true() -> None:
    a, b, c, d, e, f, g, h = range(1, 9)
    rows = np.array([[a, b, EOD, c, d, e], [e, EOD, EOD, f, g, h]])
    batch = assemble(rows, np.zeros(2, np.int64), EOD, document_attention=True)
    assert batch.loss_mask_T.astype(int).tolist() == [1, 1, 0, 1, 1, 1, 0, 0, 1, 1]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 1, 0, 1, 0, 0, 1]
    assert batch.segments.tolist() == [0, 3, 5, 7, 8, 10]


def test_tokens_may_lie_unaligned_and_sequences_be_longer_than_any_register() -> None:
    rows = np.random.default_rng(0).integers(0, 40, (3, 1001))
    unaligned = np.frombuffer(b"x" + rows.tobytes(), np.int64, offset=1).reshape(rows.shape)
    assert not unaligned.flags.aligned
    batch = assemble(unaligned, np.zeros(3, np.int64), EOD, document_attention=True)
    slow = slow_assemble(rows.tolist(), document_attention=True)
    assert batch.labels_T.tolist() == slow["labels"]
    assert batch.positions_T.tolist() == slow["positions"]
    assert batch.segments.tolist() == slow["segments"]


@pytest.mark.parametrize("tokens", [np.zeros(5, np.int64), np.zeros((2, 1), np.int64), np.zeros((1, 1, 3), np.int64)])
def test_tokens_are_rows_of_two_or_more(tokens: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"tokens_BS1 has B rows of S \+ 1 tokens"):
        assemble(tokens, np.zeros(1, np.int64), EOD, document_attention=True)
    with pytest.raises(TypeError):
        assemble(np.zeros((1, 3), np.int32), np.zeros(1, np.int64), EOD, document_attention=True)
