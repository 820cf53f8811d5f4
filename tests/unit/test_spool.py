"""The updates of a round on disk: what is read is what came, in an order of its own, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fedbus.errors import RunFailed
from fedbus.strategies import blas, spool
from fedbus.strategies.base import ClientUpdate
from fedbus.strategies.gram import gram_matrix, squared_distances
from fedbus.strategies.spool import Block, Spool
from fedbus.types import Array, Piece, Tensors, delta_dtype

DTYPES: list[Any] = ["f2", ml_dtypes.bfloat16, "f4", "f8", "c8", "c16", "i1", "u8", "?"]


def update(client_id: str, delta: Tensors, **settings: Any) -> ClientUpdate:
    return ClientUpdate(client_id=client_id, task_id="t", num_examples=1, delta=delta, **settings)


def filled(model: Tensors, updates: list[ClientUpdate], folder: Path | None = None) -> Spool:
    made = Spool(model, folder)
    for each in updates:
        made.add(each)
    return made


def random_delta(dtype: Any, shape: tuple[int, ...], seed: int) -> Array:
    rng = np.random.default_rng(seed)
    wanted = delta_dtype(np.dtype(dtype))
    return rng.integers(-1, 2, shape).astype(wanted) if wanted.kind == "i" else rng.normal(size=shape).astype(wanted)


def open_files(folder: Path) -> list[str]:
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [link for link in links if link.startswith(str(folder))]


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dtype_and_shape_comes_back_as_it_was(dtype: Any) -> None:
    model: Tensors = {"a": np.zeros((3, 5), dtype), "zero-d": np.zeros((), dtype), "empty": np.zeros((0, 2), dtype)}
    deltas = [{name: random_delta(dtype, value.shape, i) for name, value in model.items()} for i in range(3)]
    read = filled(model, [update(str(i), delta) for i, delta in enumerate(deltas)]).updates()
    for one, delta in zip(read, deltas, strict=True):
        assert list(one.delta) == list(model)
        for name, value in delta.items():
            assert (one.delta[name].dtype, one.delta[name].shape) == (value.dtype, value.shape)
            np.testing.assert_array_equal(one.delta[name], value)


def test_updates_are_in_the_order_of_client_and_task_however_they_came() -> None:
    model = {"w": np.zeros(1)}
    sent = [
        ClientUpdate(client_id=c, task_id=t, num_examples=n, delta={"w": np.full(1, float(n))})
        for n, (c, t) in enumerate([("b", "2"), ("a", "9"), ("b", "10"), ("a", "1")])
    ]
    read = filled(model, sent).updates()
    assert [(one.client_id, one.task_id, float(one.delta["w"][0])) for one in read] == [
        ("a", "1", 3.0),
        ("a", "9", 1.0),
        ("b", "10", 2.0),
        ("b", "2", 0.0),
    ]


def test_all_else_that_an_update_says_stays_with_it() -> None:
    sent = update("a", {"w": np.ones(1)}, staleness=3, discount=0.5, metrics={"loss": 2.0})
    (read,) = filled({"w": np.zeros(1)}, [sent]).updates()
    assert (read.staleness, read.discount, read.metrics, read.num_examples) == (3, 0.5, {"loss": 2.0}, 1)


class InRuns(dict[str, Array]):
    """A delta in pieces of three elements, which are overwritten once they were looked at."""

    def pieces(self) -> Iterator[Piece]:
        for name, value in self.items():
            for start in range(0, value.size, 3):
                piece = value[start : start + 3].copy()
                yield name, start, piece
                piece[...] = 99

    peek = pieces


def test_pieces_are_put_together_and_may_be_read_in_pieces_again() -> None:
    model = {"w": np.zeros(8, np.float32), "v": np.zeros(200_000, np.float32)}
    delta = InRuns({"w": np.arange(8, dtype=np.float32), "v": np.arange(200_000, dtype=np.float32)})
    (read,) = filled(model, [update("a", delta)]).updates()
    for walk in (read.peek, read.pieces, read.pieces):
        whole = {name: np.full(value.size, np.nan, np.float32) for name, value in model.items()}
        for name, start, values in walk():
            whole[name][start : start + values.size] = values
        for name in model:
            np.testing.assert_array_equal(whole[name], delta[name])


def test_extras_are_kept_as_well() -> None:
    extra = {"tau": np.array([3, 4], np.int32), "control": np.ones((2, 2), np.float32)}
    sent = [update(c, {"w": np.full(1, i)}, extra=extra if i else {}) for i, c in enumerate("ab")]
    a, b = filled({"w": np.zeros(1)}, sent).updates()
    assert (list(a.extra), list(b.extra)) == ([], ["tau", "control"])
    for name, value in extra.items():
        np.testing.assert_array_equal(b.extra[name], value)
        assert b.extra[name].dtype == value.dtype
    assert (float(a.delta["w"][0]), float(b.delta["w"][0])) == (0, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 40_000])
def test_blocks_are_the_rows_that_hold_the_tensor_without_a_gap(dtype: Any, size: int) -> None:
    model: Tensors = {"other": np.zeros(3), "w": np.zeros(size, dtype)}
    deltas = [random_delta(dtype, (size,), i) for i in range(4)]
    # The second has no "w"; the last is written first.
    sent = [
        update(str(i), {"w": d, "other": np.ones(3)} if i != 1 else {"other": np.ones(3)}) for i, d in enumerate(deltas)
    ]
    wanted = np.stack([deltas[i] for i in (0, 2, 3)])
    wanted = wanted.view(wanted.real.dtype) if wanted.dtype.kind == "c" else wanted.astype(np.float64)
    if np.dtype(dtype).kind == "b":
        wanted = np.clip(wanted, 0, 1)  # there is no going below False

    def copied(block: Block) -> tuple[list[int], Array]:
        return block.rows, block.values.copy()

    found = [(at, *result) for name, at, result in filled(model, sent[::-1]).reduce(copied) if name == "w"]
    assert [at.start for at, _, _ in found] == [0, *(at.stop for at, _, _ in found[:-1])]
    assert found[-1][0].stop == size
    assert all(rows == [0, 2, 3] for _, rows, _ in found)
    np.testing.assert_array_equal(np.hstack([values for _, _, values in found]), wanted)


def test_only_the_chosen_rows_and_kinds_are_read() -> None:
    model = {"f": np.zeros(2, np.float32), "i": np.zeros(2, np.int32), "h": np.zeros(2, ml_dtypes.bfloat16)}
    sent = [update(str(i), {n: np.full(2, i).astype(delta_dtype(v.dtype)) for n, v in model.items()}) for i in range(5)]
    made = filled(model, sent)
    found = {name: (rows, str(dtype)) for name, _, (rows, dtype) in made.reduce(kinds_of, rows=[1, 3], kinds="f")}
    assert found == {"f": ([1, 3], "float32"), "h": ([1, 3], "float32")}
    wide = {name: str(dtype) for name, _, (_, dtype) in made.reduce(kinds_of, is_wide=True)}
    assert wide == {"f": "float64", "i": "float64", "h": "float64"}


def kinds_of(block: Block) -> tuple[list[int], Any]:
    return block.rows, block.values.dtype


def test_progress_ends_with_all_of_it() -> None:
    told: list[tuple[int, int]] = []
    made = Spool({"w": np.zeros(10_000, np.float32)}, None, lambda done, total: told.append((done, total)))
    for client in "abc":
        made.add(update(client, {"w": np.ones(10_000, np.float32)}))
    made.expect(2 * 3)
    for _ in range(2):
        assert sum(1 for _ in made.reduce(lambda block: None)) > 0
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {total for _, total in told} == {told[-1][0]}


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="only where the system can be asked")
def test_the_disk_is_asked_for_each_byte_once_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_AHEAD_BYTES", 30_000)
    size = 40_000
    made = filled({"w": np.zeros(size, np.float32)}, [update(c, {"w": np.ones(size, np.float32)}) for c in "abc"])
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, count, advice: asked.append((at, at + count)))
    ends = []
    for _, at, _ in made.reduce(lambda block: None):
        ends.append(4 * at.stop)
        assert max(end for _, end in asked) >= 2 * 4 * size + ends[-1]  # of the last of them
    assert len(ends) > 1
    assert asked != sorted(asked)  # side by side, as they are read
    for offset in (each.delta.offset("w") for each in made.updates()):  # type: ignore[attr-defined]
        runs = sorted(run for run in asked if offset <= run[0] < offset + 4 * size)
        assert [run[0] for run in runs] == [offset, *(run[1] for run in runs[:-1])]
        assert runs[-1][1] == offset + 4 * size


# ---- threads ---------------------------------------------------------------------------------------------------------


def test_results_come_in_order_from_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_cores", lambda: 5)
    monkeypatch.setattr(spool, "_ALONE_BYTES", 0)
    delta = np.arange(300_000, dtype=np.float32)
    made = filled({"w": np.zeros(300_000, np.float32)}, [update(c, {"w": delta}) for c in "ab"])
    found = [(at.start, first) for _, at, first in made.reduce(lambda block: float(block.values[1, 0]))]
    assert len(found) > 15
    assert [start for start, _ in found] == [first for _, first in found]
    assert [start for start, _ in found] == sorted(start for start, _ in found)


def test_what_fails_in_a_thread_comes_out_and_the_others_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_ALONE_BYTES", 0)
    made = filled({"w": np.zeros(10**6, np.float32)}, [update("a", {"w": np.zeros(10**6, np.float32)})])
    worked = []

    def work(block: Block) -> None:
        worked.append(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(made.reduce(work))
    assert len(worked) < 30  # of 62
    made.close()


@pytest.mark.skipif(blas._symbol("set_num_threads") is None, reason="numpy has another library here")
def test_linear_algebra_has_its_threads_back_afterwards() -> None:
    threads, set_threads = blas._get_threads(), blas._set_threads()
    before = threads()
    set_threads(2)
    try:
        with blas.calls_in_one_thread():
            with blas.calls_in_one_thread():
                assert threads() == 1
            assert threads() == 1
        assert threads() == 2
    finally:
        set_threads(before)


# ---- the file --------------------------------------------------------------------------------------------------------


def test_the_file_has_no_name_and_goes_with_the_spool(tmp_path: Path) -> None:
    made = filled({"w": np.zeros(9)}, [update("a", {"w": np.ones(9)})], tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert len(open_files(tmp_path)) == 1
    del made  # at once, not when garbage is collected
    assert open_files(tmp_path) == []


def test_a_closed_spool_says_that_the_round_is_over(tmp_path: Path) -> None:
    made = filled({"w": np.zeros(9)}, [update("a", {"w": np.ones(9)})], tmp_path)
    (kept,) = made.updates()
    made.close()
    assert open_files(tmp_path) == []
    with pytest.raises(ValueError, match="the round is over"):
        kept.delta["w"]


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = filled({"w": np.zeros(1 << 18)}, [update("a", {"w": np.ones(1 << 18)})], tmp_path)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(RunFailed) as caught:
        made.add(update("b", {"w": np.ones(1 << 18)}))
    assert str(caught.value) == (
        f"the updates of a round cannot be kept in {tmp_path}: No space left on device; each takes 2.0 MiB there"
    )


def test_a_folder_that_is_not_there_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"cannot be kept in .*missing: No such file"):
        Spool({"w": np.zeros(1)}, tmp_path / "missing")


def test_writes_and_reads_that_come_short_are_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    write, read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:1000], at))
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: read(fd, [into[0][:700]], at))
    delta = np.arange(5000, dtype=np.float32)
    (only,) = filled({"w": delta}, [update("a", {"w": delta})]).updates()
    np.testing.assert_array_equal(only.delta["w"], delta)


def test_memory_does_not_grow_with_the_number_of_updates() -> None:
    size = 1 << 18
    model = {"w": np.zeros(size, np.float32)}
    delta = {"w": np.ones(size, np.float32)}
    made = filled(model, [])
    tracemalloc.start()
    try:
        for index in range(40):
            made.add(update(str(index), delta))
        assert sum(1 for _ in made.reduce(Block.columns_sorted)) > 1
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 40 * size * 4 / 3


# ---- distances -------------------------------------------------------------------------------------------------------


def distances_one_by_one(updates: list[ClientUpdate], model: Tensors) -> Array:
    """Every pair on its own, tensor by tensor."""
    found = np.zeros((len(updates), len(updates)))
    for i, one in enumerate(updates):
        for j, other in enumerate(updates):
            for name, value in model.items():
                if value.dtype.kind in "fcV":
                    zero = np.zeros(value.shape)
                    a = np.asarray(one.delta.get(name, zero)).astype(np.complex128) * one.discount
                    b = np.asarray(other.delta.get(name, zero)).astype(np.complex128) * other.discount
                    found[i, j] += float((np.abs(a - b) ** 2).sum())
    return found


def test_distances_are_those_of_each_pair() -> None:
    shapes = {"f4": (40, 60), "f8": (3,), "f2": (9,), "c8": (5, 5), "i4": (4,), "?": (6,)}
    model: dict[str, Array] = {dtype: np.zeros(shape, dtype) for dtype, shape in shapes.items()}
    model["bf"] = np.zeros(11, ml_dtypes.bfloat16)
    sent = [
        update(
            f"{i:02}",
            {n: random_delta(v.dtype, v.shape, 7 * i + k) for k, (n, v) in enumerate(model.items()) if (i + k) % 5},
            discount=(i % 3 + 1) ** -0.5,
        )
        for i in range(13)
    ]
    found = squared_distances(gram_matrix(filled(model, sent[::-1])))
    np.testing.assert_allclose(found, distances_one_by_one(sent, model), rtol=1e-12, atol=1e-12)


def test_a_huge_update_that_comes_first_takes_nothing_from_the_distances_of_the_others() -> None:
    model = {"w": np.zeros(1000, np.float32)}
    sent = [update(str(i), {"w": random_delta("f4", (1000,), i)}) for i in range(6)]
    sent[0] = update("0", {"w": np.full(1000, 1e15, np.float32)})
    found = squared_distances(gram_matrix(filled(model, sent)))
    np.testing.assert_allclose(found[1:, 1:], distances_one_by_one(sent[1:], model), rtol=1e-12)


def test_updates_that_are_nearly_the_same_have_distances_all_the_same() -> None:
    model = {"w": np.zeros(1000, np.float32)}
    common = random_delta("f4", (1000,), 99)
    sent = [update(str(i), {"w": common + np.float32(1e-3) * random_delta("f4", (1000,), i)}) for i in range(5)]
    found = squared_distances(gram_matrix(filled(model, sent)))
    np.testing.assert_allclose(found, distances_one_by_one(sent, model), rtol=1e-8)
    same = squared_distances(gram_matrix(filled(model, [sent[0], update("x", sent[0].delta)])))
    assert same.max() < 1e-12 * float((common.astype(np.float64) ** 2).sum())
