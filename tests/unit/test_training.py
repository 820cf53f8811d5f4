"""Client code and what is made of its results."""

from __future__ import annotations

import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedbus.errors import ClientCodeError, ConfigError
from fedbus.training.base import (
    Client,
    ClientContext,
    NumPyClient,
    as_client,
    check_evaluate_result,
    check_fit_result,
)
from fedbus.training.delta import update_delta
from fedbus.types import Array, EvaluateResult, FitResult, delta_dtype

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
FLOATS = ["float16", "float32", "float64", BFLOAT16]

MODEL = {
    "fc.weight": np.arange(4, dtype=np.float32),
    "fc.bias": np.zeros(2, np.float32),
}


class Returns(NumPyClient):
    """Returns what it was told to return."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def get_parameters(self, config: Any) -> Any:
        return self.result

    def fit(self, parameters: Any, config: Any) -> Any:
        return self.result

    def evaluate(self, parameters: Any, config: Any) -> Any:
        return self.result


def fit(result: Any) -> FitResult:
    return as_client(Returns(result)).fit(MODEL, {})


def evaluate(result: Any) -> EvaluateResult:
    return as_client(Returns(result)).evaluate(MODEL, {})


ARRAYS = [np.ones(4, np.float32), np.ones(2, np.float32)]


class TestClientContext:
    def test_a_context_is_cancelled_from_another_thread_and_reset_for_the_next_task(self) -> None:
        context = ClientContext(client_id="a", partition=0, num_partitions=1)
        seen = [context.cancelled]
        thread = threading.Thread(target=context.cancel)
        thread.start()
        thread.join()
        seen.append(context.cancelled)
        context._reset()
        seen.append(context.cancelled)
        assert seen == [False, True, False]

    def test_two_contexts_share_neither_memory_nor_cancellation(self) -> None:
        one, two = ClientContext(client_id="a"), ClientContext(client_id="b")
        one.state["seen"] = 1
        one.cancel()
        assert two.state == {}
        assert not two.cancelled


class TestAsClient:
    def test_arrays_are_named_after_the_models_tensors_in_order(self) -> None:
        result = fit((ARRAYS, 7, {"loss": 0.5}))
        assert list(result.parameters) == ["fc.weight", "fc.bias"]
        np.testing.assert_array_equal(result.parameters["fc.weight"], [1, 1, 1, 1])
        assert (result.num_examples, result.metrics) == (7, {"loss": 0.5})

    def test_a_numpy_client_is_given_a_list_of_arrays_and_a_dict(self) -> None:
        seen: list[Any] = []

        class Net(NumPyClient):
            def fit(self, parameters: Any, config: Any) -> Any:
                seen.extend((parameters, config))
                return parameters, 1, {}

        as_client(Net()).fit(MODEL, {"lr": 0.1})
        assert isinstance(seen[0], list)
        np.testing.assert_array_equal(seen[0][0], MODEL["fc.weight"])
        assert seen[1] == {"lr": 0.1}
        assert type(seen[1]) is dict

    def test_training_in_place_does_not_change_the_model_it_began_from(self) -> None:
        class Net(NumPyClient):
            def fit(self, parameters: list[Array], config: Any) -> Any:
                parameters[0] += 1
                return parameters, 1, {}

        base = {"w": np.zeros(2, np.float32)}
        base["w"].setflags(write=False)
        trained = as_client(Net()).fit(base, {}).parameters
        np.testing.assert_array_equal(update_delta(base, trained)["w"], [1, 1])

    def test_get_parameters_numbers_the_arrays(self) -> None:
        assert list(as_client(Returns(ARRAYS)).get_parameters()) == ["0", "1"]

    def test_a_client_is_returned_as_it_is(self) -> None:
        client = Client()
        assert as_client(client) is client

    @pytest.mark.parametrize(("obj", "kind"), [(3, "an int"), (None, "None"), (NumPyClient, "a type"), ({}, "a dict")])
    def test_anything_else_is_refused_by_its_type(self, obj: object, kind: str) -> None:
        with pytest.raises(ClientCodeError, match=f"must return a Client or a NumPyClient, not {kind}$"):
            as_client(obj)

    @pytest.mark.parametrize("base", [Client, NumPyClient])
    def test_a_method_that_is_missing_is_named(self, base: type) -> None:
        client = as_client(type("Net", (base,), {})())
        with pytest.raises(ClientCodeError, match="has no fit method"):
            client.fit(MODEL, {})
        with pytest.raises(ClientCodeError, match="has no evaluate method"):
            client.evaluate(MODEL, {})
        with pytest.raises(ClientCodeError, match="has no get_parameters method"):
            client.get_parameters()

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            (None, "fit returned None, expected a tuple (parameters, num_examples, metrics)"),
            ([ARRAYS, 1, {}], "fit returned a list, expected a tuple (parameters, num_examples, metrics)"),
            ((ARRAYS, 1), "fit returned a tuple of 2, expected (parameters, num_examples, metrics)"),
            ((ARRAYS[0], 1, {}), "fit returned a ndarray as parameters, expected a list of arrays"),
            ((ARRAYS[:1], 1, {}), "fit returned 1 arrays, the model has 2"),
            (
                ([np.ones(3, np.float32), ARRAYS[1]], 1, {}),
                "fit returned shape (3,) for tensor 'fc.weight', the model has (4,)",
            ),
            (
                ([ARRAYS[0], [0.0, 0.0]], 1, {}),
                "fit returned a list for tensor 'fc.bias', expected a numpy array",
            ),
            ((ARRAYS, 1.0, {}), "fit returned a float as num_examples, expected an int"),
            ((ARRAYS, True, {}), "fit returned a bool as num_examples, expected an int"),
            ((ARRAYS, 1, None), "fit returned None as metrics, expected a dict"),
            ((ARRAYS, 1, {3: 1.0}), "fit returned a metric named 3, expected a str as its name"),
            (
                (ARRAYS, 1, {"f1": [1.0]}),
                "fit returned a list as metric 'f1', expected a bool, int, float, str or bytes",
            ),
        ],
    )
    def test_a_wrong_fit_result_is_refused_in_one_line(self, result: Any, message: str) -> None:
        with pytest.raises(ClientCodeError) as caught:
            fit(result)
        assert str(caught.value) == message

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            (0.5, "evaluate returned a float, expected a tuple (loss, num_examples, metrics)"),
            ((0.5, {}), "evaluate returned a tuple of 2, expected (loss, num_examples, metrics)"),
            (("low", 1, {}), "evaluate returned a str as loss, expected a float"),
            ((True, 1, {}), "evaluate returned a bool as loss, expected a float"),
            ((None, 1, {}), "evaluate returned None as loss, expected a float"),
            ((0.5, "1", {}), "evaluate returned a str as num_examples, expected an int"),
            (
                (0.5, 1, {"f1": None}),
                "evaluate returned None as metric 'f1', expected a bool, int, float, str or bytes",
            ),
        ],
    )
    def test_a_wrong_evaluate_result_is_refused_in_one_line(self, result: Any, message: str) -> None:
        with pytest.raises(ClientCodeError) as caught:
            evaluate(result)
        assert str(caught.value) == message

    @pytest.mark.parametrize("num_examples", [0, -1])
    def test_weights_and_nan_are_left_to_the_server(self, num_examples: int) -> None:
        nan = np.full(4, np.nan, np.float32)
        assert fit(([nan, ARRAYS[1]], num_examples, {})).num_examples == num_examples
        assert np.isnan(evaluate((float("nan"), num_examples, {})).loss)

    def test_numpy_scalars_become_python_scalars(self) -> None:
        metrics = {
            "f16": np.float16(0.5),
            "f32": np.float32(0.25),
            "f64": np.float64(0.125),
            "i": np.int32(3),
            "u": np.uint8(4),
            "b": np.bool_(True),
            "s": np.str_("x"),
        }
        result = evaluate((np.float32(0.5), np.int64(9), metrics))
        assert (result.loss, type(result.loss)) == (0.5, float)
        assert (result.num_examples, type(result.num_examples)) == (9, int)
        assert result.metrics == {"f16": 0.5, "f32": 0.25, "f64": 0.125, "i": 3, "u": 4, "b": True, "s": "x"}
        kinds = [type(value) for value in result.metrics.values()]
        assert kinds == [float, float, float, int, int, bool, str]
        assert type(fit((ARRAYS, np.int64(9), {})).num_examples) is int

    def test_a_numpy_scalar_stands_for_a_0d_array(self) -> None:
        base = {"scale": np.array(2, np.float32)}
        result = as_client(Returns(([np.float32(3)], 1, {}))).fit(base, {})
        assert update_delta(base, result.parameters)["scale"] == 1


class TestCheckedResults:
    def test_a_fit_result_keeps_its_tensors_and_loses_its_numpy_scalars(self) -> None:
        given = FitResult(parameters=MODEL, num_examples=np.int64(3), metrics={"a": np.float32(0.5)})  # type: ignore[arg-type, dict-item]
        checked = check_fit_result(given)
        assert checked.parameters is MODEL
        assert (type(checked.num_examples), type(checked.metrics["a"])) == (int, float)

    def test_other_results_are_refused(self) -> None:
        with pytest.raises(ClientCodeError, match="fit returned a tuple, expected a FitResult"):
            check_fit_result((ARRAYS, 1, {}))
        with pytest.raises(ClientCodeError, match="fit returned a list as parameters, expected a mapping"):
            check_fit_result(FitResult(parameters=ARRAYS, num_examples=1))  # type: ignore[arg-type]
        with pytest.raises(ClientCodeError, match="evaluate returned a float, expected an EvaluateResult"):
            check_evaluate_result(0.5)


def one(base: Array, trained: Array) -> Array:
    """The delta of a model of one tensor."""
    return update_delta({"w": base}, {"w": trained})["w"]


def pairs(dtype: Any) -> st.SearchStrategy[tuple[Array, Array]]:
    """Two arrays of one shape."""
    elements = hnp.from_dtype(np.dtype(dtype), allow_nan=False, allow_infinity=False)
    shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    return shapes.flatmap(
        lambda shape: st.tuples(
            hnp.arrays(dtype, shape, elements=elements), hnp.arrays(dtype, shape, elements=elements)
        )
    )


class TestUpdateDelta:
    @pytest.mark.parametrize("dtype", INTEGERS)
    def test_base_plus_delta_is_exactly_the_trained_tensor_for_integers(self, dtype: str) -> None:
        @given(pairs(dtype))
        def check(pair: tuple[Array, Array]) -> None:
            base, trained = pair
            delta = one(base, trained)
            assert delta.dtype == np.int64
            assert delta.shape == base.shape
            np.testing.assert_array_equal((base.astype(np.int64) + delta).astype(dtype), trained)

        check()

    @pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint16", "uint32"])
    def test_differences_of_narrow_integers_do_not_wrap(self, dtype: str) -> None:
        least, most = np.iinfo(dtype).min, np.iinfo(dtype).max
        delta = one(np.array([least, most], dtype), np.array([most, least], dtype))
        assert delta.tolist() == [int(most) - int(least), int(least) - int(most)]

    def test_unsigned_64_bit_differences_are_seen_as_signed(self) -> None:
        base, trained = np.array([5, 0], np.uint64), np.array([3, 2**64 - 1], np.uint64)
        assert one(base, trained).tolist() == [-2, -1]

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_base_plus_delta_is_the_trained_tensor_within_one_ulp_for_floats(self, dtype: str) -> None:
        width = 32 if dtype == "float32" else 64
        numbers = st.floats(-(2.0**100), 2.0**100, width=width)  # type: ignore[arg-type]

        @given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=8))
        def check(values: list[tuple[float, float]]) -> None:
            base, trained = np.array(values, dtype).T
            delta = one(base, trained)
            assert delta.dtype == dtype
            ulp = np.spacing(np.maximum(np.abs(base), np.abs(trained)))
            assert np.all(np.abs(base + delta - trained) <= ulp)

        check()

    @pytest.mark.parametrize(("dtype", "epsilon"), [("float16", 2.0**-10), (BFLOAT16, 2.0**-7)])
    def test_half_precision_is_subtracted_in_float32_and_cast_back(self, dtype: Any, epsilon: float) -> None:
        base = np.array([1, 256, 0], dtype)
        trained = np.array([1 + epsilon, -256, 0.5], dtype)
        delta = one(base, trained)
        assert delta.dtype == np.dtype(dtype)
        assert delta.astype(np.float32).tolist() == [epsilon, -512, 0.5]

    def test_a_difference_too_large_for_float16_becomes_inf_without_a_warning(self) -> None:
        delta = one(np.array([-60000, 0], np.float16), np.array([60000, 1], np.float16))
        assert delta.tolist() == [np.inf, 1]

    def test_a_difference_too_large_for_float32_becomes_inf_without_a_warning(self) -> None:
        assert one(np.array([-3e38], np.float32), np.array([3e38], np.float32)).tolist() == [np.inf]

    def test_nan_travels_so_that_the_server_refuses_it(self) -> None:
        assert np.isnan(one(np.zeros(1, np.float32), np.array([np.nan], np.float32))).all()

    def test_complex_tensors_keep_their_dtype(self) -> None:
        delta = one(np.array([1 + 1j], np.complex64), np.array([3 + 0j], np.complex64))
        assert delta.dtype == np.complex64
        assert delta.tolist() == [2 - 1j]

    def test_bools_travel_as_minus_one_zero_and_one(self) -> None:
        delta = one(np.array([False, False, True, True]), np.array([False, True, False, True]))
        assert delta.dtype == np.int8
        assert delta.tolist() == [0, 1, -1, 0]

    def test_0d_and_empty_tensors_keep_their_shape(self) -> None:
        scalar = one(np.array(2, np.float32), np.array(5, np.float32))
        assert type(scalar) is np.ndarray
        assert (scalar.shape, float(scalar)) == ((), 3)
        assert one(np.empty((0, 3), np.int32), np.empty((0, 3), np.int64)).shape == (0, 3)

    def test_a_subset_of_names_is_enough_and_the_models_order_is_kept(self) -> None:
        base = {name: np.zeros(1, np.float32) for name in "abc"}
        assert list(update_delta(base, {"c": base["c"], "a": base["a"]})) == ["a", "c"]

    def test_other_precisions_of_the_same_kind_are_cast_to_the_models(self) -> None:
        assert one(np.zeros(1, np.float32), np.array([0.5], np.float64)).dtype == np.float32
        assert one(np.zeros(1, BFLOAT16), np.array([0.5], np.float32)).dtype == BFLOAT16
        assert one(np.zeros(1, np.float64), np.array([0.5], np.float32)).tolist() == [0.5]
        assert one(np.array([250], np.uint8), np.array([255], np.int64)).tolist() == [5]
        assert one(np.zeros(1, np.float32), np.array([1e300])).tolist() == [np.inf]

    @pytest.mark.parametrize(("dtype", "value"), [("uint8", 256), ("uint8", -1), ("int32", 2**31), ("int64", 2**63)])
    def test_an_integer_that_does_not_fit_the_models_dtype_is_refused(self, dtype: str, value: int) -> None:
        with pytest.raises(ClientCodeError, match=f"for tensor 'w' that do not fit {dtype}"):
            one(np.zeros(1, dtype), np.array([value]))

    @pytest.mark.parametrize(
        ("model", "trained"),
        [
            ("int64", "float32"),
            ("float32", "int64"),
            ("bool", "int64"),
            ("int64", "bool"),
            ("float32", "complex64"),
            ("complex64", "float32"),
            (BFLOAT16, "int16"),
            ("float32", "O"),
        ],
    )
    def test_another_kind_of_dtype_is_refused_by_name(self, model: Any, trained: Any) -> None:
        with pytest.raises(ClientCodeError) as caught:
            one(np.zeros(1, model), np.zeros(1, trained))
        assert str(caught.value) == (
            f"fit returned dtype {np.dtype(trained)} for tensor 'w', the model has {np.dtype(model)}"
        )

    def test_unknown_names_and_wrong_shapes_are_refused_by_name(self) -> None:
        with pytest.raises(ClientCodeError, match="fit returned tensor 'x', which the model does not have"):
            update_delta(MODEL, {"x": ARRAYS[0]})
        with pytest.raises(ClientCodeError, match=r"shape \(2,\) for tensor 'w', the model has \(1, 2\)"):
            one(np.zeros((1, 2), np.float32), np.zeros(2, np.float32))
        with pytest.raises(ClientCodeError, match="fit returned list for tensor 'w', expected a numpy array"):
            one(np.zeros(1, np.float32), [0.0])  # type: ignore[arg-type]


class TestDeltaDtype:
    @pytest.mark.parametrize("dtype", [*FLOATS, "complex64", "complex128"])
    def test_floating_and_complex_tensors_keep_their_dtype(self, dtype: Any) -> None:
        assert delta_dtype(np.dtype(dtype)) == np.dtype(dtype)

    @pytest.mark.parametrize("dtype", INTEGERS)
    def test_integers_travel_as_int64(self, dtype: str) -> None:
        assert delta_dtype(np.dtype(dtype)) == np.int64

    def test_bools_travel_as_int8(self) -> None:
        assert delta_dtype(np.dtype(bool)) == np.int8

    def test_foreign_byte_order_becomes_native(self) -> None:
        assert delta_dtype(np.dtype(np.float32).newbyteorder("S")) == np.dtype(np.float32)

    @pytest.mark.parametrize("dtype", ["O", "U4", "M8[s]", "m8[s]", "V4", ml_dtypes.float8_e4m3fn])
    def test_dtypes_that_no_model_has_are_refused(self, dtype: Any) -> None:
        with pytest.raises(ConfigError, match="cannot be part of a model"):
            delta_dtype(np.dtype(dtype))

    @pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS, "complex64", "complex128", "bool"])
    def test_it_tells_what_update_delta_makes(self, dtype: Any) -> None:
        tensor = np.ones((2, 2), dtype)
        assert one(tensor, tensor).dtype == delta_dtype(tensor.dtype)
