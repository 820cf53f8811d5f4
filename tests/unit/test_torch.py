"""PyTorch models as named numpy tensors, and back; the digits example that uses it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import ml_dtypes
import numpy as np
import pytest
import torch

from fedbus.errors import ClientCodeError
from fedbus.examples import digits
from fedbus.training.base import ClientContext, as_client
from fedbus.training.delta import update_delta
from fedbus.training.torch import get_parameters, set_parameters
from fedbus.types import Array

DTYPES = {
    "bool": np.bool_,
    "uint8": np.uint8,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "int64": np.int64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float64": np.float64,
    "complex64": np.complex64,
}


def module(**tensors: torch.Tensor) -> torch.nn.Module:
    """A module whose state dict is `tensors`."""
    result = torch.nn.Module()
    for name, tensor in tensors.items():
        result.register_buffer(name, tensor)
    return result


def linear() -> torch.nn.Linear:
    return torch.nn.Linear(2, 3)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class TestGetParameters:
    @pytest.mark.parametrize("name", DTYPES)
    def test_every_dtype_survives_the_way_there_and_back(self, name: str) -> None:
        values = torch.tensor([0, 1, 3]).to(getattr(torch, name))
        arrays = get_parameters(module(w=values))
        assert arrays["w"].dtype == np.dtype(DTYPES[name])
        np.testing.assert_array_equal(arrays["w"], np.array([0, 1, 3]).astype(DTYPES[name]))
        target = module(w=torch.zeros_like(values))
        set_parameters(target, arrays)
        assert torch.equal(target.state_dict()["w"], values)

    def test_bfloat16_keeps_its_bits(self) -> None:
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        arrays = get_parameters({"w": bits.view(torch.bfloat16)})
        np.testing.assert_array_equal(arrays["w"].view(np.int16), bits.numpy())

    def test_0d_and_empty_tensors_keep_their_shape(self) -> None:
        source = module(step=torch.tensor(7), scale=torch.tensor(0.5, dtype=torch.bfloat16), none=torch.zeros(0, 3))
        arrays = get_parameters(source)
        assert {name: array.shape for name, array in arrays.items()} == {
            "step": (),
            "scale": (),
            "none": (0, 3),
        }
        target = module(step=torch.tensor(0), scale=torch.tensor(0, dtype=torch.bfloat16), none=torch.ones(0, 3))
        set_parameters(target, arrays)
        loaded = target.state_dict()
        assert (int(loaded["step"]), float(loaded["scale"])) == (7, 0.5)

    def test_the_arrays_are_copies(self) -> None:
        net = linear()
        arrays = get_parameters(net)
        arrays["weight"][:] = 9
        assert 9 not in net.weight

    def test_non_contiguous_and_conjugate_tensors_come_as_they_look(self) -> None:
        base = torch.arange(6, dtype=torch.float32).reshape(2, 3)
        lazy = torch.tensor([1 + 2j]).conj()
        arrays = get_parameters({"t": base.T, "h": base.to(torch.bfloat16).T, "c": lazy})
        np.testing.assert_array_equal(arrays["t"], [[0, 3], [1, 4], [2, 5]])
        np.testing.assert_array_equal(arrays["h"].astype(np.float32), [[0, 3], [1, 4], [2, 5]])
        assert arrays["t"].flags.c_contiguous
        assert arrays["c"].tolist() == [1 - 2j]

    def test_tied_tensors_appear_under_each_name(self) -> None:
        first, second = linear(), linear()
        second.weight = first.weight
        net = torch.nn.ModuleDict({"a": first, "b": second})
        arrays = get_parameters(net)
        assert list(arrays) == ["a.weight", "a.bias", "b.weight", "b.bias"]
        np.testing.assert_array_equal(arrays["a.weight"], arrays["b.weight"])
        set_parameters(net, {name: array + 1 for name, array in arrays.items()})
        np.testing.assert_array_equal(get_parameters(net)["b.weight"], arrays["a.weight"] + 1)

    def test_an_entry_that_numpy_cannot_hold_is_named(self) -> None:
        with pytest.raises(ClientCodeError, match=r"entry 'x' of the state dict is not a tensor but int"):
            get_parameters({"x": 3})
        with pytest.raises(ClientCodeError, match=r"tensor 'w' \(torch.float32, .*, meta\) cannot become"):
            get_parameters({"w": torch.zeros(2, device="meta")})
        with pytest.raises(ClientCodeError, match=r"tensor 'w' \(torch.float8_e4m3fn"):
            get_parameters({"w": torch.zeros(2).to(torch.float8_e4m3fn)})


class TestSetParameters:
    def test_loading_is_in_place_and_leaves_no_gradient_history(self) -> None:
        net = linear()
        weight = net.weight
        set_parameters(net, {"weight": np.full((3, 2), 2, np.float32), "bias": np.ones(3, np.float32)})
        assert net.weight is weight
        assert weight.requires_grad
        assert weight.is_leaf
        assert weight.tolist() == [[2, 2], [2, 2], [2, 2]]

    def test_a_list_is_taken_in_the_state_dicts_order(self) -> None:
        net = linear()
        set_parameters(net, [np.zeros((3, 2), np.float32), np.ones(3, np.float32)])
        assert net.bias.tolist() == [1, 1, 1]

    def test_read_only_reversed_and_big_endian_arrays_are_loaded(self) -> None:
        weight = np.arange(6, dtype=">f4").reshape(3, 2)
        weight.setflags(write=False)
        bias = np.arange(3, dtype=np.float32)[::-1]
        net = linear()
        set_parameters(net, {"weight": weight, "bias": bias})
        assert net.weight.tolist() == [[0, 1], [2, 3], [4, 5]]
        assert net.bias.tolist() == [2, 1, 0]

    def test_the_module_does_not_share_memory_with_the_arrays(self) -> None:
        net, arrays = linear(), get_parameters(linear())
        set_parameters(net, arrays)
        before = net.weight.tolist()
        arrays["weight"] += 1
        assert net.weight.tolist() == before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bias": None}, "set_parameters was not given 'bias', which the module has"),
            ({"x": np.zeros(1)}, "set_parameters was given 'x', which the module does not have"),
            ({"bias": np.zeros(4, np.float32)}, "tensor 'bias' was given shape (4,), the module has (3,)"),
            ({"bias": np.zeros(3)}, "tensor 'bias' was given float64, the module has float32"),
            ({"bias": np.zeros(3, "U1")}, "tensor 'bias' was given <U1, which PyTorch does not have"),
        ],
    )
    def test_what_does_not_match_is_refused_in_one_line_and_nothing_is_loaded(
        self, change: dict[str, Array | None], message: str
    ) -> None:
        net = linear()
        before = get_parameters(net)
        given = {"weight": np.zeros((3, 2), np.float32), "bias": np.zeros(3, np.float32), **change}
        with pytest.raises(ClientCodeError) as caught:
            set_parameters(net, {name: value for name, value in given.items() if value is not None})
        assert str(caught.value) == message
        np.testing.assert_array_equal(net.weight.detach().numpy(), before["weight"])

    def test_a_list_of_the_wrong_length_is_refused(self) -> None:
        for strict in (True, False):
            with pytest.raises(ClientCodeError, match="was given 1 arrays, the module has 2"):
                set_parameters(linear(), [np.zeros((3, 2), np.float32)], strict=strict)

    def test_many_missing_names_are_counted(self) -> None:
        net = torch.nn.Sequential(linear(), torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
        with pytest.raises(ClientCodeError, match=r"'0\.weight', '0\.bias', '1\.weight' and 3 more, which"):
            set_parameters(net, {})

    def test_not_strict_loads_the_names_that_both_have(self) -> None:
        net = linear()
        weight = net.weight.tolist()
        set_parameters(net, {"bias": np.full(3, 5, np.float32), "x": np.zeros(1)}, strict=False)
        assert net.bias.tolist() == [5, 5, 5]
        assert net.weight.tolist() == weight


class TestWithoutTorch:
    @pytest.mark.parametrize("name", ["fedbus.training.torch", "fedbus.examples.digits"])
    def test_a_missing_torch_says_what_to_install(self, name: str) -> None:
        code = f"import sys; sys.modules['torch'] = None; import {name}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "UsageError: PyTorch is not installed: pip install 'fedbus[torch]'" in done.stderr

    def test_client_code_without_torch_does_not_import_it(self) -> None:
        code = "import sys, fedbus.training.base, fedbus.training.delta; sys.exit('torch' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def client(partition: int = 0) -> tuple[ClientContext, digits.DigitsClient]:
    context = ClientContext(client_id="c", partition=partition, num_partitions=11)
    made = digits.client_fn(context)
    assert isinstance(made, digits.DigitsClient)
    return context, made


class TestDigits:
    def test_the_models_weights_are_a_function_of_the_seed_alone(self) -> None:
        torch.manual_seed(1)
        state = torch.get_rng_state()
        first = get_parameters(digits.make_model(3))
        assert torch.equal(torch.get_rng_state(), state)
        second, other = get_parameters(digits.make_model(3)), get_parameters(digits.make_model(4))
        assert all(np.array_equal(first[name], second[name]) for name in first)
        assert not all(np.array_equal(first[name], other[name]) for name in first)
        assert sum(array.size for array in first.values()) < 50_000

    def test_the_same_task_gives_the_same_update_on_any_client_object(self) -> None:
        base, config = digits.initial_parameters(), {"local_epochs": 1, "seed": 5, "round": 2}
        one, two = as_client(client()[1]).fit(base, config), as_client(client()[1]).fit(base, config)
        other = as_client(client()[1]).fit(base, {**config, "round": 3})
        assert one.metrics == two.metrics
        assert all(np.array_equal(one.parameters[name], two.parameters[name]) for name in base)
        assert not all(np.array_equal(one.parameters[name], other.parameters[name]) for name in base)

    def test_a_cancelled_client_stops_before_the_next_epoch(self) -> None:
        context, net = client()
        context.cancel()
        base = digits.initial_parameters()
        delta = update_delta(base, as_client(net).fit(base, {}).parameters)
        assert all(not array.any() for array in delta.values())

    def test_partitions_and_test_set_are_disjoint_and_complete(self) -> None:
        clients = [client(partition)[1] for partition in range(11)]
        sizes = [len(each.y) + len(each.test_y) for each in clients]
        train, test = digits._split()
        assert sum(sizes) == len(train)
        assert len(train) + len(test) == 1797
        assert min(sizes) >= 10

    def test_federated_averaging_learns_the_digits(self) -> None:
        model = digits.initial_parameters()
        clients = [as_client(client(partition)[1]) for partition in range(11)]
        before, _ = digits.evaluate_fn(0, model)
        for round in (1, 2, 3):
            results = [each.fit(model, {"round": round}) for each in clients]
            total = sum(result.num_examples for result in results)
            for result in results:
                assert update_delta(model, result.parameters).keys() == model.keys()
            weights = np.array([result.num_examples / total for result in results], np.float32)
            stacks = {name: np.stack([result.parameters[name] for result in results]) for name in model}
            model = {name: np.tensordot(weights, stack, axes=1) for name, stack in stacks.items()}
        loss, metrics = digits.evaluate_fn(3, model)
        assert loss < before / 2
        assert float(metrics["accuracy"]) > 0.85
        evaluated = clients[0].evaluate(model, {})
        assert 0 < evaluated.loss < before
