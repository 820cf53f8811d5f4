"""Queries without a bus: figures of the pooled records, however they are spread over the clients."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbus.analytics import question as q
from fedbus.analytics.figures import keys_of, number_of
from fedbus.analytics.inquiry import Inquiry
from fedbus.analytics.local import Columns, answer
from fedbus.analytics.result import QueryResult
from fedbus.analytics.statistics import (
    Count,
    Describe,
    Extremes,
    Histogram,
    Mean,
    Quantiles,
    Statistic,
    TopValues,
    Variance,
)
from fedbus.errors import ClientCodeError, ConfigError, RunFailed, UpdateRefused
from fedbus.types import Array, Tensors

Data = Sequence[Mapping[str, Any]]


def answers_to(inquiry: Inquiry, data: Data) -> dict[str, dict[str, Array]]:
    question = inquiry.question.tensors()
    return {f"client-{i}": answer(columns, question, {}) for i, columns in enumerate(data)}


def take_all(inquiry: Inquiry, answers: Mapping[str, Tensors]) -> None:
    for client_id, each in answers.items():
        inquiry.check(each)
        inquiry.take(client_id, each)
    inquiry.close()


def result_of(inquiry: Inquiry, data: Data) -> QueryResult:
    while not inquiry.is_done:
        take_all(inquiry, answers_to(inquiry, data))
    if inquiry.failure is not None:
        raise inquiry.failure
    assert inquiry.result is not None
    return inquiry.result


def ask(data: Data, *statistics: Statistic, **settings: Any) -> QueryResult:
    return result_of(Inquiry(statistics, **{"min_clients": 1, "min_count": 1, **settings}), data)


def spread(values: Sequence[Any], cuts: Sequence[int], dtype: Any) -> list[dict[str, Array]]:
    """The records cut into as many clients as there are cuts, and one more."""
    ends = [0, *sorted(cut % (len(values) + 1) for cut in cuts), len(values)]
    return [{"x": np.array(values[a:b], dtype)} for a, b in itertools.pairwise(ends)]


cuts = st.lists(st.integers(0, 1000), max_size=4)
floats = st.lists(
    st.one_of(st.floats(allow_infinity=False), st.sampled_from([0.0, -0.0, 5e-324, 1.7e308, -1.7e308, 0.1])),
    min_size=1,
    max_size=60,
)


# ---- against the pooled records --------------------------------------------------------------------------------------


@given(floats, cuts)
@settings(max_examples=50)
def test_moments_are_those_of_the_pooled_records_to_the_last_bit(values: list[float], cuts: list[int]) -> None:
    summary = ask(spread(values, cuts, np.float64), Variance("x"), Extremes("x"))["x"]
    there = [value for value in values if not math.isnan(value)]
    assert (summary.count, summary.missing) == (len(there), len(values) - len(there))
    if not there:
        assert summary.mean is None
        return
    exact = [Fraction(value) for value in there]
    mean = sum(exact, Fraction()) / len(exact)
    variance = sum(((value - mean) ** 2 for value in exact), Fraction()) / len(exact)
    assert summary.mean == float(mean)
    assert (summary.min, summary.max) == (min(there), max(there))
    assert summary.variance == nearest(variance)
    assert summary.std is not None
    assert summary.std < 1e-300 or abs(Fraction(summary.std) ** 2 - variance) <= variance * Fraction(1e-15)


def nearest(value: Fraction) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


@given(floats, cuts, st.lists(st.floats(0, 1), min_size=1, max_size=4))
@settings(max_examples=25)
def test_quantiles_are_exact_to_the_float(values: list[float], cuts: list[int], shares: list[float]) -> None:
    summary = ask(spread(values, cuts, np.float64), Quantiles("x", shares))["x"]
    there = sorted(value for value in values if not math.isnan(value))
    if not there:
        assert summary.quantiles is None
        return
    assert summary.quantiles is not None
    for share, found in summary.quantiles.items():
        counted = next(x for i, x in enumerate(there, 1) if Fraction(i, len(there)) >= Fraction(repr(share)))
        assert found == counted


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=40), cuts)
@settings(max_examples=50)
def test_integers_beyond_2_to_the_53_stay_what_they_are(values: list[int], cuts: list[int]) -> None:
    data = spread(values, cuts, np.int64)
    summary = ask(data, Mean("x"), Extremes("x"), Quantiles("x", [0.5]), TopValues("x", 3))["x"]
    assert summary.sum == sum(values)
    assert summary.mean == float(Fraction(sum(values), len(values)))
    assert (summary.min, summary.max) == (min(values), max(values))
    assert summary.quantiles == {0.5: sorted(values)[(len(values) + 1) // 2 - 1]}
    assert summary.top is not None
    assert summary.top.values == most_common(values, 3)


@given(floats, cuts, st.integers(1, 20))
def test_a_histogram_is_numpys(values: list[float], cuts: list[int], bins: int) -> None:
    there = np.array([value for value in values if not math.isnan(value) and abs(value) < 1e300])
    try:
        counts, edges = np.histogram(there, bins)
    except ValueError:
        return  # numpy has no bins between neighbouring floats
    if not there.size:
        return
    histogram = ask(spread(there.tolist(), cuts, np.float64), Histogram("x", bins))["x"].histogram
    assert histogram is not None
    assert histogram.edges == edges.tolist()
    assert histogram.counts == np.histogram(there, edges)[0].tolist()
    assert (histogram.below, histogram.above) == (0, 0)
    assert sum(counts) == sum(histogram.counts)


def test_edges_that_are_given_leave_records_below_and_above() -> None:
    data = [{"x": np.array([0.0, 1, 2, 3])}, {"x": np.array([1.0, 1.5, 9])}]
    histogram = ask(data, Histogram("x", [1, 2, 3]))["x"].histogram
    assert histogram is not None
    assert (histogram.below, histogram.counts, histogram.above) == (1, [3, 2], 1)


def most_common(values: Sequence[Any], k: int) -> list[tuple[Any, int]]:
    return sorted(Counter(values).items(), key=lambda item: (-item[1], q.word_of(item[0])))[:k]


@given(st.lists(st.text(max_size=6), min_size=1, max_size=60), cuts, st.integers(1, 8))
def test_top_values_are_the_pooled_ones_whatever_they_are_written_in(
    values: list[str], cuts: list[int], k: int
) -> None:
    top = ask(spread(values, cuts, object), TopValues("x", k))["x"].top
    assert top is not None
    assert top.is_exact
    assert top.values == most_common(values, k)


def test_many_values_take_more_than_the_heaviest_buckets() -> None:
    rng = np.random.default_rng(0)
    values = (rng.zipf(1.3, 20_000) % 5000).tolist()
    inquiry = Inquiry([TopValues("x", 30)], min_clients=1, min_count=1)
    asked = set[int]()
    data = spread(values, [5000, 12_000], np.int64)
    while not inquiry.is_done:
        asked.update(b for each in inquiry.question.asks if isinstance(each, q.Values) for b in each.buckets)
        take_all(inquiry, answers_to(inquiry, data))
    assert inquiry.result is not None
    top = inquiry.result["x"].top
    assert top is not None
    assert top.values == most_common(values, 30)
    assert len(asked) < q.BUCKETS // 2  # the light ones are nobody's business


def test_what_finds_no_room_is_said_to_be_missing() -> None:
    asked = q.Values(cell=q.Cell(column="x", kind="text"), buckets=tuple(range(q.BUCKETS)), most=2)
    question = q.Question(asks=(asked,), min_count=1)
    [part] = question.unpack(answer({"x": list("aaabbcc")}, question.tensors(), {}))
    assert (part.words, part.numbers) == ([['"a"', 3], ['"b"', 2]], [2])
    top = ask([{"x": ["long" * 1000] * 3 + ["short"]}, {"x": ["short"] * 2}], TopValues("x"))["x"].top
    assert top is not None
    assert (top.values, top.off_by, top.is_exact) == ([("short", 3)], 3, False)


def test_infinite_values_make_the_mean_infinite_as_in_numpy() -> None:
    data: Data = [
        {"x": np.array([1.0, math.inf]), "y": np.array([math.inf, 1])},
        {"x": np.array([2.0]), "y": [-math.inf]},
    ]
    result = ask(data, Variance("x"), Extremes("x"), Histogram("x", 3), Variance("y"))
    assert (result["x"].mean, result["x"].max, result["x"].min) == (math.inf, math.inf, 1.0)
    assert result["x"].histogram is None
    assert result["x"].notes == ["it has infinite values, and so no bins of one width: give the range"]
    assert result["y"].mean is not None
    assert math.isnan(result["y"].mean)


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40), cuts)
@settings(max_examples=25)
def test_groups_are_the_records_of_one_value(labels: list[str], cuts: list[int]) -> None:
    ages = [len(label) + i * 1.5 for i, label in enumerate(labels)]
    data = [
        {"sex": part["x"], "age": np.array(more["x"])}
        for part, more in zip(spread(labels, cuts, object), spread(ages, cuts, np.float64), strict=True)
    ]
    groups = ask(data, Mean("age"), Histogram("age", 4), by="sex")["age"].groups
    assert groups is not None
    assert list(groups) == [value for value, _ in most_common(labels, 3)]
    for label, summary in groups.items():
        mine = [age for age, other in zip(ages, labels, strict=True) if other == label]
        assert summary.mean == pytest.approx(np.mean(mine))
        assert summary.histogram is not None
        assert summary.histogram.edges == np.histogram_bin_edges(ages, 4).tolist()
        assert summary.histogram.counts == np.histogram(mine, np.histogram_bin_edges(ages, 4))[0].tolist()


def test_ddof_1_is_that_of_a_sample() -> None:
    summary = ask([{"x": [1, 2]}, {"x": [4]}], Variance("x", ddof=1))["x"]
    assert summary.variance == pytest.approx(np.var([1, 2, 4], ddof=1), rel=1e-15)


def test_describe_suits_the_kind_of_each_column() -> None:
    data: Data = [
        {"age": [29.0, None, 77], "sick": np.array([True, False, True]), "sex": ["m", "f", "m"], "none": [None] * 3}
    ]
    result = ask(data, Describe())
    assert list(result) == ["age", "sick", "sex", "none"]
    age, sick, sex, none = result.values()
    assert (age.count, age.missing, age.mean, age.min, age.max) == (2, 1, 53.0, 29.0, 77.0)
    assert age.quantiles == {0.25: 29.0, 0.5: 29.0, 0.75: 77.0}
    assert sick.top is not None
    assert sick.top.values == [(True, 2), (False, 1)]
    assert sex.top is not None
    assert sex.top.values == [("m", 2), ("f", 1)]
    assert (none.kind, none.hidden) == ("none", "it takes records of 1 client, 0 had any")


def test_kinds_that_can_be_one_are_made_one() -> None:
    data: Data = [{"x": np.array([1, 2])}, {"x": np.array([2.0, 2.5])}, {"x": np.array([True])}, {"x": [None]}]
    summary = ask(data, Mean("x"), TopValues("x", 1))["x"]
    assert (summary.kind, summary.count, summary.sum) == ("float", 5, 8.5)
    assert summary.top is not None
    assert summary.top.values == [(1, 2)]


def test_a_bool_is_0_or_1_where_it_is_averaged() -> None:
    assert ask([{"x": [True, False]}, {"x": [True, True]}], Mean("x"))["x"].mean == 0.75


def test_masked_records_are_missing() -> None:
    values = np.ma.MaskedArray([1.0, 2.0, 3.0], mask=[False, True, False])
    summary = ask([{"x": values}], Mean("x"))["x"]
    assert (summary.count, summary.missing, summary.mean) == (2, 1, 2.0)


def test_the_order_of_the_answers_does_not_show() -> None:
    rng = np.random.default_rng(1)
    data = [{"x": rng.normal(size=50) * 10.0 ** rng.integers(-200, 150, 50)} for _ in range(4)]
    wanted: list[Statistic] = [Variance("x"), Quantiles("x"), Histogram("x", range=(-1, 1)), Extremes("x")]
    first, second = (result_of(Inquiry(wanted, min_count=1), each).to_dict() for each in (data, data[::-1]))
    assert json.dumps(first["columns"]) == json.dumps(second["columns"])


@given(st.lists(st.floats(allow_nan=False), max_size=20))
def test_keys_have_the_order_of_their_numbers(values: list[float]) -> None:
    keys = keys_of(np.array(values, np.float64)).tolist()
    assert [number_of(key, is_float=True) for key in keys] == values
    assert [values[i] for i in np.argsort(keys, kind="stable")] == sorted(values)


# ---- what is not told ------------------------------------------------------------------------------------------------


def test_small_cells_of_a_client_stay_with_it() -> None:
    data = [{"x": np.array([1.0] * 5 + [2.0] * 2), "g": list("aaaaabb")}, {"x": np.array([2.0] * 4), "g": ["b"] * 4}]
    result = ask(data, Mean("x"), Histogram("x", [0, 1.5, 3]), TopValues("g"), min_count=5)
    assert (result["x"].clients, result["x"].count, result["x"].mean) == (1, 7, 9 / 7)
    assert result["x"].histogram is not None
    assert result["x"].histogram.counts == [5, 0]
    assert result["g"].top is not None
    assert result["g"].top.values == [("a", 5)]


def test_a_client_has_the_last_word_on_small_cells() -> None:
    data: Data = [Columns({"x": [1, 2, 3]}, min_count=4), {"x": [1, 2]}]
    assert ask(data, Count("x"), min_count=1)["x"].count == 2


def test_what_too_few_clients_contribute_to_is_hidden() -> None:
    data = [{"x": [1, 2, 3], "g": list("aab")}, {"x": [4], "g": ["a"]}]
    groups = ask(data, Mean("x"), Quantiles("x"), by="g", min_clients=2)["x"].groups
    assert groups is not None
    assert (groups["a"].mean, groups["a"].hidden) == (7 / 3, "")
    assert (groups["b"].mean, groups["b"].count, groups["b"].clients) == (None, None, 1)
    assert groups["b"].hidden == "it takes records of 2 clients, 1 had any"


def test_without_enough_clients_there_is_no_result() -> None:
    inquiry = Inquiry([Mean("x")], min_clients=2)
    inquiry.note("client-7", "Net has no query method: define it")
    with pytest.raises(RunFailed, match=r"^one client has answered, min_clients is 2; client-7: Net has no query"):
        result_of(inquiry, [{"x": [1]}])


# ---- clients that come and go ----------------------------------------------------------------------------------------


def test_all_figures_are_those_of_the_same_clients() -> None:
    data = [{"x": [1.0, 2, 3]}, {"x": [10.0, 20, 30]}, {"x": [100.0]}]
    inquiry = Inquiry([Mean("x"), Quantiles("x", [0.5])], min_clients=1, min_count=1)
    for _ in range(5):
        take_all(inquiry, answers_to(inquiry, data))
    late = answers_to(inquiry, [*data[:2], {}, {"x": [5.0]}])
    late.pop("client-2")
    take_all(inquiry, late)  # one is gone, another is new: everything begins anew
    assert isinstance(inquiry.question.asks[0], q.Schema)
    result = result_of(inquiry, [*data[:2]])
    assert result.clients == ["client-0", "client-1"]
    assert result.left_out == {"client-2": "it dropped out"}
    assert (result["x"].mean, result["x"].quantiles) == (11.0, {0.5: 3.0})


def test_who_comes_back_takes_part_and_who_does_it_too_often_does_not() -> None:
    data: Data = [{"x": [1]}, {"x": [2]}]
    inquiry = Inquiry([Mean("x"), Quantiles("x")], min_clients=1, min_count=1)
    for _ in range(2):
        take_all(inquiry, answers_to(inquiry, data))
        take_all(inquiry, answers_to(inquiry, data))
        take_all(inquiry, answers_to(inquiry, data[:1]))
    assert result_of(inquiry, data).clients == ["client-0"]


def test_a_round_without_answers_changes_nothing() -> None:
    inquiry = Inquiry([Mean("x")], min_clients=1, min_count=1)
    question = inquiry.question
    inquiry.close()
    assert inquiry.question is question


def test_an_answer_counts_once() -> None:
    inquiry = Inquiry([Count("x")], min_clients=1, min_count=1)
    while not inquiry.is_done:
        for each in answers_to(inquiry, [{"x": [1, 2]}]).values():
            inquiry.take("client-0", each)
            inquiry.take("client-0", each)
        inquiry.close()
    assert inquiry.result is not None
    assert inquiry.result["x"].count == 2


# ---- hostile answers -------------------------------------------------------------------------------------------------


CELL = q.Cell(column="x", kind="float")


def forged(asked: q.Ask, **changed: Array) -> tuple[q.Question, dict[str, Array]]:
    question = q.Question(asks=(asked,), min_count=1)
    honest = answer({"x": np.array([1.0, 2.0, 3.0])}, question.tensors(), {})
    question.unpack(honest)
    return question, honest | changed


def words(text: str) -> Array:
    return np.frombuffer(text.encode(), np.uint8)


def sums(*numbers: int, size: int = 0) -> Array:
    return np.array([*numbers, *[0] * (size - len(numbers))], np.int64)


MOMENTS = q.Moments(cell=CELL, order=2)
VALUES = q.Values(cell=CELL, buckets=tuple(range(q.BUCKETS)), most=2)


@pytest.mark.parametrize(
    ("asked", "changed", "reason"),
    [
        (MOMENTS, {"sums": sums(-1, size=MOMENTS.size)}, "a count that is none"),
        (MOMENTS, {"sums": sums(2**54, size=MOMENTS.size)}, "a count that is none"),
        (MOMENTS, {"sums": sums(1, 0, 1, 1, size=MOMENTS.size)}, "more infinite values than records"),
        (MOMENTS, {"sums": sums(0, 0, 0, 0, 5, size=MOMENTS.size)}, "a sum without records"),
        (MOMENTS, {"sums": sums(1, 0, 0, 0, 5, size=MOMENTS.size)}, "sums that no records have"),
        (MOMENTS, {"sums": sums(1, 0, 0, 0, 2**48, size=MOMENTS.size)}, "a sum beyond all numbers"),
        (MOMENTS, {"sums": sums(1)}, "'sums' must be 141 int64"),
        (MOMENTS, {"sums": np.full(MOMENTS.size, np.nan)}, "'sums' must be 141 int64"),
        (q.Bins(cell=CELL, edges=(0.0, 1.0)), {"sums": sums(0, -1, 5)}, "a count that is none"),
        (q.Below(cell=CELL, keys=(1, 2)), {"sums": sums(3, 2, 1)}, "do not rise"),
        (q.Below(cell=CELL, keys=(1, 2)), {"sums": sums(3, 2, 4)}, "do not rise"),
        (q.Range(cell=CELL), {"ends": sums(1, 2, 3)}, "'ends' must be 2 int64"),
        (q.Range(cell=CELL), {"ends": sums(5, ~4)}, "a range that no numbers have"),
        (q.Range(cell=CELL), {"ends": sums(5, ~(2**63 - 1))}, "a range that no numbers have"),
        (q.Schema(), {"words": words("[[[[")}, "'words' must be JSON"),
        (q.Schema(), {"words": words("[" * 100_000)}, "'words' must be JSON"),
        (q.Schema(), {"words": words("{}")}, "'words' must be 1 lists"),
        (q.Schema(), {"words": words('[[["x"]]]')}, "a column must be a pair"),
        (q.Schema(), {"words": words('[[["x", "complex"]]]')}, "of no known kind"),
        (q.Schema(), {"words": words('[[["x", "int"], ["x", "int"]]]')}, "a column comes twice"),
        (q.Schema(), {"words": np.zeros(q.WORDS_BYTES + 1, np.uint8)}, "bytes at most"),
        (VALUES, {"words": words('[[["1", -3]]]')}, "a value without records"),
        (VALUES, {"words": words('[[["1", true]]]')}, "a value without records"),
        (VALUES, {"words": words('[[["[1]", 3]]]')}, "was not asked for"),
        (VALUES, {"words": words('[[["1.0", 3]]]')}, "was not asked for"),
        (VALUES, {"words": words('[[["1", 3], ["1", 3]]]')}, "a value comes twice"),
        (VALUES, {"words": words('[[["1", 3], ["2", 3], ["3", 3]]]')}, "3 values, 2 at most"),
        (q.Values(cell=CELL, buckets=(), most=2), {"words": words('[[["1", 3]]]')}, "was not asked for"),
    ],
)
def test_an_answer_that_no_honest_client_gives_is_refused(asked: q.Ask, changed: dict[str, Array], reason: str) -> None:
    question, forgery = forged(asked, **changed)
    with pytest.raises(UpdateRefused, match=reason):
        question.unpack(forgery)


@given(st.binary(max_size=200))
@settings(max_examples=50)
def test_no_words_break_the_server(text: bytes) -> None:
    for asked in (q.Schema(), VALUES):
        question, forgery = forged(asked, words=np.frombuffer(text, np.uint8))
        with pytest.raises(UpdateRefused):
            question.unpack(forgery)


# ---- wrong columns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ([1, 2], "query must return its columns"),
        ({"x": 3}, r"shape \(\) for column 'x'"),
        ({"x": "text"}, r"shape \(\) for column 'x'"),
        ({"x": np.zeros((2, 2))}, r"shape \(2, 2\) for column 'x'"),
        ({"x": [1], "y": [1, 2]}, "1 records in column 'x', and 2 in 'y'"),
        ({"x": np.array([1j])}, "dtype complex128"),
        ({"x": np.array(["2020-01-01"], "M8[D]")}, "dtype datetime64"),
        ({"x": ["a", 1]}, "a mixture of kinds"),
        ({"x": np.array([2**63], np.uint64)}, "integers beyond 64 bits"),
    ],
)
def test_columns_that_cannot_be_used_are_an_error_of_their_client(columns: Any, reason: str) -> None:
    question = q.Question(asks=(q.Schema(),), min_count=1).tensors()
    with pytest.raises(ClientCodeError, match=reason):
        answer(columns, question, {})


def test_a_question_of_another_version_is_not_guessed_at() -> None:
    strange = {"question": words('{"min_count": 1, "asks": [{"op": "everything"}]}')}
    with pytest.raises(ClientCodeError, match="does not know"):
        answer({"x": [1]}, strange, {})


def test_a_column_that_nobody_has_is_said_to_be_missing() -> None:
    with pytest.raises(RunFailed, match=r"^no client has a column 'chool': client-0 has age, chol$"):
        ask([{"age": [1], "chol": [2]}], Mean("chool"))


def test_a_column_that_one_client_lacks_is_told_with_its_name() -> None:
    data: Data = [{"x": [1]}, {"y": [1]}, {"x": [3]}]
    summary = ask(data, Mean("x"))["x"]
    assert (summary.mean, summary.clients, summary.not_at) == (2.0, 2, ["client-1"])
    with pytest.raises(RunFailed, match=r"^client-1 has no column 'x', and 3 clients must have it$"):
        ask(data, Mean("x"), min_clients=3)


def test_text_at_one_client_and_numbers_at_another_are_an_error_that_names_both() -> None:
    with pytest.raises(RunFailed, match=r"^column 'x' is of several kinds: int at client-0, text at client-1$"):
        ask([{"x": [1]}, {"x": ["1"]}], Count("x"))


def test_text_has_no_mean() -> None:
    with pytest.raises(RunFailed, match=r"^column 'x' is text: ask for its count or its top values$"):
        ask([{"x": ["a"]}], Mean("x"))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Inquiry([]),
        lambda: Inquiry([Mean("x")], min_clients=0),
        lambda: Inquiry([Mean("x")], min_count=True),
        lambda: Inquiry([Histogram("x", 3), Histogram("x", 4)]),
        lambda: Inquiry([Variance("x", 0), Variance("x", 1)]),
        lambda: Variance("x", 2),
        lambda: Histogram("x", 0),
        lambda: Histogram("x", [1, 1]),
        lambda: Histogram("x", [1, math.nan]),
        lambda: Histogram("x", 3, range=(2, 1)),
        lambda: Histogram("x", [1, 2], range=(1, 2)),
        lambda: Quantiles("x", []),
        lambda: Quantiles("x", [1.5]),
        lambda: TopValues("x", 0),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anybody_is(wrong: Any) -> None:
    with pytest.raises(ConfigError):
        wrong()
