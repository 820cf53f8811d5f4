"""ExactSum against arithmetic with fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.strategies.exact import BLOCK, ExactSum, from_smallest_units, smallest_units
from fedbus.types import Array

Term = tuple[list[float], float]
"""What one `add` takes: values and their weight."""

LARGEST = float(np.finfo(np.float64).max)

finite = st.floats(allow_nan=False, allow_infinity=False)
ordinary = st.floats(-10, 10)
weights = st.one_of(st.integers(1, 2**40).map(float), st.floats(1e-3, 1e6))
exponents = st.sampled_from([0, -34, -36, -100, -183, -900, -1200])


def terms_of(values: st.SearchStrategy[float], elements: int = 3) -> st.SearchStrategy[list[Term]]:
    return st.lists(st.tuples(st.lists(values, min_size=elements, max_size=elements), weights), max_size=12)


def total_of(terms: list[Term], exponent: int, *, is_fine: bool, dtype: Any = np.float64, size: int = 3) -> Array:
    added = ExactSum(size, exponent, is_fine=is_fine)
    for values, weight in terms:
        added.begin()
        added.add(0, np.array(values, dtype), weight)
    return np.concatenate([total for _, total in added.totals()])


def exact_total(products: list[float], unit: Fraction) -> Fraction:
    """The sum of the products, each rounded to a multiple of `unit`, ties to even."""
    return sum((round(Fraction(product) / unit) for product in products), 0) * unit


def is_near(total: float, exact: Fraction) -> bool:
    """Whether `total` is within two units in the last place, inf counting as the next float64 after the largest."""
    end = Fraction(2) ** 1024
    whole = Fraction(total) if math.isfinite(total) else end if total > 0 else -end
    return abs(whole - max(-end, min(exact, end))) <= abs(exact) * Fraction(2) ** -51


@given(terms_of(st.one_of(finite, ordinary)), exponents, st.booleans())
def test_the_sum_is_that_of_the_rounded_products(terms: list[Term], exponent: int, is_fine: bool) -> None:
    unit = Fraction(2) ** (max(exponent, -900) - (50 if is_fine else 0))
    for element, total in enumerate(total_of(terms, exponent, is_fine=is_fine).tolist()):
        products = [values[element] * weight for values, weight in terms]
        if all(math.isfinite(product) for product in products):
            assert is_near(total, exact_total(products, unit))
        else:
            assert math.isnan(total)


@given(terms_of(ordinary), st.sampled_from([-34, -36, -44]), st.booleans())
def test_an_ordinary_sum_is_rounded_once(terms: list[Term], exponent: int, is_fine: bool) -> None:
    unit = Fraction(2) ** (exponent - (50 if is_fine else 0))
    totals = total_of(terms, exponent, is_fine=is_fine).tolist()
    if not is_fine:  # two levels at most
        assert totals == [float(exact_total([values[e] * weight for values, weight in terms], unit)) for e in range(3)]
    for element, total in enumerate(totals):
        products = [Fraction(values[element]) * Fraction(weight) for values, weight in terms]
        bound = len(terms) * unit / 2 + sum(map(abs, products)) * Fraction(2) ** -50
        assert abs(Fraction(total) - sum(products)) <= bound


@given(terms_of(st.one_of(finite, ordinary)), exponents, st.booleans(), st.randoms(use_true_random=False))
def test_any_order_gives_the_same_bits(terms: list[Term], exponent: int, is_fine: bool, random: Any) -> None:
    first = total_of(terms, exponent, is_fine=is_fine)
    random.shuffle(terms)
    assert total_of(terms, exponent, is_fine=is_fine).tobytes() == first.tobytes()


@given(terms_of(st.floats(width=32, allow_nan=False, allow_infinity=False)), exponents)
def test_float32_is_summed_as_its_float64_is(terms: list[Term], exponent: int) -> None:
    narrow = total_of(terms, exponent, is_fine=False, dtype=np.float32)
    assert narrow.tobytes() == total_of(terms, exponent, is_fine=False).tobytes()


@given(terms_of(st.one_of(finite, ordinary, st.just(math.inf))), exponents, st.booleans())
def test_a_few_large_terms_are_taken_as_many_are(terms: list[Term], exponent: int, is_fine: bool) -> None:
    among = [([0.0] * 30 + values, weight) for values, weight in terms]
    total = total_of(among, exponent, is_fine=is_fine, size=33)
    assert total[30:].tobytes() == total_of(terms, exponent, is_fine=is_fine).tobytes()
    assert not total[:30].any()


@pytest.mark.parametrize("is_fine", [False, True])
def test_a_large_term_in_the_middle_is_no_other_than_one_at_the_start(is_fine: bool) -> None:
    small: list[Term] = [([0.1 * k, -0.3, 1e-9], 7.0) for k in range(20)]
    large: list[Term] = [([1e30, 2e5, 5e-324], 3.0), ([-1e30, LARGEST / 4, 1e5], 3.0)]
    sums = [
        total_of(order, -34, is_fine=is_fine)
        for order in (small + large, large + small, [large[0], *small, large[1]], small[:9] + large + small[9:])
    ]
    assert len({total.tobytes() for total in sums}) == 1
    assert sums[0][0] == pytest.approx(7 * 0.1 * 190, rel=1e-8)  # the large ones cancel and leave the small ones whole


@pytest.mark.parametrize("is_fine", [False, True])
@pytest.mark.parametrize("value", [2.0**51 - 1, 2.0**51 - 0.25, -(2.0**51) + 0.5, 2.0**51, -(2.0**51), 2.0**51 + 1])
def test_terms_at_the_edge_of_the_first_level_are_exact(value: float, is_fine: bool) -> None:
    expected = value if is_fine else float(round(value))
    assert total_of([([value] * 3, 1.0)], 0, is_fine=is_fine).tolist() == [expected] * 3


@pytest.mark.parametrize("is_fine", [False, True])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_thousands_of_the_largest_terms_do_not_wrap(level: int, is_fine: bool) -> None:
    large, count = (2.0**51 - 1) * 2.0 ** (50 * level), 6500  # 6500 * 2**51 > 2**63
    added = ExactSum(3, 0, is_fine=is_fine)
    for number in range(count):
        added.begin()
        added.add(0, np.array([large, -large, large if number % 2 else -large + 1]), 1.0)
    (_, total), *_ = added.totals()
    odd = count // 2 * (Fraction(-large + 1) + Fraction(large))
    assert total.tolist() == [float(count * Fraction(large)), -float(count * Fraction(large)), float(odd)]


def test_a_sum_that_was_not_yet_worth_a_carry_does_not_wrap_later() -> None:
    quarter: list[Term] = [([2.0**49 - 1] * 3, 1.0)] * 4096
    whole: list[Term] = [([2.0**51 - 1] * 3, 1.0)] * 4096
    expected = float(4096 * (2**49 - 1 + 2**51 - 1))
    assert total_of(quarter + whole, 0, is_fine=False).tolist() == [expected] * 3


def test_a_carry_does_not_show() -> None:
    """Round 2049 finds the large terms and carries them, or finds only small ones: the bits are the same."""
    rng = np.random.default_rng(0)
    small, large = rng.uniform(2.0**48, 2.0**49, 1000), rng.uniform(2.0**50, 2.0**51, 1000)
    orders: list[list[Term]] = [[(large.tolist(), 1.0)] * 1900, [(small.tolist(), 1.0)] * 2100]
    first = total_of(orders[0] + orders[1], 0, is_fine=False, size=1000)
    assert total_of(orders[1] + orders[0], 0, is_fine=False, size=1000).tobytes() == first.tobytes()


def test_a_product_that_overflows_spoils_its_element_alone() -> None:
    terms: list[Term] = [([LARGEST, LARGEST, 1.0], 1.0), ([LARGEST, 1.0, 1.0], 2.0), ([LARGEST, LARGEST, 1.0], 1.0)]
    spoiled, infinite, fine = total_of(terms, -34, is_fine=True).tolist()
    assert math.isnan(spoiled)
    assert (infinite, fine) == (math.inf, 4.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_value_that_is_not_finite_spoils_its_element_alone(value: float, dtype: Any) -> None:
    terms: list[Term] = [([value, 1.0, 2.0], 2.0), ([1.0, 1.0, 2.0], 1.0)]
    np.testing.assert_array_equal(total_of(terms, -34, is_fine=False, dtype=dtype), [math.nan, 3, 6])


def test_the_largest_float64_is_its_own_sum() -> None:
    for exponent in range(-100, 0):  # rounding it up to a coarse level must not overflow
        terms: list[Term] = [([LARGEST, -LARGEST, LARGEST / 2], 1.0)]
        assert total_of(terms, exponent, is_fine=True).tolist() == [LARGEST, -LARGEST, LARGEST / 2]


def test_blocks_are_where_they_belong() -> None:
    size = 2 * BLOCK + 5
    values = np.arange(size, dtype=np.float32)
    values[BLOCK + 3] = 1e20
    added = ExactSum(size, -34, is_fine=False)
    for cut in (0, 1, BLOCK, BLOCK + 4, size):
        added.begin()
        added.add(0, values[:cut], 2.0)
        added.add(cut, values[cut:], 2.0)
    total = np.concatenate([part for _, part in added.totals()])
    np.testing.assert_array_equal(total, values.astype(np.float64) * 10)


@given(st.lists(finite))
def test_sums_of_smallest_units_are_those_of_fsum(values: list[float]) -> None:
    exact = sum(map(Fraction, values), Fraction())
    units = sum(map(smallest_units, values))
    assert Fraction(units, 2**1074) == exact
    if abs(exact) <= LARGEST:
        assert from_smallest_units(units) == float(exact)
