"""`fedbus bench codecs` and `fedbus bench compression`: what they tell, without the hours."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from fedbus.bench import codecs, compression
from fedbus.cli.bench import bench_app
from fedbus.errors import ConfigError
from fedbus.server.history import Evaluation, FoldedUpdate, History, RoundRecord
from fedbus.wire.compression import Codec


def test_every_codec_is_timed_and_smaller_by_what_it_should_be() -> None:
    done = CliRunner().invoke(bench_app, ["codecs", "--mib", "0.5", "--json"])
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    ratios = {row["codec"]: row["ratio"] for row in found["codecs"]}
    assert tuple(ratios) == codecs.CODECS
    due = {"float16": 2, "int8": 3.97, "qsgd:7": 7.88, "topk:0.01": 66, "topk:0.01+int8": 131, "zstd": 1.19}
    assert {text: ratios[text] for text in due} == pytest.approx(due, rel=0.02)
    assert all(row["encode_gib_s"] > 0 and row["decode_gib_s"] > 0 for row in found["codecs"])
    assert found["memcpy_gib_s"] > 0


@pytest.mark.parametrize("mib", [0, -1, 5000])
def test_a_size_that_makes_no_sense_is_refused(mib: float) -> None:
    with pytest.raises(ConfigError, match="--mib"):
        next(codecs.bench_codecs(mib))


def test_codecs_of_the_table_are_codecs() -> None:
    for text in (*codecs.CODECS, *compression.CODECS):
        assert Codec.parse(text).text == text
    assert compression.CODECS[0] == "", "what the others are compared with"


def test_a_run_in_figures_by_hand() -> None:
    def round_(number: int, accuracy: float | None, nbytes: int) -> RoundRecord:
        folded = [
            FoldedUpdate(client_id=name, staleness=0, num_examples=1, metrics={}, nbytes=nbytes, raw_bytes=1000)
            for name in ("a", "b")
        ]
        central = None if accuracy is None else Evaluation(loss=0.0, metrics={"accuracy": accuracy})
        return RoundRecord(
            round=number, version=number, reason="cohort_done", opened_s=0, seconds=1, cohort=["a", "b"],
            folded=folded, unfinished=[], lost=[], failed={}, refused={}, fit_metrics={}, central=central,
        )  # fmt: skip

    history = History(run_id="r", rounds=[round_(1, 0.9, 100), round_(2, None, 200), round_(3, 0.8, 300)])
    assert compression._outcome("int8", history) == compression.Outcome(
        codec="int8", rounds=3, bytes_per_update=200, bytes_per_round=400, ratio=5, accuracy=0.8, best=0.9
    )


async def test_a_codec_that_cannot_be_is_refused_before_anything_starts() -> None:
    runs = compression.bench_compression(clients=2, rounds=1, seed=0, codecs=("", "gzip"), broker=None, run_dir=None)
    with pytest.raises(ConfigError, match="no codec 'gzip'"):
        await anext(runs)
