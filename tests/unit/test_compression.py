"""Codecs: what their names mean, what they make of tensors, and the way back, against numbers done by hand."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbus.errors import ClientCodeError, ConfigError, DecodeError
from fedbus.types import Array, Tensors
from fedbus.wire.arrays import DTYPES, schema_of
from fedbus.wire.compression import Codec, DecodedPieces, Encoded, Layout, encode
from fedbus.wire.floats import BLOCK, BUCKET, Halves, Levels, Noise, Numbers, to_float16
from fedbus.wire.transfer import Outgoing, PartedTensors

NOISE = ("seed", 1)
LOSSY = ("float16", "bfloat16", "int8", "qsgd:1", "qsgd:7", "qsgd:100", "topk:0.01", "topk:0.3+int8", "topk:0.1+qsgd:3")


def decoded(encoded: Encoded, part_bytes: int = 1 << 20) -> DecodedPieces:
    """What a receiver makes of it."""
    parted = PartedTensors(encoded.layout.coded, part_bytes)
    outgoing = Outgoing(encoded.tensors, part_bytes)
    parted._parts = [memoryview(b"".join(outgoing.part(index))) for index in range(outgoing.parts)]
    return DecodedPieces(parted, Layout(encoded.layout.codec, encoded.layout.schema))


def there_and_back(text: str, tensors: Tensors, *, seed: int = 0, residual: Tensors | None = None) -> dict[str, Array]:
    return dict(decoded(encode(Codec.parse(text), tensors, Noise(*NOISE, seed), residual)))


def floats(*values: float) -> Array:
    return np.array(values, np.float32)


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*LOSSY, "", "zstd", "zstd:19", "zstd:-7", "int8+zstd", "topk:0.01+float16+zstd:3"])
def test_a_codec_is_known_by_its_name(text: str) -> None:
    codec = Codec.parse(text)
    assert codec.text == text
    assert codec == Codec.parse(text)
    assert codec.is_lossy == (text not in ("", "zstd", "zstd:19", "zstd:-7"))
    assert codec.needs_memory == text.startswith("topk")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("gzip", "there is no codec 'gzip' (in 'gzip'): take float16, "),
        ("float16+", "there is no codec ''"),
        ("int8+float16", "does the same twice: leave 'float16' out"),
        ("zstd+zstd", "does the same twice"),
        ("zstd+int8", "wrong order"),
        ("int8+topk:0.1", "wrong order"),
        ("topk", "'topk': topk takes the share of numbers to keep, as topk:0.01"),
        ("topk:0", "0.5 at most"),
        ("topk:0.6", "0.5 at most"),
        ("topk:nan", "0.5 at most"),
        ("topk:one", "0.5 at most"),
        ("int8:4", "int8 takes no argument"),
        ("qsgd", "qsgd takes its number of levels"),
        ("qsgd:0", "1 to 127"),
        ("qsgd:128", "1 to 127"),
        ("zstd:20", "a whole number from -7 to 19"),
        ("zstd:", "a whole number from -7 to 19"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Codec.parse(text)
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_must_arrive_as_it_is_keeps_the_lossless_stage() -> None:
    assert Codec.parse("topk:0.1+int8+zstd:3").without_loss() == Codec.parse("zstd:3")
    assert Codec.parse("int8").without_loss() == Codec.parse("")


# ---- halves ----------------------------------------------------------------------------------------------------------


def test_float16_is_rounded_as_numpy_does_it() -> None:
    exponents = np.arange(1 << 9, dtype=np.uint32) << 23
    fractions = [0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2FFF, 0x3000, 0x3001, 0x400000, 0x7FFFFF, 0x7FF000]
    with np.errstate(over="ignore"):
        for fraction in fractions:
            values = (exponents | fraction).view(np.float32)
            values = np.ascontiguousarray(values[np.isfinite(values)])
            np.testing.assert_array_equal(to_float16(values).view(np.uint16), values.astype(np.float16).view(np.uint16))


def test_halves_keep_what_they_hold() -> None:
    held = floats(0.5, -65504, 2**-24, 1.5 * 2**-14, 0)
    np.testing.assert_array_equal(there_and_back("float16", {"w": held})["w"], held)
    held = floats(1.5, -(2.0**100), 2**-126, 0, 3)
    np.testing.assert_array_equal(there_and_back("bfloat16", {"w": held})["w"], held)


@pytest.mark.parametrize(("text", "value"), [("float16", 65520.0), ("bfloat16", 3.4e38)])
def test_what_a_half_cannot_hold_is_an_error_that_says_so(text: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"too large for {text}"):
        there_and_back(text, {"w": floats(1, value, 3)})


@pytest.mark.parametrize("text", LOSSY)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_diverged_training_is_told_by_its_tensor(text: str, value: float) -> None:
    with pytest.raises(ClientCodeError, match="tensor 'w' holds NaN or infinite values: did the training diverge"):
        there_and_back(text, {"v": floats(1, 2, 3), "w": np.array([1.0, value, 2.0] * 9)})


# ---- levels ----------------------------------------------------------------------------------------------------------


def test_whole_steps_of_int8_come_back_as_they_went() -> None:
    steps = np.zeros(2 * BUCKET, np.float32)
    steps[0:4], steps[BUCKET : BUCKET + 2] = (127, -3, 1, 64), (-254, 2)  # steps of 1, and of 2
    np.testing.assert_array_equal(there_and_back("int8", {"w": steps})["w"], steps)


def test_qsgd_by_hand() -> None:
    """||(3, 4)|| = 5, with 5 levels: 3 of them and 4; each is exact, so nothing is drawn."""
    encoded = encode(Codec.parse("qsgd:5"), {"w": floats(3, -4, *[0] * 30)}, Noise(*NOISE))
    np.testing.assert_array_equal(encoded.tensors["#steps"], [1.0])
    assert encoded.tensors["w"][:2].tolist() == [(3 + 5) | (-4 + 5) << 4, 5 | 5 << 4]  # counted from -5, four bits each
    np.testing.assert_array_equal(decoded(encoded)["w"][:3], [3, -4, 0])


def test_qsgd_with_one_level_is_a_sign_or_nothing() -> None:
    v = np.random.default_rng(0).normal(size=3 * BUCKET).astype(np.float32)
    encoded = encode(Codec.parse("qsgd:1"), {"w": v}, Noise(*NOISE))
    assert encoded.tensors["w"].nbytes == v.size // 4
    for bucket, got in zip(v.reshape(3, -1), decoded(encoded)["w"].reshape(3, -1), strict=True):
        norm = np.float32(np.linalg.norm(bucket.astype(np.float64)))
        assert set(np.unique(got)) == {-norm, 0.0, norm}
        assert (got * bucket >= 0).all()


@pytest.mark.parametrize("numbers", [Levels(127, "max"), Levels(127, "l2"), Levels(7, "l2"), Levels(1, "l2")])
def test_rounding_at_random_is_unbiased_and_its_variance_bounded(numbers: Levels) -> None:
    v = (np.random.default_rng(3).normal(size=BUCKET) ** 3).astype(np.float32)
    draws = 400
    got = np.stack([round_trip(numbers, v, seed) for seed in range(draws)]).astype(np.float64)
    step = float(numbers.encode(v, Noise(0))[0][0])
    away = np.abs(got.mean(axis=0) - v)
    assert (away <= 6 * step * np.sqrt(0.25 / draws)).all(), "a mean is off by more than six standard errors"
    assert abs((got.mean(axis=0) - v).mean()) <= 5 * step * np.sqrt(0.25 / draws / BUCKET)
    assert (np.abs(got - v) <= step * (1 + 1e-5)).all(), "rounded to one of the two next to it"
    squares = ((got - v) ** 2).sum(axis=1).mean()
    assert squares <= BUCKET * step**2 / 4 * 1.01
    if numbers.norm == "l2":  # lemma 3.1 of Alistarh et al. 2017
        s, d = numbers.levels, BUCKET
        assert squares <= min(d / s**2, math.sqrt(d) / s) * float(v @ v) * 1.05


def round_trip(numbers: Numbers, values: Array, seed: int) -> Array:
    steps, body = numbers.encode(values, Noise(seed))
    return numbers.decode(body, 0, steps)[1][: values.size]


def test_the_same_task_done_twice_gives_the_same_bytes() -> None:
    w = np.random.default_rng(0).normal(size=5000).astype(np.float32)

    def body(*noise: Any) -> bytes:
        return encode(Codec.parse("int8"), {"w": w}, Noise(*noise)).tensors["w"].tobytes()

    assert body(0, 1, 0, "c1") == body(0, 1, 0, "c1")
    assert len({body(0, 1, 0, "c1"), body(1, 1, 0, "c1"), body(0, 2, 0, "c1"), body(0, 1, 0, "c2")}) == 4


@pytest.mark.parametrize("text", ["int8", "qsgd:7", "qsgd:100"])
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-37, 1e-30, 1e19, 3e38])
def test_the_smallest_and_the_largest_numbers_stay_finite(text: str, scale: float) -> None:
    v = (np.linspace(-1, 1, 2 * BUCKET) * scale).astype(np.float32)
    if scale == 3e38 and text == "qsgd:7":  # the step of that norm is no float32
        with pytest.raises(ConfigError, match="too large for the scales"):
            there_and_back(text, {"w": v})
        return
    got = there_and_back(text, {"w": v})["w"]
    assert np.isfinite(got).all()
    assert float(np.abs(got).max()) <= float(np.abs(v).max()) * math.sqrt(BUCKET) * 1.01


# ---- the largest -----------------------------------------------------------------------------------------------------


def test_top_k_by_hand() -> None:
    encoded = encode(Codec.parse("topk:0.25"), {"w": floats(3, -5, 0.5, 4), "v": floats(1, -4.5, 0, 2)}, Noise(*NOISE))
    assert encoded.tensors["#counts"].tolist() == [1, 1]
    assert encoded.tensors["#gaps"].tolist() == [1, 1]
    assert encoded.tensors["#values"].tolist() == [-5, -4.5]
    got = decoded(encoded)
    assert got["w"].tolist() == [0, -5, 0, 0]
    assert got["v"].tolist() == [0, -4.5, 0, 0]
    assert encoded.residual["w"].tolist() == [3, 0, 0.5, 4]
    assert encoded.residual["v"].tolist() == [1, 0, 0, 2]


def test_of_equal_ones_the_first_are_kept() -> None:
    got = there_and_back("topk:0.5", {"w": floats(1, -1, 1, 1, 2, -1)})["w"]
    assert got.tolist() == [1, -1, 0, 0, 2, 0]


def test_places_are_counted_in_blocks_that_each_tensor_begins_anew() -> None:
    w, v = np.zeros(2 * BLOCK + 10, np.float32), np.zeros(60, np.float32)
    w[[0, BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 9]], v[0] = (1, 2, 3, 4), 5
    share = 5 / (w.size + v.size)
    encoded = encode(Codec.parse(f"topk:{share!r}"), {"w": w, "v": v}, Noise(*NOISE))
    assert encoded.tensors["#counts"].tolist() == [2, 0, 2, 1]
    assert encoded.tensors["#gaps"].tolist() == [0, BLOCK - 2, 0, 8, 0]
    assert encoded.tensors["#gaps"].dtype == np.uint16
    got = decoded(encoded)
    np.testing.assert_array_equal(got["w"], w)
    np.testing.assert_array_equal(got["v"], v)


@pytest.mark.parametrize("text", ["topk:0.05", "topk:0.05+float16", "topk:0.05+int8", "topk:0.05+qsgd:7"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16", "complex64"])
def test_what_was_sent_and_what_is_left_are_what_was_to_be_sent(text: str, dtype: str) -> None:
    """Error feedback: sum of sent + residual = sum of deltas, but for the roundings of float32."""
    rng = np.random.default_rng(0)
    residual: dict[str, Array] = {}
    sent = meant = np.zeros(200, np.complex128)
    for seed in range(30):
        delta = {"w": rng.normal(size=200).astype(dtype)}
        encoded = encode(Codec.parse(text), delta, Noise(seed), residual)
        residual = dict(encoded.residual)
        sent, meant = sent + decoded(encoded)["w"], meant + delta["w"]
    left = residual["w"].view(np.complex64) if dtype == "complex64" else residual["w"]
    np.testing.assert_allclose(sent + left, meant, rtol=0, atol=2e-5)
    assert np.abs(left).max() > 0.5, "something is left to be told from nothing"


def test_plain_top_k_loses_no_bit() -> None:
    rng = np.random.default_rng(0)
    before = {"w": rng.normal(size=1000).astype(np.float32)}
    delta = {"w": rng.normal(size=1000).astype(np.float32)}
    encoded = encode(Codec.parse("topk:0.1"), delta, Noise(0), before)
    np.testing.assert_array_equal(decoded(encoded)["w"] + encoded.residual["w"], before["w"] + delta["w"])


def test_a_residual_of_another_size_is_of_another_model() -> None:
    encoded = encode(Codec.parse("topk:0.5"), {"w": floats(1, 2)}, Noise(0), {"w": floats(9, 9, 9)})
    assert encoded.residual["w"].tolist() == [1, 0]


GOOD = {"w": np.arange(1, 2 * BLOCK + 1, dtype=np.float32)[::-1]}


@pytest.mark.parametrize(
    ("name", "at", "value"),
    [
        ("#counts", 0, 5),
        ("#counts", 0, 0),
        ("#counts", 1, BLOCK + 1),
        ("#gaps", 1, BLOCK - 1),
        ("#gaps", 3, BLOCK - 3),
        ("#gaps", 7, BLOCK - 3),
    ],
)
def test_places_that_do_not_fit_are_refused(name: str, at: int, value: int) -> None:
    encoded = encode(Codec.parse(f"topk:{8 / GOOD['w'].size!r}"), GOOD, Noise(0), None)
    encoded.tensors["#counts"][:], encoded.tensors["#gaps"][:] = (4, 4), (0, 0, 0, 0, 0, 0, 0, BLOCK - 4)
    decoded(encoded).check()  # the last place of all
    encoded.tensors[name][at] = value
    with pytest.raises(DecodeError, match="of top-k"):
        decoded(encoded).check()


# ---- tensors ---------------------------------------------------------------------------------------------------------


def test_what_travels_follows_from_the_schema_and_the_codec() -> None:
    mixed: dict[str, Array] = {
        "conv": np.ones((3, 100), np.float32),
        "steps": np.array(7),
        "mask": np.ones(9, np.int8),
        "extra/c": np.ones(500, np.float32),
        "none": np.ones((0, 4), np.float32),
        "half": np.ones(40, np.float16),
    }

    def kinds(text: str) -> list[tuple[str, str, tuple[int, ...]]]:
        return [(spec.name, spec.dtype, spec.shape) for spec in Layout(Codec.parse(text), schema_of(mixed)).coded]

    as_it_is = [("steps", "<i8", ()), ("mask", "|i1", (9,)), ("extra/c", "<f4", (500,)), ("none", "<f4", (0, 4))]
    assert kinds("zstd") == [("conv", "<f4", (3, 100)), *as_it_is, ("half", "<f2", (40,))]
    assert kinds("bfloat16") == [("conv", "bfloat16", (300,)), *as_it_is, ("half", "<f2", (40,))]
    assert kinds("int8") == [("#steps", "<f4", (2,)), ("conv", "|i1", (300,)), *as_it_is, ("half", "|i1", (40,))]
    front = [("#counts", "<u4", (2,)), ("#gaps", "<u2", (34,)), ("#steps", "<f4", (1,)), ("#values", "|u1", (17,))]
    assert kinds("topk:0.1+qsgd:7") == [*front, *as_it_is]


def test_a_tensor_that_takes_a_name_of_ours_cannot_travel_so() -> None:
    tensors = {"#steps": np.ones(600, np.float32)}
    assert there_and_back("float16", tensors)["#steps"].shape == (600,)
    with pytest.raises(ConfigError, match="a tensor named '#steps' cannot travel as int8: rename it"):
        there_and_back("int8", tensors)


def test_a_number_alone_is_not_made_larger() -> None:
    one = {"b": np.array(0.3, np.float32)}
    assert there_and_back("int8", one) == one


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Array]:
    sizes = st.sampled_from([0, 1, 2, 3, 63, 64, 511, 512, 513, 1500])
    dtypes = ["float32", "float64", "float16", "bfloat16", "complex64", "complex128", "int64", "int8"]
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    made = {}
    for number in range(draw(st.integers(1, 5))):
        shape = (draw(sizes),) if draw(st.booleans()) else (draw(st.integers(0, 3)), draw(sizes))
        made[f"t{number}"] = (3 * rng.normal(size=shape)).astype(draw(st.sampled_from(dtypes)))
    return made


@settings(max_examples=150, deadline=None)
@given(tensors(), st.sampled_from(LOSSY), st.sampled_from([64, 192, 1024, 1 << 20]))
def test_every_element_comes_back_once_and_near(given_: dict[str, Array], text: str, run: int) -> None:
    encoded = encode(Codec.parse(text), given_, Noise(*NOISE))
    assert schema_of(encoded.tensors) == encoded.layout.coded
    got = decoded(encoded, run)
    got.check()
    walked: dict[str, list[Array]] = {}
    for name, start, values in got.peek():
        assert start == sum(part.size for part in walked.setdefault(name, []))
        assert values.dtype == given_[name].dtype
        walked[name].append(values)
    assert list(got) == list(given_)
    assert set(walked) == set(given_)
    for name, value in given_.items():
        whole = got[name]
        assert (whole.shape, whole.dtype) == (value.shape, value.dtype)
        np.testing.assert_array_equal(np.concatenate(walked[name]), whole.reshape(-1))
        if name not in encoded.layout.rounded:
            np.testing.assert_array_equal(whole, value)
        elif text in ("float16", "bfloat16", "int8"):
            near = {"float16": 2**-11, "bfloat16": 2**-8, "int8": 0.25}[text]
            away = np.abs(whole.astype(np.complex128) - value.astype(np.complex128))
            assert (away <= near * (1 + np.abs(value).astype(np.float64))).all()
    assert [(name, start) for name, start, _ in got.pieces()], "walked for good"
    if encoded.layout.coded[0].nbytes:
        with pytest.raises(KeyError, match="gone"):
            list(got.peek())


@pytest.mark.parametrize("dtype", [">f4", ">f8"])
def test_numbers_of_the_other_byte_order_come_back_in_theirs(dtype: str) -> None:
    value = np.arange(700, dtype=dtype)
    got = there_and_back("bfloat16", {"w": value})["w"]
    assert got.dtype == DTYPES[dtype]
    np.testing.assert_allclose(got, value, rtol=2**-8)


def test_bfloat16_has_the_dtype_of_the_models() -> None:
    assert DTYPES[Halves("bfloat16").dtype] == np.dtype(ml_dtypes.bfloat16)
