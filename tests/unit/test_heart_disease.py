"""The heart-disease files, and the regression on them; the patients are made up, but for the last class."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from fedbus.data.heart_disease import HOSPITALS, Hospital, Scale, data_folder, load_hospital
from fedbus.data.sources import Dataset
from fedbus.errors import ConfigError
from fedbus.examples.heart_disease import (
    HospitalClient,
    gradients_of,
    initial_parameters,
    make_app,
    measure,
)
from fedbus.training.base import ClientContext
from fedbus.types import Array, Config
from tests.kit import HEART_DISEASE

HEADER = "age,sex,cp,trestbps,chol,fbs,restecg,thalach,exang,oldpeak,slope,ca,thal,target"


def write(folder: Path, *rows: str, header: str = HEADER) -> Path:
    folder.mkdir(exist_ok=True)
    for name in HOSPITALS:
        (folder / f"{name}.csv").write_text("\n".join([header, *rows]) + "\n")
    return folder


def rows(count: int) -> list[str]:
    """Patients of increasing age, every third of them ill."""
    return [f"{40 + n},1,{1 + n % 4},120,200,0,{n % 3},150,0,1.5,?,,?,{3 * (n % 3 == 0)}" for n in range(count)]


def client_of(hospital: Hospital) -> HospitalClient:
    return HospitalClient(ClientContext(client_id="c", partition=2, num_partitions=4), hospital)


class TestFiles:
    def test_columns_are_picked_levels_told_apart_and_any_disease_is_one(self, tmp_path: Path) -> None:
        ill = "63,1,3,145,233,1,2,150,0,2.3,?,?,?,1"
        well = "50.0,0,1,120,200,0,0,160,1,.5,1,0,3,0"
        hospital = load_hospital("va", write(tmp_path, *[ill] * 3, *[well] * 3))
        everyone = np.concatenate([hospital.train.x, hospital.test.x])
        labels = [*hospital.train.y, *hospital.test.y]
        assert {(*x, int(y)) for x, y in zip(everyone.tolist(), labels, strict=True)} == {
            # age, sex, trestbps, chol, fbs, thalach, exang, oldpeak; cp 2, 3, 4; restecg 1, 2; ill
            (63, 1, 145, 233, 1, 150, 0, 2.3, 0, 1, 0, 0, 1, 1),
            (50, 0, 120, 200, 0, 160, 1, 0.5, 0, 0, 0, 0, 0, 0),
        }

    def test_patients_with_missing_values_are_left_out(self, tmp_path: Path) -> None:
        gaps = ["63,1,3,?,233,1,2,150,0,2.3,1,0,6,1", "63,1,3,145,,1,2,150,0,2.3,1,0,6,1"]
        hospital = load_hospital("va", write(tmp_path, *rows(9), *gaps))
        assert len(hospital.train) + len(hospital.test) == 9

    def test_two_thirds_train_each_class_alike_and_always_the_same(self, tmp_path: Path) -> None:
        folder = write(tmp_path, *rows(60))
        one, other = load_hospital("va", folder), load_hospital("va", folder)
        assert (len(one.train), len(one.test)) == (39, 21)
        assert (one.train.y.sum(), one.test.y.sum()) == (13, 7)
        np.testing.assert_array_equal(one.train.x, other.train.x)
        assert not set(one.train.x[:, 0]) & set(one.test.x[:, 0])

    @pytest.mark.parametrize(("ill", "is_stratified"), [(1, False), (2, False), (3, True)])
    def test_a_class_of_two_at_the_most_is_not_stratified(self, tmp_path: Path, ill: int, is_stratified: bool) -> None:
        labels = [int(number < ill) for number in range(10)]
        patients = [row[:-1] + str(label) for row, label in zip(rows(10), labels, strict=True)]
        hospital = load_hospital("va", write(tmp_path, *patients))
        train, test = train_test_split(
            np.arange(40, 50),
            train_size=0.66,
            test_size=0.34,
            random_state=43,
            stratify=labels if is_stratified else None,
        )
        assert hospital.train.x[:, 0].tolist() == train.tolist()
        assert hospital.test.x[:, 0].tolist() == test.tolist()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "age,sex\n63,1\n",
                "has no column trestbps, chol, .*, cp, restecg, target: is it a heart-disease file",
            ),
            (f"{HEADER}\n" + rows(1)[0].replace("120", "high"), "holds something that is no number"),
            (f"{HEADER}\n" + rows(1)[0].replace("120", "?"), "has no row without missing values"),
            (f"{HEADER}\n63,1,3\n", "has no row without missing values"),
        ],
    )
    def test_a_file_that_is_something_else_is_told_in_one_line(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "va.csv").write_text(text)
        with pytest.raises(ConfigError, match=f"va.csv {message}"):
            load_hospital("va", tmp_path)

    def test_the_folder_is_that_of_the_argument_or_the_environment(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("FEDBUS_HEART_DISEASE", raising=False)
        with pytest.raises(ConfigError, match="Set FEDBUS_HEART_DISEASE to the folder of"):
            data_folder()
        with pytest.raises(ConfigError, match=r"has no cleveland\.csv, hungarian\.csv, switzerland\.csv, va\.csv: the"):
            data_folder(tmp_path)
        monkeypatch.setenv("FEDBUS_HEART_DISEASE", str(write(tmp_path / "files", *rows(9))))
        assert data_folder() == data_folder(tmp_path / "files") == tmp_path / "files"


class TestRegression:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 13))
    y = rng.integers(0, 2, 7)

    def test_the_gradient_is_that_of_the_loss(self) -> None:
        weights = {"weight": self.rng.normal(size=(1, 13)), "bias": np.array([0.3])}
        gradients = gradients_of(weights, self.x, self.y)
        for name, value in weights.items():
            for at in np.ndindex(value.shape):
                ends = []
                for step in (1e-5, -1e-5):
                    nearby = {**weights, name: value.copy()}
                    nearby[name][at] += step
                    ends.append(measure(nearby, self.x, self.y)[0])
                assert gradients[name][at] == pytest.approx((ends[0] - ends[1]) / 2e-5, abs=1e-8)

    def test_loss_and_accuracy_by_hand(self) -> None:
        weights = {"weight": np.zeros((1, 13)), "bias": np.array([np.log(3)])}  # a probability of 3/4 for everyone
        loss, accuracy = measure(weights, np.zeros((4, 13)), np.array([1, 1, 1, 0]))
        assert accuracy == 0.75
        assert loss == pytest.approx(-(3 * np.log(0.75) + np.log(0.25)) / 4)

    def test_the_model_begins_as_pytorch_makes_it(self) -> None:
        import torch

        state = torch.get_rng_state()
        begun = initial_parameters(43)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(43)
        layer = torch.nn.Linear(13, 1)
        np.testing.assert_array_equal(begun["weight"], layer.weight.detach().numpy())
        np.testing.assert_array_equal(begun["bias"], layer.bias.detach().numpy())

    def test_a_scale_is_of_what_it_was_taken_of(self) -> None:
        scale = Scale.of(self.x)
        np.testing.assert_allclose(scale.apply(self.x).std(axis=0, ddof=1), 1, rtol=1e-6)
        assert np.isfinite(Scale.of(np.ones((3, 2))).apply(np.zeros((1, 2)))).all()


class TestClient:
    config: ClassVar[Config] = {"lr": 0.1, "num_updates": 5, "batch_size": 4, "seed": 42, "round": 1}

    def client(self, size: int = 10) -> HospitalClient:
        rng = np.random.default_rng(1)
        data = Dataset(rng.normal(size=(size, 13)), rng.integers(0, 2, size))
        return client_of(Hospital("h", data, data))

    def batches(self, client: HospitalClient, round: int, seed: int = 42) -> list[list[int]]:
        config = {**self.config, "round": round, "seed": seed}
        return [batch.tolist() for batch in client._batches(config)]

    def test_batches_go_through_all_patients_and_on_where_the_last_round_ended(self) -> None:
        client = self.client()
        first, second = self.batches(client, 1), self.batches(client, 2)
        assert [len(batch) for batch in first + second] == [4, 4, 2, 4, 4, 2, 4, 4, 2, 4]
        for epoch in (first[:3], [*first[3:], second[0]], second[1:4]):
            assert sorted(itertools.chain.from_iterable(epoch)) == list(range(10))
        assert self.batches(client, 2) == second
        assert self.batches(client, 1, seed=43) != first

    def test_a_fit_is_so_many_steps_of_sgd(self) -> None:
        client = self.client()
        model: dict[str, Array] = initial_parameters(0)
        result = client.fit(model, self.config)
        weights = {name: value.astype(np.float64) for name, value in model.items()}
        for batch in self.batches(client, 1):
            for name, gradient in gradients_of(weights, client.x[batch], client.y[batch]).items():
                weights[name] -= 0.1 * gradient
        for name, value in weights.items():
            np.testing.assert_allclose(result.parameters[name], value)
        assert result.num_examples == 10

    def test_four_hospitals_are_four_clients(self, tmp_path: Path) -> None:
        app = make_app(data=write(tmp_path, *rows(12)))
        with pytest.raises(ConfigError, match="there are 4 hospitals: as many clients, not 5"):
            app.client_fn(ClientContext(client_id="c", num_partitions=5))
        client = app.client_fn(ClientContext(client_id="c", partition=1, num_partitions=4))
        assert isinstance(client, HospitalClient)
        assert client.evaluate(initial_parameters(0), {}).num_examples == len(client.test)
        assert app.evaluate_fn is not None
        evaluated = app.evaluate_fn(1, initial_parameters(0))
        assert evaluated is not None
        assert 0 <= float(evaluated[1]["accuracy"]) <= 1


@pytest.mark.skipif(not HEART_DISEASE.is_dir(), reason="the heart-disease files are not here")
class TestRealFiles:
    def test_the_sizes_are_those_of_flamby(self) -> None:
        hospitals = [load_hospital(name, data_folder(HEART_DISEASE)) for name in HOSPITALS]
        sizes = [(len(hospital.train), len(hospital.test)) for hospital in hospitals]
        assert sizes == [(199, 104), (172, 89), (30, 16), (85, 45)]
        assert {hospital.train.x.shape[1] for hospital in hospitals} == {13}
