"""Types and shapes are really checked while tests run, where the suite says so."""

import jaxtyping
import pytest

from tvlens.tasks import Pair
from tvlens.tasks.regression.functions import function_class


def test_a_wrong_argument_of_a_function_shows():
    with pytest.raises(jaxtyping.TypeCheckError):
        function_class("tree", 3, depth="x")


def test_a_wrong_field_of_a_dataclass_shows():
    with pytest.raises(jaxtyping.TypeCheckError):
        Pair(1, "b")


@pytest.mark.parametrize("case", range(6))
def test_the_first_four_cases_are_checked(case):
    assert jaxtyping.config.jaxtyping_disable == (case >= 4)
