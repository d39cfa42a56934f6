"""Columns that the vocabularies do not know are named."""

import numpy as np
import pytest

from gmeta.data.coverage import FEW_VALUES, unknown_columns, unknown_fraction, unknown_warning


def test_columns_are_named_from_a_fraction_on():
    ids = {
        "all": np.zeros(100, np.int32),
        "nearly": np.r_[np.zeros(95, np.int32), np.ones(5, np.int32)],
        "most": np.r_[np.zeros(94, np.int32), np.ones(6, np.int32)],
        "none": np.ones(100, np.int32),
        "empty": np.zeros(0, np.int32),
        "few": np.zeros(FEW_VALUES - 1, np.int32),
        "user": np.zeros(100, np.int32),  # new tasks are normal
    }
    assert unknown_columns(ids, "user") == {"all": 1.0, "nearly": 0.95}
    assert unknown_fraction(ids["most"]) == pytest.approx(0.94)


def test_the_warning_names_columns_and_place():
    assert unknown_warning({}, "query.csv") is None
    warning = unknown_warning({"premium": 1.0, "item": 0.96}, "query.csv")
    assert warning.startswith(
        "warning: the run does not know the values of query.csv in column 'premium' (100%), 'item'"
    )
