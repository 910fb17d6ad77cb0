"""Which tokens is sample i? Computed, or with `megatron` looked up, from the config and the sources alone.

    i       --Mixture (blend)-->   source, rank in the source
    rank    --Places (mode)-->     pieces of the source's text, S + 1 tokens in all

    mode         a sample is                                start-up, memory
    stateless    a stretch of the text, from anywhere       nothing
    window       whole documents, packed                    nothing; a few windows at a time
    megatron     what Megatron-LM makes of the same text    its indices, built and held

Never from rank, worker or batch: so a run's place in its data is one integer.
"""

from __future__ import annotations

from megalm.data.order.blend import MAX_PERIOD, Blend, Mixture, Stage, StagedBlend
from megalm.data.order.build import Order, OrderOptions, build_order
from megalm.data.order.permutation import ROUNDS, Permutation, derive_key
from megalm.data.order.pieces import PADDING, Pieces, Places
