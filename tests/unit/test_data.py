"""Datasets and their partitions."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbus.data.partitioners import Indices, dirichlet, iid
from fedbus.data.sources import Dataset, digits
from fedbus.errors import ConfigError, UsageError

LABELS = np.repeat(np.arange(10), 100)

PARTITIONERS: list[Callable[..., list[Indices]]] = [
    lambda labels, parts, seed: iid(labels, parts, seed),
    lambda labels, parts, seed: dirichlet(labels, parts, 0.5, seed, min_size=1),
]


class TestPartitioners:
    @pytest.mark.parametrize("partition", PARTITIONERS)
    def test_each_index_is_in_exactly_one_sorted_partition(self, partition: Any) -> None:
        @given(st.lists(st.integers(0, 4), min_size=60, max_size=90), st.integers(1, 5), st.integers(0, 2**32))
        def check(labels: list[int], num_partitions: int, seed: int) -> None:
            parts = partition(labels, num_partitions, seed)
            assert len(parts) == num_partitions
            assert all(part.dtype == np.int64 and np.all(np.diff(part) > 0) for part in parts)
            assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))

        check()

    @pytest.mark.parametrize("partition", PARTITIONERS)
    def test_partitions_are_a_function_of_the_seed_alone(self, partition: Any) -> None:
        np.random.seed(1)
        first = partition(LABELS, 7, 3)
        np.random.seed(2)
        before = np.random.random_sample()
        np.random.seed(2)
        second, other = partition(LABELS, 7, 3), partition(LABELS, 7, 4)
        assert np.random.random_sample() == before
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
        assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))

    def test_iid_partitions_differ_in_size_by_one_at_most(self) -> None:
        assert sorted(len(part) for part in iid(np.zeros(11), 3, 0)) == [3, 4, 4]

    def test_iid_partitions_mix_the_classes(self) -> None:
        for part in iid(LABELS, 4, 0):
            assert np.all(np.bincount(LABELS[part], minlength=10) > 10)

    def test_a_small_alpha_gives_clients_few_classes_and_a_large_one_all(self) -> None:
        def share(alpha: float) -> float:
            parts = dirichlet(LABELS, 5, alpha, 0, min_size=1)
            return float(np.mean([np.bincount(LABELS[part]).max() / len(part) for part in parts]))

        assert share(0.05) > 0.3
        assert share(1e6) == pytest.approx(0.1, abs=0.005)

    def test_proportions_are_dirichlet_per_class(self) -> None:
        # Dir(α) over n parts: the variance of one share is (1/n)(1 - 1/n) / (nα + 1); here 0.25 / 2.
        labels = np.zeros(1000, np.int64)
        shares = [len(dirichlet(labels, 2, 0.5, seed, min_size=0)[0]) / 1000 for seed in range(2000)]
        assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
        assert np.var(shares) == pytest.approx(0.125, abs=0.01)

    def test_every_partition_has_at_least_min_size(self) -> None:
        for seed in range(20):
            assert min(len(part) for part in dirichlet(LABELS, 20, 0.3, seed, min_size=15)) >= 15

    def test_no_draw_that_is_large_enough_says_what_to_change(self) -> None:
        with pytest.raises(ConfigError, match="raise alpha, or lower num_partitions or min_size"):
            dirichlet(np.zeros(100), 10, 0.01, 0, min_size=10)

    @pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
    def test_an_alpha_that_is_not_positive_is_refused(self, alpha: float) -> None:
        with pytest.raises(ConfigError, match="alpha must be a positive number"):
            dirichlet(LABELS, 2, alpha, 0)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((np.zeros((4, 2)), 2, 0), "labels must be one-dimensional"),
            ((LABELS, 0, 0), "num_partitions must be a whole number of 1 or more, not 0"),
            ((LABELS, 2.0, 0), "num_partitions must be a whole number"),
            ((LABELS, True, 0), "num_partitions must be a whole number"),
            ((LABELS, 2, -1), "seed must be a whole number of 0 or more, not -1"),
            ((np.zeros(3), 4, 0), "3 examples are too few for 4 partitions of at least 1: lower"),
        ],
    )
    @pytest.mark.parametrize("partition", PARTITIONERS)
    def test_arguments_that_cannot_work_are_refused(self, partition: Any, arguments: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            partition(*arguments)

    def test_too_few_examples_for_min_size_are_refused_before_any_draw(self) -> None:
        with pytest.raises(ConfigError, match="99 examples are too few for 10 partitions of at least 10"):
            dirichlet(np.zeros(99), 10, 1.0, 0)
        with pytest.raises(ConfigError, match="min_size must be a whole number of 0 or more"):
            dirichlet(LABELS, 2, 1.0, 0, min_size=-1)


class TestDataset:
    def test_a_split_takes_the_same_fraction_of_each_class(self) -> None:
        labels = np.repeat([0, 1, 2], [10, 20, 50])
        data = Dataset(np.arange(80), labels)
        train, test = data.split(0.2, seed=0)
        assert np.bincount(test.y).tolist() == [2, 4, 10]
        assert sorted([*train.x, *test.x]) == list(range(80))
        np.testing.assert_array_equal(labels[test.x], test.y)

    def test_a_split_is_a_function_of_its_seed(self) -> None:
        data = Dataset(np.arange(1000), LABELS)
        np.testing.assert_array_equal(data.split(0.2, seed=1)[1].x, data.split(0.2, seed=1)[1].x)
        assert not np.array_equal(data.split(0.2, seed=1)[1].x, data.split(0.2, seed=2)[1].x)

    def test_take_keeps_the_order_asked_for(self) -> None:
        taken = Dataset(np.array([10, 11, 12]), np.array([0, 1, 2])).take([2, 0])
        assert (taken.x.tolist(), taken.y.tolist(), len(taken)) == ([12, 10], [2, 0], 2)
        assert len(taken.take([])) == 0

    @pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
    def test_a_fraction_outside_0_to_1_is_refused(self, fraction: float) -> None:
        with pytest.raises(ConfigError, match="test_fraction must be in"):
            Dataset(np.arange(2), np.arange(2)).split(fraction, seed=0)

    def test_examples_and_labels_must_belong_together(self) -> None:
        with pytest.raises(ConfigError, match="do not belong together"):
            Dataset(np.zeros(3), np.zeros(2))


class TestDigits:
    def test_the_digits_are_scikit_learns(self) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        data = digits()
        assert (data.x.dtype.name, data.x.shape) == ("float32", (1797, 1, 8, 8))
        assert (data.y.dtype.name, data.y.shape) == ("int64", (1797,))
        np.testing.assert_array_equal(data.x.reshape(1797, 64) * 16, images)
        np.testing.assert_array_equal(data.y, labels)
        assert (data.x.min(), data.x.max()) == (0, 1)

    def test_another_layout_of_scikit_learn_gives_the_same_digits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import sklearn.datasets

        assert sklearn.datasets.load_digits
        expected = digits()
        monkeypatch.setattr(Path, "exists", lambda self: False)
        np.testing.assert_array_equal(digits().x, expected.x)
        np.testing.assert_array_equal(digits().y, expected.y)

    def test_a_missing_scikit_learn_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(UsageError, match=r"scikit-learn is not installed: pip install 'fedbus\[demo\]'"):
            digits()
