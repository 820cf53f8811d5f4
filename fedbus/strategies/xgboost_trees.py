"""XGBoost's boosters as the server sees them: checked to the last number, and put together without XGBoost.

A booster is the JSON that `Booster.save_raw("json")` gives (XGBoost 2 and 3; its documentation, "Introduction to Model
IO"). XGBoost's own reader trusts what it reads, and a tree walks wherever its nodes point: so nothing goes to it, here
or on any client, but what `read_booster` has let pass.

Taken are gbtree boosters with numeric splits. The global model is laid out so that its trees come last, and a round's
trees are put behind them without reading the others again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from fedbus.errors import UpdateRefused

MOST_DEPTH: Final = 1000
"""XGBoost walks trees recursively."""
_ROOT: Final = 2**31 - 1
_LARGEST_FLOAT: Final = float(np.finfo(np.float32).max)
_TREES: Final = b'"trees":['
_END: Final = b"]}}}}"
_MOST_FEATURES: Final = 2**24
_MOST_TREES: Final = 10_000
_CHARS_OF_A_TREE: Final = 100
"""Brackets, braces and quotes of one tree are 68, and a few more in other versions of XGBoost."""
_WORD: Final = re.compile(r"[\w:.@+\- ]{0,64}")
_BASE_SCORE: Final = re.compile(r"\[?[-+0-9.eE,]{1,100000}\]?")
_INTEGERS: Final = ("left_children", "right_children", "parents", "split_indices", "default_left", "split_type")
_FLOATS: Final = ("base_weights", "loss_changes", "split_conditions", "sum_hessian")
_CATEGORIES: Final = ("categories", "categories_nodes", "categories_segments", "categories_sizes")


@dataclass(frozen=True, kw_only=True)
class BoosterShape:
    """What boosters that are put together have in common.

    `outputs`: values that are predicted for one row (classes, targets), each with trees of its own; `parallel`: trees
    that an iteration adds to each of them.
    """

    objective: str
    num_feature: int
    outputs: int
    parallel: int

    @property
    def trees(self) -> int:
        """How many an iteration adds."""
        return self.outputs * self.parallel


@dataclass(frozen=True, kw_only=True)
class Booster:
    """A booster whose every number is in its bounds; `outputs_of` says which output each tree is for."""

    shape: BoosterShape
    header: dict[str, Any] = field(repr=False)
    trees: list[dict[str, Any]] = field(repr=False)
    outputs_of: list[int] = field(repr=False)

    @property
    def iterations(self) -> int:
        return len(self.trees) // self.shape.trees


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_booster(raw: bytes, *, like: BoosterShape | None = None, most_iterations: int | None = None) -> Booster:
    """The booster in `raw`, which may come from anywhere.

    `like`: the shape that it must have; with it, `most_iterations` is how much memory it may cost to look at: a few
    times `raw`.

    Raises:
        UpdateRefused: it is none, or not one of those that can be put together; in one line.
    """
    if like is not None and most_iterations is not None:
        _check_markup(raw, 4096 + 4 * like.num_feature + _CHARS_OF_A_TREE * like.trees * most_iterations)
    whole = _parsed(raw)
    learner = _dict(whole, "learner")
    gbtree = _dict(learner, "gradient_booster")
    if gbtree.get("name") != "gbtree":
        _refuse(f"its booster is {_short(gbtree.get('name'))}, gbtree is due")
    model = _dict(gbtree, "model")
    shape = _shape(learner, model)
    if like is not None and shape != like:
        _refuse(f"it is {_words(shape)}, the model is {_words(like)}")
    trees, outputs_of = _list(model, "trees"), _list(model, "tree_info")
    _check_iterations(shape, len(trees), outputs_of)
    if most_iterations is not None and len(trees) > most_iterations * shape.trees:
        _refuse(f"it has {len(trees)} new trees, {most_iterations * shape.trees} at most are due")
    _check_categories(model)
    return Booster(
        shape=shape,
        header=_header(learner, model) | {"version": _version(whole)},
        trees=[_tree(tree, shape.num_feature) for tree in trees],
        outputs_of=outputs_of,
    )


def _check_markup(raw: bytes, most: int) -> None:
    """Only numbers are many: each costs Python 32 bytes, where an empty list of two characters costs 64."""
    if sum(raw.count(char) for char in (b"{", b"[", b'"')) > most:
        _refuse("it is no booster with so few trees: too many brackets and quotes")


def _parsed(raw: bytes) -> object:
    try:
        value: object = json.loads(raw.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as exc:
        raise UpdateRefused(f"its trees are not JSON as Booster.save_raw('json') gives it: {_short(exc)}") from None
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no finite number")


def _shape(learner: Mapping[str, Any], model: Mapping[str, Any]) -> BoosterShape:
    param, objective = _dict(learner, "learner_model_param"), _dict(learner, "objective")
    name = objective.get("name")
    if not isinstance(name, str) or not _WORD.fullmatch(name):
        _refuse("its objective has no name")
    classes, targets = _count(param, "num_class", _MOST_TREES), _count(param, "num_target", _MOST_TREES, default=1)
    shape = BoosterShape(
        objective=name,
        num_feature=_count(param, "num_feature", _MOST_FEATURES),
        outputs=max(classes, targets, 1),
        parallel=max(1, _count(_dict(model, "gbtree_model_param"), "num_parallel_tree", _MOST_TREES)),
    )
    if shape.trees > _MOST_TREES:
        _refuse(f"it adds {shape.trees} trees at a time, {_MOST_TREES} at most")
    return shape


def _check_iterations(shape: BoosterShape, num_trees: int, outputs_of: Sequence[object]) -> None:
    """Each iteration has `parallel` trees for the first output, then for the next, and so on."""
    if num_trees % shape.trees:
        _refuse(f"it has {num_trees} trees, a multiple of {shape.trees} is due")
    one = [output for output in range(shape.outputs) for _ in range(shape.parallel)]
    if outputs_of != one * (num_trees // shape.trees) or any(type(output) is not int for output in outputs_of):
        _refuse("its tree_info does not say which output each tree is for")


def _check_categories(model: Mapping[str, Any]) -> None:
    if any(model.get("cats", {}).values() if isinstance(model.get("cats", {}), dict) else [True]):
        _refuse("it splits by categories: encode them as numbers")


def _version(whole: object) -> list[int]:
    version = whole.get("version") if isinstance(whole, dict) else None
    if not isinstance(version, list) or len(version) != 3 or not all(type(part) is int for part in version):
        _refuse("it does not say which version of XGBoost it is of")
    return version


def _header(learner: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    """All but the trees, of known keys only."""
    param, objective = _dict(learner, "learner_model_param"), _dict(learner, "objective")
    base_score = param.get("base_score")
    if not isinstance(base_score, str) or not _BASE_SCORE.fullmatch(base_score):
        _refuse("its base_score is no number")
    settings = {key: _dict(objective, key) for key in objective if key != "name"}
    words = [word for value in settings.values() for pair in value.items() for word in pair]
    words += [*settings, *param, *(value for key, value in param.items() if key != "base_score")]
    if not all(isinstance(word, str) and _WORD.fullmatch(word) for word in words):
        _refuse("its settings are not plain words")
    names, types = learner.get("feature_names", []), learner.get("feature_types", [])
    for value in (names, types):
        if not isinstance(value, list) or not all(isinstance(name, str) and len(name) <= 1000 for name in value):
            _refuse("its features have no names")
        if len(value) not in (0, _count(param, "num_feature", _MOST_FEATURES)):
            _refuse("it has more names than features, or fewer")
    if "c" in types:
        _refuse("it splits by categories: encode them as numbers")
    return {
        "attributes": {},
        "feature_names": names,
        "feature_types": types,
        "learner_model_param": param,
        "objective": objective,
        "with_cats": "cats" in model,
    }


# ---- trees -----------------------------------------------------------------------------------------------------------


def _tree(tree: object, num_feature: int) -> dict[str, Any]:
    """The tree, made anew of what was checked: all keys, all of one length, every node but the root the child of one
    that comes before it, every split by a feature that there is at a finite place."""
    fields = _dict({"tree": tree}, "tree")
    param = _dict(fields, "tree_param")
    size = _count(param, "num_nodes", 2**24)
    if size < 1 or _count(param, "num_feature", _MOST_FEATURES) != num_feature:
        _refuse("a tree has no nodes, or is for other features")
    if param.get("num_deleted") != "0":
        _refuse("a tree has nodes that were pruned away: use tree_method='hist'")
    if param.get("size_leaf_vector") not in ("0", "1"):
        _refuse("a tree has vectors as leaves: use multi_strategy='one_output_per_tree'")
    if any(_list(fields, name) for name in _CATEGORIES):
        _refuse("it splits by categories: encode them as numbers")
    unknown = set(fields) - {*_INTEGERS, *_FLOATS, *_CATEGORIES, "id", "tree_param"}
    if unknown:
        _refuse(f"a tree holds {_short(min(unknown))}, which is not known here")
    whole = {name: _numbers(fields, name, size, "i") for name in _INTEGERS}
    # XGBoost's reader tells 0 from 0.0, and wants the latter here.
    real = {name: _numbers(fields, name, size, "iuf").astype(np.float64) for name in _FLOATS}
    _check_links(whole["left_children"], whole["right_children"], whole["parents"])
    features = whole["split_indices"]
    if not (features.min() >= 0 and features.max() < num_feature):
        _refuse(f"a tree splits by a feature that is none of the {num_feature}")
    if whole["split_type"].any() or not np.isin(whole["default_left"], (0, 1)).all():
        _refuse("it splits by categories, or has no default direction: encode them as numbers")
    if not all((np.abs(values) <= _LARGEST_FLOAT).all() for values in real.values()):
        _refuse("a tree holds a number that is not finite in float32")
    return {
        **{name: [] for name in _CATEGORIES},
        **{name: values.tolist() for name, values in (whole | real).items()},
        "tree_param": {
            "num_deleted": "0",
            "num_feature": str(num_feature),
            "num_nodes": str(size),
            "size_leaf_vector": str(param["size_leaf_vector"]),
        },
    }


def _check_links(left: NDArray[Any], right: NDArray[Any], parents: NDArray[Any]) -> None:
    nodes = np.arange(left.size)
    is_split = left >= 0
    if not ((left[~is_split] == -1) & (right[~is_split] == -1)).all():
        _refuse("a leaf of a tree has a child")
    splits = nodes[is_split]
    children = np.concatenate([left[is_split], right[is_split]])
    if not (children > np.concatenate([splits, splits])).all() or not np.array_equal(np.sort(children), nodes[1:]):
        _refuse("a tree is none: each node but the first must be the child of one before it")
    expected = np.full(left.size, _ROOT)
    expected[left[is_split]] = expected[right[is_split]] = splits
    if not np.array_equal(parents, expected):
        _refuse("the parents in a tree are not those whose children they are")
    depth = [0] * left.size
    for child in range(1, left.size):
        depth[child] = depth[expected[child]] + 1
    if max(depth) > MOST_DEPTH:
        _refuse(f"a tree is {max(depth)} deep, {MOST_DEPTH} at most")


def _numbers(fields: Mapping[str, Any], name: str, size: int, kinds: str) -> NDArray[Any]:
    values = _list(fields, name)
    try:
        array = np.array(values)
    except (ValueError, OverflowError):
        array = np.empty(0, object)
    if array.shape != (size,) or array.dtype.kind not in kinds:
        _refuse(f"{name} of a tree is not {size} numbers")
    return array


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_model(booster: Booster) -> bytes:
    """`booster` laid out as a global model."""
    return _laid_out(booster.header, booster.shape, booster.iterations, _joined(booster.trees, 0))


def with_trees(model: bytes, shape: BoosterShape, boosters: Iterable[tuple[Booster, float]]) -> bytes:
    """`model`, which `write_model` or we gave, with the trees of each booster behind its own, in this order; what they
    say is multiplied with the factor that comes with it.

    An iteration of a booster is one of the model. With factor 1 they are the same trees to the last bit.
    """
    at = model.index(_TREES)
    whole = json.loads(model[: at + len(_TREES)] + _END)
    learner = whole["learner"]
    iterations = len(learner["gradient_booster"]["model"]["iteration_indptr"]) - 1
    texts = [model[at + len(_TREES) : -len(_END)]]
    for booster, factor in boosters:
        trees = booster.trees if factor == 1 else [_scaled(tree, factor) for tree in booster.trees]
        texts.append(_joined(trees, iterations * shape.trees))
        iterations += booster.iterations
    header = {**learner, "version": whole["version"], "with_cats": "cats" in learner["gradient_booster"]["model"]}
    return _laid_out(header, shape, iterations, b",".join(text for text in texts if text))


def _laid_out(header: Mapping[str, Any], shape: BoosterShape, iterations: int, trees: bytes) -> bytes:
    one = [output for output in range(shape.outputs) for _ in range(shape.parallel)]
    model: dict[str, Any] = {"cats": {"enc": [], "feature_segments": [], "sorted_idx": []}}
    if not header["with_cats"]:
        model = {}
    model |= {
        "gbtree_model_param": {
            "num_parallel_tree": str(shape.parallel),
            "num_trees": str(iterations * shape.trees),
        },
        "iteration_indptr": [shape.trees * i for i in range(iterations + 1)],
        "tree_info": one * iterations,
        "trees": [],
    }
    names = ("attributes", "feature_names", "feature_types", "learner_model_param", "objective")
    learner = {name: header[name] for name in names}
    learner["gradient_booster"] = {"name": "gbtree", "model": model}
    text = _dumps({"version": header["version"], "learner": learner})
    assert text.endswith(_TREES + _END)
    return text[: -len(_END)] + trees + _END


def _joined(trees: Sequence[dict[str, Any]], first: int) -> bytes:
    return b",".join(_dumps({**tree, "id": first + i}) for i, tree in enumerate(trees))


def _scaled(tree: dict[str, Any], factor: float) -> dict[str, Any]:
    """What its leaves say, times `factor`, in float32; so, too, what its inner nodes would say."""
    is_leaf = np.asarray(tree["left_children"]) < 0
    conditions = np.asarray(tree["split_conditions"], np.float64)
    said = np.where(is_leaf, conditions * factor, 0).astype(np.float32)
    weights = (np.asarray(tree["base_weights"], np.float64) * factor).astype(np.float32)
    leaves = [_short_float(value) for value in said]
    return {
        **tree,
        "split_conditions": [
            leaf if is_one else condition
            for leaf, is_one, condition in zip(leaves, is_leaf, tree["split_conditions"], strict=True)
        ],
        "base_weights": [_short_float(value) for value in weights],
    }


def _short_float(value: np.float32) -> float:
    """As the shortest decimal that reads as this float32: XGBoost's reader takes no more than nine digits."""
    return float(str(value))


def _dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


# ---- words -----------------------------------------------------------------------------------------------------------


def _dict(fields: object, name: str) -> dict[str, Any]:
    value = fields.get(name) if isinstance(fields, dict) else None
    if not isinstance(value, dict):
        _refuse(f"{name} is missing in its trees, or is no object")
    return value


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    value = fields.get(name)
    if not isinstance(value, list):
        _refuse(f"{name} is missing in its trees, or is no list")
    return value


def _count(fields: Mapping[str, Any], name: str, most: int, *, default: int | None = None) -> int:
    """XGBoost writes counts as strings."""
    text = fields.get(name, None if default is None else str(default))
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,9}", text) or int(text) > most:
        _refuse(f"{name} is {_short(text)}, a number up to {most} is due")
    return int(text)


def _words(shape: BoosterShape) -> str:
    return f"{shape.objective} of {shape.num_feature} features with {shape.trees} trees each time"


def _short(value: object) -> str:
    return repr(value)[:80]


def _refuse(reason: str) -> NoReturn:
    raise UpdateRefused(reason)
