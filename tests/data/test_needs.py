from __future__ import annotations

import numpy as np
import pytest

from megalm.data.needs import refuse_unmet, table, token_needs
from megalm.data.order import Blend, Stage, StagedBlend
from megalm.errors import UserError


def test_needs_count_what_the_run_draws_against_what_an_epoch_holds() -> None:
    mixture = StagedBlend([Stage("a", {0: 3.0, 1: 1.0}, 400), Stage("b", {1: 1.0}, None)], ["code", "docs"])
    needs = token_needs(mixture, np.array([100, 1000]), 500, 16, ["code", "docs"], [3.0, None])
    assert [(need.wanted, need.there, need.epochs, need.fits) for need in needs] == [
        (300 * 16, 100 * 16, 3.0, True),
        (200 * 16, 1000 * 16, 0.2, True),
    ]
    refuse_unmet(needs)
    assert table(needs) == [
        "source  weight  tokens wanted  tokens there     epochs",
        "code    60.00%          4,800         1,600  3.00 of 3",
        "docs    40.00%          3,200        16,000       0.20",
    ]


def test_a_cap_that_is_passed_is_refused_with_the_source_its_need_and_mends_that_work() -> None:
    def needs(weight: float, cap: float | None) -> list:
        caps = [cap, None]
        return token_needs(Blend([weight, 1 - weight]), np.array([100, 1000]), 500, 10, ["code", "docs"], caps)

    with pytest.raises(UserError) as error:
        refuse_unmet(needs(0.7, 2.0))
    assert str(error.value) == (
        "data.sources: the run wants 3,500 tokens of 'code', 3.50 epochs of the 1,000 that are there, and max_epochs=2"
        ": prepare 750 tokens more, lower its share from 0.7 to 0.4, raise max_epochs to 3.5, or shorten the run"
    )
    refuse_unmet(needs(0.4, 2.0))
    refuse_unmet(needs(0.7, 3.5))
    refuse_unmet(needs(0.7, None))
