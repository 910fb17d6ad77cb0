from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megalm.parallel.part import Part
from megalm.parallel.zero.deepspeed import boxes


@given(st.data())
def test_boxes_of_all_ranks_are_the_part_once_and_without_padding(data: st.DataObject) -> None:
    dims = data.draw(st.integers(1, 2))
    size, before, after = (
        tuple(data.draw(st.lists(st.integers(lo, 7), min_size=dims, max_size=dims))) for lo in (1, 0, 0)
    )
    shape = tuple(a + n + b for a, n, b in zip(before, size, after, strict=True))
    padded = (size[0] + data.draw(st.integers(0, 3)), *size[1:])
    local = torch.rand(padded)
    cuts = sorted({0, local.numel(), *data.draw(st.lists(st.integers(0, local.numel()), max_size=4))})
    whole, held = torch.zeros(shape), torch.zeros(shape)
    for start, end in zip(cuts, [*cuts[1:], local.numel() + 3], strict=True):  # the last stretch may be too long
        flat = torch.cat([local.view(-1), torch.ones(3)])[start:end]
        found = list(boxes(Part(shape, before, size), start, flat))
        assert len(found) <= 3
        for offset, box in found:
            place = tuple(slice(a, a + n) for a, n in zip(offset, box.shape, strict=True))
            whole[place] += box
            held[place] += 1
            assert box.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    part = tuple(slice(a, a + n) for a, n in zip(before, size, strict=True))
    assert torch.equal(whole[part], local[: size[0]])
    assert held[part].eq(1).all()
    assert held.sum() == held[part].sum()
