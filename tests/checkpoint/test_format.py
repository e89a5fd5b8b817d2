from __future__ import annotations

import copy
import json

import pytest

from cospadi.checkpoint.format import CospadiConfigData, ModuleEntry
from cospadi.checkpoint.strict_json import parse_json_object
from cospadi.errors import CheckpointError, InputError

MODULE = {
    "d_in": 6,
    "d_out": 5,
    "n_atoms": 10,
    "sparsity": 3,
    "support": "mask",
    "bias": True,
}
CONFIG = {
    "quant_method": "cospadi",
    "format_version": 2,
    "modules": {"model.layers.0.mlp.up_proj": MODULE},
}


def config(**changes) -> dict:
    return {**copy.deepcopy(CONFIG), **changes}


def with_module(**changes) -> dict:
    return config(modules={"a.b": {**MODULE, **changes}})


LEADER = {**MODULE, "dictionary_dtype": "float16"}
MEMBER = {**LEADER, "d_out": 8, "coeffs_dtype": "int4", "coeffs_group": 2, "dictionary": "a.b"}


def with_member(leader=LEADER, groups=None, **changes) -> dict:
    """Return the config of a leader ``a.b`` and its member ``a.c``."""
    groups = {"a.b": ["a.c"]} if groups is None else groups
    return config(modules={"a.b": leader, "a.c": {**MEMBER, **changes}}, groups=groups)


def test_parse_and_emit_are_inverse():
    data = CospadiConfigData.parse(
        config(ratio={"stored": 0.2}, producer={"name": "test"}, groups={}, later={"x": [1, None]})
    )
    assert data.extra == {"later": {"x": [1, None]}}
    text = json.dumps(data.to_dict())
    assert CospadiConfigData.parse(json.loads(text)) == data
    assert "cospadi.hf" in data.to_dict()["note"]


def test_parse_and_emit_are_inverse_for_every_kind():
    pruned = {**MODULE, "n_atoms": 0, "n_identity": 6, "coeffs_dtype": "bfloat14"}
    modules = {
        "a.c": MEMBER,
        "a.b": LEADER,
        "x": pruned,
        "y": {**MODULE, "n_identity": 6, "sparsity": 16, "support": "full"},
        "z": {**MODULE, "dictionary_dtype": "int8", "coeffs_dtype": "int3"},
    }
    value = config(modules=modules, groups={"a.b": ["a.c"]})
    data = CospadiConfigData.parse(value)
    assert data.groups == {"a.b": ["a.c"]}
    text = json.dumps(data.to_dict())
    assert CospadiConfigData.parse(json.loads(text)) == data
    for name, module in modules.items():
        emitted = data.to_dict()["modules"][name]
        assert module.items() <= emitted.items()
        assert emitted.keys() - module.keys() <= {"dictionary_dtype", "coeffs_dtype", "layer_type"}


def test_version_1_is_read_and_written_as_2():
    data = CospadiConfigData.parse(config(format_version=1))
    assert data.format_version == 1
    assert data.modules == CospadiConfigData.parse(CONFIG).modules
    assert data.to_dict()["format_version"] == 2


@pytest.mark.parametrize(
    "value",
    [
        with_module(n_identity=6),
        with_module(coeffs_dtype="int4"),
        with_module(coeffs_dtype="bfloat14"),
        with_module(dictionary_dtype="int8"),
        with_member(coeffs_dtype="bfloat16", coeffs_group=0),
    ],
)
def test_version_1_cannot_hold_what_came_later(value):
    CospadiConfigData.parse(value)
    with pytest.raises(CheckpointError, match="needs format_version 2, got 1"):
        CospadiConfigData.parse({**value, "format_version": 1})


def test_defaults_of_optional_keys():
    entry = ModuleEntry.parse(MODULE, "a")
    assert entry.layer_type == "linear"
    assert entry.spec.dictionary_dtype == entry.spec.coeffs_dtype == "bfloat16"
    own = ModuleEntry.parse({**MODULE, "dictionary": "a", "n_identity": 0, "coeffs_group": 0}, "a")
    assert own == entry
    with pytest.raises(InputError, match="leader: expected"):
        ModuleEntry(entry.spec, leader="b")


def test_expected_tensors():
    tensors = CospadiConfigData.parse(with_module()).expected_tensors()
    shapes = {name: spec.shape for name, spec in tensors.items()}
    assert shapes == {
        "a.b.weight": (0,),
        "a.b.dictionary": (6, 10),
        "a.b.coeffs": (5, 3),
        "a.b.mask": (5, 2),
        "a.b.bias": (5,),
    }
    full = CospadiConfigData.parse(with_module(support="full", sparsity=10, bias=False))
    assert set(full.expected_tensors()) == {"a.b.weight", "a.b.dictionary", "a.b.coeffs"}


def test_expected_tensors_of_other_kinds():
    def tensors(value):
        expected = CospadiConfigData.parse(value).expected_tensors()
        return {name: (spec.dtypes[0], spec.shape) for name, spec in expected.items()}

    floats = ("bfloat16", (0,))
    assert tensors(with_module(n_atoms=0, n_identity=6, bias=False, coeffs_dtype="int8")) == {
        "a.b.weight": floats,
        "a.b.coeffs": ("uint8", (5, 3)),
        "a.b.coeffs_scale": ("bfloat16", (5, 1)),
        "a.b.mask": ("uint8", (5, 1)),
    }
    assert tensors(with_module(n_identity=6, dictionary_dtype="int8", coeffs_dtype="bfloat14")) == {
        "a.b.weight": floats,
        "a.b.dictionary": ("int8", (10, 6)),
        "a.b.dictionary_scale": ("bfloat16", (10,)),
        "a.b.coeffs": ("uint8", (5, 6)),  # 3 x 14 = 42 bits
        "a.b.mask": ("uint8", (5, 2)),
        "a.b.bias": ("bfloat16", (5,)),
    }
    assert tensors(with_member()) == {
        "a.b.weight": floats,
        "a.b.dictionary": ("float16", (6, 10)),
        "a.b.coeffs": ("bfloat16", (5, 3)),
        "a.b.mask": ("uint8", (5, 2)),
        "a.b.bias": ("bfloat16", (5,)),
        "a.c.weight": floats,
        "a.c.coeffs": ("uint8", (8, 2)),
        "a.c.coeffs_scale": ("bfloat16", (8, 2)),
        "a.c.mask": ("uint8", (8, 2)),
        "a.c.bias": ("bfloat16", (8,)),
    }
    member = CospadiConfigData.parse(with_member()).modules["a.c"]
    assert member.factor_tensors("a.c")["dictionary"] == "a.b.dictionary"
    assert member.factor_tensors("a.c")["mask"] == "a.c.mask"


def test_ratios_over_several_modules():
    data = CospadiConfigData.parse(
        config(modules={"a": MODULE, "b": {**MODULE, "d_out": 50, "sparsity": 2}})
    )
    values = (6 * 10 + 3 * 5) + (6 * 10 + 2 * 50)
    stored = 16 * values + 8 * 2 * 5 + 8 * 2 * 50
    assert data.stored_bits() == stored
    assert data.values_ratio() == pytest.approx(1 - values / (6 * 55))
    assert data.stored_ratio() == pytest.approx(1 - stored / (16 * 6 * 55))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "expected an object, got None"),
        ([], "expected an object, got a list"),
        (config(quant_method="gptq"), "quant_method"),
        (config(quant_method=["cospadi"]), "quant_method"),
        (config(format_version=3), "made by a newer version"),
        (config(format_version=0), "format_version"),
        (config(format_version="1"), "format_version: expected a positive integer"),
        (config(format_version=True), "format_version"),
        (config(modules=None), "modules: expected an object"),
        (config(modules={}), "modules: expected 1 to"),
        (config(modules={"a": 3}), "modules.a: expected an object, got 3"),
        (config(groups={"g": []}), "groups: contradicts the modules about the members of g"),
        (config(groups={"g": 3}), "groups.g: expected a list of names"),
        (config(groups={"g": [3]}), "groups.g: expected a list of names"),
        (with_member(groups={}), "groups: contradicts the modules about the members of a.b"),
        (with_member(groups={"a.b": ["a.c", "a.c"]}), "groups: contradicts"),
        (with_member(groups={"a.b": ["a.b"]}), "groups: contradicts"),
        (with_member(groups={"a.b": ["a.c"], "a.c": []}), "about the members of a.c"),
        (with_member(dictionary="a.d"), "modules.a.c.dictionary: 'a.d' is no compressed module"),
        (with_member(dictionary="a\nd"), "is no compressed module"),
        (
            with_member(leader={**LEADER, "dictionary": "a.c"}),
            "modules.a.b.dictionary: a.c has no dictionary of its own, it uses that of 'a.b'",
        ),
        (with_member(d_in=7), "modules.a.c.dictionary: d_in is 7 here and 6 in a.b"),
        (with_member(n_atoms=9), "n_atoms is 9 here and 10 in a.b"),
        (with_member(n_identity=6), "n_identity is 6 here and 0 in a.b"),
        (with_member(dictionary_dtype="bfloat16"), "dictionary_dtype is bfloat16 here and float16"),
        (with_member(n_atoms=0, n_identity=6), "n_atoms: without a dictionary"),
        (with_member(coeffs_group=-1), "coeffs_group: expected 0 to"),
        (with_member(coeffs_group=None), "coeffs_group: expected an integer"),
        (with_member(coeffs_dtype="bfloat16"), "coeffs_group: bfloat16 coefficients have no scale"),
        (config(groups=[]), "groups: expected an object"),
        (config(ratio=3), "ratio: expected an object"),
        (config(ratio={"x": float("nan")}), "ratio.x: expected a finite number"),
        (config(producer={"x": {1: 2}}), "producer.x: expected text keys"),
        (config(later=object()), "later: object is not a JSON type"),
        (with_module(surprise=1), r"modules.a.b: unknown key 'surprise': made by a newer version"),
        (with_module(n_identity=5), "n_identity: expected 0 or d_in = 6, got 5"),
        (with_module(n_atoms=0), "n_atoms: expected at least 1 without identity atoms"),
        (with_module(owns_dictionary=False), "unknown key 'owns_dictionary'"),
        (with_module(n_identity="6"), "n_identity: expected an integer"),
        (with_module(dictionary="a.c"), "'a.c' is no compressed module"),
        (with_module(dictionary=3), "dictionary: expected a name"),
        (with_module(coeffs_dtype="int9"), "coeffs_dtype: 'int9' is none of .*newer version"),
        (with_module(dictionary_dtype="int4"), "'int4' is none of .*newer version"),
        (with_module(support="half"), "support: 'half' is none of"),
        (with_module(layer_type="conv2d"), "layer_type: 'conv2d' is none of"),
        (with_module(layer_type=2), "layer_type: expected text"),
        (with_module(layer_type=["linear"]), "layer_type: expected text"),
        (with_module(d_in="6"), "modules.a.b.d_in: expected an integer, got '6'"),
        (with_module(d_in=6.0), "d_in: expected an integer"),
        (with_module(d_in=-1), "d_in: expected 1 to"),
        (with_module(sparsity=11), "sparsity: 11 exceeds the 10 atoms"),
        (with_module(support={}), "support"),
        (with_module(bias="yes"), "bias"),
        (with_module(coeffs_dtype=None), "coeffs_dtype"),
        (with_module(n_atoms=2**30, d_in=2**30), "exceed the limit"),
    ],
)
def test_rejects(value, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        CospadiConfigData.parse(value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["d_in", "d_out", "n_atoms", "sparsity", "support", "bias"])
def test_required_keys(key):
    module = {k: v for k, v in MODULE.items() if k != key}
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        CospadiConfigData.parse(config(modules={"a": module}))


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a/b", "a\\b", "a..b", ".a", "a.", "a b", "a\n", "a\x00", "é", "-a", "a" * 600],
)
def test_rejects_names(name):
    with pytest.raises(CheckpointError, match="is no module name") as caught:
        CospadiConfigData.parse(config(modules={name: MODULE}))
    assert str(caught.value).isprintable()


def test_rejects_nested_modules():
    with pytest.raises(CheckpointError, match=r"a.b.c lies inside a"):
        CospadiConfigData.parse(config(modules={"a": MODULE, "a.b.c": MODULE}))


def test_deep_nesting_is_bounded():
    value: object = 1
    for _ in range(100):
        value = [value]
    with pytest.raises(CheckpointError, match="nested"):
        CospadiConfigData.parse(config(later=value))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not valid JSON"),
        (b"[]", "expected a JSON object, got a list"),
        (b"\xff{}", "not valid JSON"),
        (b'{"a": 1, "a": 2}', "key a occurs twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
    ],
)
def test_json_rejects(text, words):
    with pytest.raises(CheckpointError, match=words):
        parse_json_object(text, "config.json")


def test_checkpoint_errors_are_input_errors():
    with pytest.raises(InputError):
        CospadiConfigData.parse({})
