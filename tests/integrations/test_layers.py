"""The compressed layer by itself: every kind of factor, shared dictionaries, casts and copies."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from compressed_models import KINDS, Kind, kind_factor
from torch import nn

from cospadi.errors import CheckpointError, InputError
from cospadi.factor.sparse_factor import SparseFactor
from cospadi.factor.spec import FactorSpec
from cospadi.model.layers import (
    CospadiLinear,
    build_layers,
    compressed_modules,
    describe_modules,
    replace_modules,
)

D_IN, D_OUT = 32, 20


def factor_of(kind: Kind) -> SparseFactor:
    torch.manual_seed(0)
    return kind_factor(kind, D_IN, D_OUT, torch.randn(D_OUT))


def shared_pair(kind: Kind) -> tuple[dict[str, SparseFactor], dict[str, str]]:
    """Return the factors of a leader ``a`` and a member ``b``, the member first."""
    leader = factor_of(kind)
    return {"b": kind_factor(kind, D_IN, 12, None, leader), "a": leader}, {"b": "a"}


def model_of(kind: Kind, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.ModuleDict(build_layers(*shared_pair(kind), dtype=dtype))


@pytest.mark.parametrize("name", KINDS)
def test_layer_computes_its_dense_weight(name):
    factor = factor_of(KINDS[name])
    layer = CospadiLinear.from_factor(factor, dtype=torch.float32)
    weight, bias = factor.dense_weight(torch.float64), factor.bias.double()
    for shape in ((), (1,), (3, 5), (0, 2), (70,)):
        x = torch.randn(*shape, D_IN)
        expected = x.double() @ weight.t() + bias
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-4)
    half = CospadiLinear.from_factor(factor, dtype=torch.bfloat16)
    x = torch.randn(9, D_IN).bfloat16()
    expected = x.double() @ weight.t() + bias
    # z and y are rounded to 8 bits
    assert (half(x).double() - expected).norm() < 0.01 * expected.norm()
    assert half(x).dtype == torch.bfloat16


@pytest.mark.parametrize("name", KINDS)
def test_inputs_of_another_width_are_named(name):
    layer = CospadiLinear.from_factor(factor_of(KINDS[name]), dtype=torch.float32)
    for shape, got in (((3, 100), "100"), ((2, D_IN, 1), "1"), ((), "a scalar")):
        message = f"^x: expected {D_IN} features in the last dimension, got {got}$"
        with pytest.raises(InputError, match=message):
            layer(torch.zeros(shape))


@pytest.mark.parametrize("name", KINDS)
def test_layer_gives_its_factor_back(name):
    factor = factor_of(KINDS[name])
    layer = CospadiLinear.from_factor(factor)
    assert layer.spec == factor.spec
    assert layer.factor().tensors().keys() == factor.tensors().keys()
    for part, tensor in factor.tensors().items():
        assert torch.equal(layer.factor().tensors()[part], tensor)
    assert layer.state_dict().keys() == {*factor.spec.tensors(), "weight"}
    empty = CospadiLinear(factor.spec, device="meta", layer_type="conv1d")
    assert {n: t.dtype for n, t in empty.state_dict().items()} == {
        n: t.dtype for n, t in layer.state_dict().items()
    }
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    x = torch.randn(4, D_IN).bfloat16()
    assert torch.equal(empty(x), layer(x))


@pytest.mark.parametrize("name", KINDS)
def test_gradient_of_the_inputs(name):
    factor = factor_of(KINDS[name])
    layer = CospadiLinear.from_factor(factor, dtype=torch.float32)
    x = torch.randn(4, D_IN, requires_grad=True)
    weights = torch.randn(4, D_OUT)
    (layer(x) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ factor.dense_weight(), rtol=1e-4, atol=1e-4)


def test_default_type_loses_nothing():
    pruned = SparseFactor.from_indices(None, None, torch.randn(5, 8), n_identity=8)
    assert torch.equal(CospadiLinear.from_factor(pruned).coeffs, pruned.coeffs)


def test_scales_of_another_type_are_not_rounded():
    factor = factor_of(KINDS["dense int4"])
    factor.coeffs_scale = factor.coeffs_scale.float() * 1.001
    layer = CospadiLinear.from_factor(factor)
    assert torch.equal(layer.coeffs_scale, factor.coeffs_scale)
    with pytest.raises(CheckpointError, match=r"coeffs_scale: expected bfloat16.*got float32"):
        layer.factor().validate("layer")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("cast", ["to", "half"])
@pytest.mark.parametrize("name", ["augmented int5", "dense int4", "shared int8 dictionary"])
def test_casts_leave_packed_tensors_alone(name, cast, dtype):
    factor = factor_of(KINDS[name])
    for part in ("coeffs_scale", "dictionary_scale"):
        scale = getattr(factor, part)
        if scale is not None:
            scale.mul_(2.0**-30)  # too small for float16
    layer = CospadiLinear.from_factor(factor, dtype=torch.float32)
    before = {part: t.clone() for part, t in factor.tensors().items()}
    layer = layer.to(dtype) if cast == "to" else layer.half()
    for part, tensor in layer.factor().tensors().items():
        if part != "bias":
            assert tensor.dtype == before[part].dtype
            assert torch.equal(tensor, before[part])
    assert layer.bias.dtype == (dtype if cast == "to" else torch.float16)


@pytest.mark.parametrize("name", [name for name in KINDS if name.startswith("shared")])
def test_shared_dictionary(name):
    factors, _ = shared_pair(KINDS[name])
    model = model_of(KINDS[name])
    assert list(compressed_modules(model)) == ["b", "a"]
    assert model["b"].leader is model["a"]
    assert "b.dictionary" not in model.state_dict()
    assert sum(n.endswith(".dictionary") for n in model.state_dict()) == 1
    x = torch.randn(6, D_IN)
    for key, factor in factors.items():
        expected = x @ factor.dense_weight().t() + (0 if factor.bias is None else factor.bias)
        torch.testing.assert_close(model[key](x), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(model[key].factor().dense_weight(), factor.dense_weight())
    data = describe_modules(model)
    assert data.groups == {"a": ["b"]}
    assert data.modules["b"].leader == "a"
    assert data.modules["b"].spec.dictionary_bits == 0


def test_member_follows_its_leader():
    model = model_of(KINDS["shared"])
    x = torch.randn(3, D_IN)
    before = model["b"](x)
    model["a"].dictionary = nn.Parameter(2 * model["a"].dictionary, requires_grad=False)
    torch.testing.assert_close(model["b"](x), 2 * before)
    model.to(torch.float16)
    assert model["b"].spec.dictionary_dtype == "float16"
    assert torch.isfinite(model["b"](x.half())).all()


def test_copies_have_leaders_of_their_own():
    model = model_of(KINDS["shared"])
    x = torch.randn(3, D_IN)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        assert other["b"].leader is other["a"]
        assert other["b"].leader is not model["a"]
        assert torch.equal(other["b"](x), model["b"](x))
        other["a"].dictionary.zero_()
    assert model["b"](x).abs().sum() > 0


def test_functional_call_reaches_the_member():
    model = model_of(KINDS["shared"])
    x = torch.randn(3, D_IN)
    other = {"0.dictionary": 2 * model["a"].dictionary}
    pair = nn.Sequential(model["a"], model["b"])
    pair.forward = lambda x: pair[1](x)
    result = torch.func.functional_call(pair, other, (x,))
    torch.testing.assert_close(result, 2 * model["b"](x))


def test_leader_outside_of_the_model():
    model = model_of(KINDS["shared"])
    replace_modules(model, {"a": nn.Linear(D_IN, D_OUT)})
    with pytest.raises(InputError, match="b: the layer that owns its dictionary is not in the mod"):
        describe_modules(model)


def test_off_loaded_leader_is_named():
    model = model_of(KINDS["shared"])
    model["a"].to("meta")
    with pytest.raises(InputError, match="shared dictionary is off-loaded"):
        model["b"](torch.randn(2, D_IN))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_leader_on_another_device():
    kind = Kind(full=True, shared=True)
    model = model_of(kind)
    x = torch.randn(3, D_IN)
    expected = model["b"](x)
    model["b"].to("cuda")
    torch.testing.assert_close(model["b"](x.to("cuda")).cpu(), expected)


def test_leaders_are_checked():
    factors, leaders = shared_pair(KINDS["shared"])
    leader = CospadiLinear.from_factor(factors["a"])
    member = CospadiLinear.from_factor(factors["b"], leader=leader)
    with pytest.raises(InputError, match=r"leader: expected the layer that owns.*got None"):
        CospadiLinear.from_factor(factors["b"])
    with pytest.raises(InputError, match=r"leader: .*got a layer"):
        CospadiLinear.from_factor(factors["a"], leader=leader)
    with pytest.raises(InputError, match=r"leader: .*got a member"):
        CospadiLinear.from_factor(factors["b"], leader=member)
    other = FactorSpec(D_IN, 4, 22, 3, "mask", False, owns_dictionary=False)
    with pytest.raises(InputError, match="leader: expected n_atoms = 22, got 21"):
        CospadiLinear(other, leader=leader)
    other = FactorSpec(D_IN, 4, 21, 3, "mask", False, "int8", owns_dictionary=False)
    with pytest.raises(InputError, match="leader: expected a dictionary of int8, got bfloat16"):
        CospadiLinear(other, leader=leader)
    for wrong in ({"b": "x"}, {"b": "a", "a": "b"}):
        with pytest.raises(InputError, match=r"its leader . owns no dictionary"):
            build_layers(factors, wrong)
    with pytest.raises(InputError, match="leader: expected the layer that owns"):
        build_layers(factors, {})
    assert build_layers(factors, leaders)["b"].leader.spec == factors["a"].spec


def test_stored_types_of_a_description():
    factors = {name.replace(" ", "_"): factor_of(kind) for name, kind in KINDS.items()}
    model = nn.ModuleDict(build_layers(factors, {}, dtype=torch.float32))
    for name, entry in describe_modules(model, dtype=torch.float16).modules.items():
        kind = KINDS[name.replace("_", " ")]
        spec = entry.spec
        stored_int8 = kind.dictionary == "int8"
        default = "bfloat16" if kind.n_atoms == 0 else "float16"
        assert spec.dictionary_dtype == ("int8" if stored_int8 else default)
        assert spec.coeffs_dtype == ("float16" if kind.coeffs == "bfloat16" else kind.coeffs)
        assert spec.coeffs_group == kind.group


def test_member_is_validated_with_its_leader():
    factors, _ = shared_pair(KINDS["shared"])
    factors["b"].validate("b", "a")
    factors["b"].dictionary[0, 0] = math.nan
    with pytest.raises(CheckpointError, match=r"a\.dictionary: holds a value that is not finite"):
        factors["b"].validate("b", "a")


@pytest.mark.parametrize("name", ["augmented int5", "shared int4", "dense int3", "pruned"])
def test_layer_compiles_in_one_graph(name):
    kind = KINDS[name]
    model = model_of(kind) if kind.shared else CospadiLinear.from_factor(factor_of(kind))
    layer = (model["b"] if kind.shared else model.float()).float()
    compiled = torch.compile(layer, fullgraph=True, backend="eager", dynamic=True)
    for rows in (1, 5):
        x = torch.randn(rows, D_IN)
        torch.testing.assert_close(compiled(x), layer(x))


def test_repr_tells_the_kind():
    text = repr(model_of(KINDS["shared augmented"]))
    assert "n_atoms=5, sparsity=7, bias=False, n_identity=32, coeffs=int8, shared" in text
