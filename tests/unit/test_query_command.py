"""What `fedbus query` takes and what it prints."""

from __future__ import annotations

import json
from typing import Any

import pytest

from fedbus.analytics.inquiry import Inquiry
from fedbus.analytics.result import QueryResult
from fedbus.analytics.statistics import Describe, Histogram, Mean, Quantiles, TopValues
from fedbus.cli.query import _histogram, _names, _quantiles, _top, show
from fedbus.errors import UsageError
from tests.unit.test_analytics import result_of


@pytest.mark.parametrize(
    ("parse", "text", "meant"),
    [
        (_quantiles, "chol", Quantiles("chol")),
        (_quantiles, "chol:0.1,0.9", Quantiles("chol", [0.1, 0.9])),
        (_quantiles, "mg:dl:0.5", Quantiles("mg:dl", [0.5])),
        (_top, "cp", TopValues("cp")),
        (_top, "cp:5", TopValues("cp", 5)),
        (_top, "mg:dl", TopValues("mg:dl")),
        (_histogram, "age", Histogram("age")),
        (_histogram, "age:8", Histogram("age", 8)),
        (_histogram, "age:20,40,60.5", Histogram("age", [20, 40, 60.5])),
        (_histogram, "age:8:20,60", Histogram("age", 8, (20, 60))),
        (_names, ["age,chol", "cp"], ["age", "chol", "cp"]),
    ],
)
def test_options_say_what_to_ask(parse: Any, text: Any, meant: Any) -> None:
    assert parse(text) == meant


@pytest.mark.parametrize(
    ("parse", "text", "reason"),
    [
        (_top, "cp:2.5", "2.5 is no whole number"),
        (_top, "cp:1,2", "give one number of values"),
        (_histogram, "age:8:20,40,60", "COLUMN:BINS:LOW,HIGH is due"),
    ],
)
def test_options_that_make_no_sense_are_wrong_usage(parse: Any, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse(text)


def shown(capsys: pytest.CaptureFixture[str], result: QueryResult) -> list[str]:
    show(result)
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


DATA: list[dict[str, Any]] = [
    {"age": [30.0, 40.0, None], "sex": ["m", "f", "m"]},
    {"age": [50.0, 80.0], "sex": ["f", "f"], "more\x1b[2J": [1, 2]},
]


def test_figures_are_a_table_with_bars_and_lists_below(capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(Inquiry([Describe("age"), Histogram("age", 2), TopValues("sex", 1)], min_count=1), DATA)
    assert shown(capsys, result) == [
        "column  clients  count  missing  mean      std  min  25 %  50 %  75 %  max",
        "age           2      4        1    50  18.7083   30    30    40    50   80",
        "sex           2      5        0",
        "",
        "age: histogram",
        "30 to 55  3  ████████████████████████████████████████",
        "55 to 80  1  █████████████",
        "",
        "sex: top values",
        "f  3",
        "",
        "2 clients, 55 questions, 0.0 s",
    ]


def test_what_is_not_shown_is_said_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    inquiry = Inquiry([Mean("age")], by="sex", min_count=2)
    inquiry.note("client-9", "Net has no query method: define it")
    assert shown(capsys, result_of(inquiry, DATA)) == [
        "column  sex  clients  count  missing  mean",
        "age                2      4        0    50",
        "age     f          1",
        "age     m          0",
        "",
        "age, sex f: not shown: it takes records of 2 clients, 1 had any",
        "age, sex m: not shown: it takes records of 2 clients, 0 had any",
        "without client-9: Net has no query method: define it",
        "clients left out cells of fewer than 2 records: counts are lower bounds",
        "2 clients, 4 questions, 0.0 s",
    ]


def test_a_name_from_a_client_does_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(Inquiry([Describe()], min_clients=1, min_count=1), DATA)
    lines = shown(capsys, result)
    assert any(line.startswith("more?[2J ") for line in lines)
    assert "more?[2J: no such column at client-0" in lines
    assert "\x1b" not in "".join(lines)


def test_json_leaves_out_what_was_not_asked() -> None:
    result = result_of(Inquiry([Mean("age")], min_count=1), DATA)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False)) == {
        "clients": ["client-0", "client-1"],
        "left_out": {},
        "min_clients": 2,
        "min_count": 1,
        "rounds": 2,
        "seconds": 0.0,
        "columns": {
            "age": {"kind": "float", "clients": 2, "count": 4, "missing": 1, "sum": 200.0, "mean": 50.0},
        },
    }
