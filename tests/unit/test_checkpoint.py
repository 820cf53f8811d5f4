"""Files of a run: whole or not there, read by us and by safetensors alike."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path
from typing import IO

import ml_dtypes
import numpy as np
import pytest

from fedbus.errors import ConfigError
from fedbus.server.checkpoint import RunFolder
from fedbus.tensorfile import load_model, map_model, save_model, write_whole
from fedbus.types import Array

DTYPES = [
    *(np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)),
    *(np.dtype(f"f{size}") for size in (2, 4, 8)),
    np.dtype(np.bool_),
    np.dtype(np.complex64),
    np.dtype(ml_dtypes.bfloat16),
]


def odd_model() -> dict[str, Array]:
    """A tensor of every dtype and of every kind of layout, in an order that is not the file's."""
    model: dict[str, Array] = {f"dtype/{dtype}": np.arange(6).reshape(2, 3).astype(dtype) for dtype in DTYPES}
    square = np.arange(12, dtype=np.float64).reshape(3, 4)
    return {
        "scalar": np.array(7, np.int64),
        **model,
        "empty": np.zeros((0, 4), np.float32),
        "big-endian": np.arange(5, dtype=">i4"),
        "fortran": np.asfortranarray(square),
        "strided": square[::2, ::-1],
        "ä tensor": np.ones(1, np.int8),
    }


def test_every_tensor_comes_back_as_it_went_and_in_its_order(tmp_path: Path) -> None:
    model = odd_model()
    save_model(tmp_path / "m", model, {"run_id": "r"})
    mapped, metadata, _ = map_model(tmp_path / "m")
    for read in (mapped, load_model(tmp_path / "m")):
        assert list(read) == list(model)
        for name, value in model.items():
            assert (read[name].dtype, read[name].shape) == (value.dtype.newbyteorder("<"), value.shape)
            assert np.array_equal(read[name], value)
    assert metadata["run_id"] == "r"
    assert not mapped["fortran"].flags.writeable
    assert load_model(tmp_path / "m")["fortran"].flags.writeable
    assert all(value.flags.aligned for value in mapped.values())


def test_the_reader_of_safetensors_reads_the_file(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    load_file = pytest.importorskip("safetensors.numpy").load_file
    model = {name: value for name, value in odd_model().items() if value.dtype not in DTYPES[-2:]}
    save_model(tmp_path / "m", model, {"version": "3"})
    read = load_file(tmp_path / "m")
    assert sorted(read) == sorted(model)
    for name, value in model.items():
        assert (read[name].dtype, read[name].shape) == (value.dtype.newbyteorder("<"), value.shape)
        assert np.array_equal(read[name], value)
    with safetensors.safe_open(tmp_path / "m", framework="numpy") as file:
        assert file.metadata()["version"] == "3"


def test_a_file_of_another_writer_without_an_order_is_read(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    save_file({"b": np.ones(2, np.float32), "a": np.zeros((2, 2))}, tmp_path / "m")
    read = load_model(tmp_path / "m")
    assert {name: value.tolist() for name, value in read.items()} == {"b": [1, 1], "a": [[0, 0], [0, 0]]}


def test_a_dtype_that_safetensors_does_not_know_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tensor 'w' is complex128"):
        save_model(tmp_path / "m", {"w": np.zeros(2, np.complex128)}, {})
    assert list(tmp_path.iterdir()) == []


def _header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234",
        struct.pack("<Q", 1 << 60) + b"{}",
        _header(b"{]"),
        _header(b"[]"),
        _header(b'"text"'),
        _header(b"\xff\xfe"),
        _header(b'{"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
        _header(b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"123"),
        _header(b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 4]}}', b"1234"),
        _header(b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"1234"),
        _header(b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]}}', b"1234"),
        _header(b'{"w": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}', b"1234"),
        _header(b'{"w": {"dtype": "F32", "shape": [1]}}', b"1234"),
        _header(b'{"w": 3}', b"1234"),
        _header(b'{"__metadata__": 3, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
        _header(
            b'{"__metadata__": {"order": "[\\"x\\"]"}, "w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
            b"1",
        ),
    ],
)
def test_garbage_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(ConfigError, match="m is not a safetensors file"):
        load_model(tmp_path / "m")


def test_a_file_cut_short_anywhere_is_one_clear_error(tmp_path: Path) -> None:
    save_model(tmp_path / "m", {"a": np.ones(5), "b": np.zeros((0, 4), np.float32)}, {})
    whole = (tmp_path / "m").read_bytes()
    for size in range(len(whole)):
        (tmp_path / "m").write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="m is not a safetensors file"):
            load_model(tmp_path / "m")


def test_a_file_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="m cannot be read: No such file"):
        load_model(tmp_path / "m")


class Crashed(BaseException):
    """The process died here."""


@pytest.mark.parametrize("dies_in", ["write", "fsync", "replace"])
def test_a_crash_while_a_file_is_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str
) -> None:
    path = tmp_path / "file"
    write_whole(path, lambda file: file.write(b"old"))

    def crash(*_: object) -> None:
        raise Crashed

    def write(file: IO[bytes]) -> None:
        file.write(b"half of the n")
        if dies_in == "write":
            raise Crashed

    if dies_in == "fsync":
        monkeypatch.setattr(os, "fsync", crash)
    if dies_in == "replace":
        monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(Crashed):
        write_whole(path, write)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_disk_before_it_takes_its_name_and_the_name_before_we_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noting_fsync(descriptor: int) -> None:
        said.append(
            "fsync " + re.sub(r"\.[0-9a-f]{8}$", ".RANDOM", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        )
        fsync(descriptor)

    def noting_replace(path: Path, target: Path) -> Path:
        said.append(f"replace {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    write_whole(tmp_path / "file", lambda file: file.write(b"new"))
    assert said == ["fsync .file.RANDOM", "replace file", f"fsync {tmp_path.name}"]


# ---- the folder ------------------------------------------------------------------------------------------------------


def version(number: int) -> dict[str, Array]:
    return {"w": np.full(3, number, np.float32)}


def checkpoints(path: Path) -> list[str]:
    return sorted(file.name for file in (path / "checkpoints").iterdir())


def test_the_version_that_the_ledger_knows_stays_until_it_knows_the_next(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_checkpoint(version(1), run_id="r", version=1)
    folder.settle_checkpoint(1)
    folder.save_checkpoint(version(2), run_id="r", version=2)
    assert checkpoints(tmp_path) == ["model-1.safetensors", "model-2.safetensors"]
    assert load_model(tmp_path / "model.safetensors")["w"].tolist() == [1, 1, 1]
    folder.settle_checkpoint(2)
    assert checkpoints(tmp_path) == ["model-2.safetensors"]
    assert load_model(tmp_path / "model.safetensors")["w"].tolist() == [2, 2, 2]
    assert folder.load_checkpoint(2, run_id="r")["w"].tolist() == [2, 2, 2]


def test_a_checkpoint_that_is_mapped_stays_readable_when_the_next_is_settled(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_checkpoint(version(1), run_id="r", version=1)
    folder.settle_checkpoint(1)
    mapped = folder.load_checkpoint(1, run_id="r")
    folder.save_checkpoint(version(2), run_id="r", version=2)
    folder.settle_checkpoint(2)
    assert mapped["w"].tolist() == [1, 1, 1]


def test_what_a_crash_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.save_checkpoint(version(1), run_id="r", version=1)
    (tmp_path / "checkpoints" / ".model-2.safetensors.99").write_bytes(b"half")
    folder.settle_checkpoint(1)
    assert checkpoints(tmp_path) == ["model-1.safetensors"]


@pytest.mark.parametrize(("run_id", "number"), [("another", 1), ("r", 2)])
def test_a_checkpoint_of_another_run_or_version_is_refused(tmp_path: Path, run_id: str, number: int) -> None:
    folder = RunFolder(tmp_path)
    folder.save_checkpoint(version(1), run_id=run_id, version=number)
    (tmp_path / "checkpoints" / f"model-{number}.safetensors").rename(tmp_path / "checkpoints" / "model-1.safetensors")
    with pytest.raises(ConfigError, match="is not version 1 of run r"):
        folder.load_checkpoint(1, run_id="r")


def test_a_folder_is_held_by_one_server_at_a_time(tmp_path: Path) -> None:
    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.hold()
    with pytest.raises(ConfigError, match=f"another server .pid {os.getpid()}. works on"):
        second.hold()
    first.close()
    second.hold()
    second.close()


@pytest.mark.parametrize("name", ["history.json", "ledger.sqlite"])
def test_a_folder_with_a_run_is_refused_unless_it_is_resumed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match="holds a run already"):
        RunFolder(tmp_path)
    assert RunFolder(tmp_path, resume=True).path == tmp_path


def test_a_folder_that_cannot_be_written_is_refused_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run")
