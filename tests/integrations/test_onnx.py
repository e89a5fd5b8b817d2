"""The operator library in the installed ONNX Runtime, one node at a time."""

from __future__ import annotations

import ctypes
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_models import KINDS, kind_factor
from onnx_sessions import library, open_session

needs = "is not installed (extra onnx)"
pytest.importorskip("onnx", reason=f"onnx {needs}")
ort = pytest.importorskip("onnxruntime", reason=f"onnxruntime {needs}")
from onnx import TensorProto, helper  # noqa: E402
from onnx.external_data_helper import set_external_data  # noqa: E402

__all__ = ["library"]

D_IN, D_OUT = 32, 44
INPUTS = ("coeffs", "mask", "coeffs_scale", "dictionary", "dictionary_scale", "bias")
ATTRIBUTES = (
    "d_in", "d_out", "n_atoms", "n_identity", "sparsity", "support", "coeffs_dtype", "coeffs_group", "dictionary_dtype",
)  # fmt: skip
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float16: TensorProto.FLOAT16,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
}


def stored_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def initialiser(name: str, tensor: torch.Tensor):
    return helper.make_tensor(
        name, ONNX_TYPES[tensor.dtype], list(tensor.shape), stored_bytes(tensor), raw=True
    )


def parts_of(factor) -> dict[str, torch.Tensor]:
    return {part: t for part in INPUTS if (t := getattr(factor, part)) is not None}


def graph_of(factor, parts=None, given: tuple[str, ...] = (), **changes):
    """Return a model of one node; `parts` are its initialisers, `given` those that are inputs of the graph."""
    parts = parts_of(factor) if parts is None else parts
    spec = asdict(factor.spec)
    attributes = {key: spec[key] for key in ATTRIBUTES} | {"bias": int(spec["bias"])} | changes
    names = ["x", *(part if part in parts else "" for part in INPUTS)]
    attributes = {key: value for key, value in attributes.items() if value is not None}
    node = helper.make_node(
        "CospadiLinear", names, ["y"], name="block.proj", domain="cospadi", **attributes
    )
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "sequence", D_IN]),
            *(
                helper.make_tensor_value_info(part, ONNX_TYPES[t.dtype], list(t.shape))
                for part, t in parts.items()
                if part in given
            ),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "sequence", D_OUT])],
        [initialiser(part, t) for part, t in parts.items() if part not in given],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("cospadi", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def factor_of(kind: str, seed: int = 0):
    torch.manual_seed(seed)
    return kind_factor(KINDS[kind], D_IN, D_OUT, torch.randn(D_OUT))


def expected(factor, x: torch.Tensor) -> np.ndarray:
    return (x @ factor.dense_weight().float().T + factor.bias.float()).numpy()


# ---- the interface of ONNX Runtime ---------------------------------------------------------------------------------


def test_places_of_the_table_are_those_of_the_installed_library():
    found = sorted(Path(ort.__file__).parent.glob("capi/libonnxruntime.so*"))
    if not found:
        pytest.skip("this onnxruntime has no library beside its Python extension")
    runtime = ctypes.CDLL(str(found[0]))
    runtime.OrtGetApiBase.restype = ctypes.POINTER(ctypes.c_void_p)
    base = runtime.OrtGetApiBase()
    version = ctypes.CFUNCTYPE(ctypes.c_char_p)(base[1])().decode()
    assert version == ort.__version__
    get_api = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint32)(base[0])
    table = get_api(16)
    assert table

    status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(table[0])(2, b"why")
    assert ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(table[2])(status) == b"why"
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(table[93])(status)
    # the last entry of version 15 stands behind all that are used: none was put in or taken out before it
    build = ctypes.CFUNCTYPE(ctypes.c_char_p)(table[254])()
    assert b"ORT Build Info" in build or b"git" in build.lower()


def test_the_library_shows_its_entry_point_alone_and_needs_no_runtime(library):
    import shutil

    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("binutils are not installed")
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    )
    assert [line.split()[-1] for line in symbols.stdout.splitlines()] == ["RegisterCustomOps"]
    dynamic = subprocess.run(
        ["readelf", "-d", library], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert not any(re.search("python|torch|c10|onnx|cospadi|cuda", name) for name in needed)
    assert "NODELETE" in dynamic


# ---- one node ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_computes_the_projection(library, kind):
    factor = factor_of(kind)
    session = open_session(graph_of(factor).SerializeToString(), library)
    for shape in ((1, 1), (2, 30), (0, 3)):  # few rows, many rows, none
        x = torch.randn(*shape, D_IN)
        (y,) = session.run(None, {"x": x.numpy()})
        assert y.shape == (*shape, D_OUT)
        np.testing.assert_allclose(y, expected(factor, x), atol=1e-5, rtol=1e-5)


def test_threads_are_a_setting_of_the_session(library):
    factor = factor_of("augmented")
    model = graph_of(factor).SerializeToString()
    x = torch.randn(1, 40, D_IN)
    results = [
        open_session(model, library, cospadi_threads=threads).run(None, {"x": x.numpy()})[0]
        for threads in ("0", "1", "2", "1")
    ]
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    for wrong in ("-1", "two", "1 ", "", "99999"):
        with pytest.raises(Exception, match=r"cospadi\.threads: expected a number of threads"):
            open_session(model, library, cospadi_threads=wrong)


def test_unaligned_external_data_is_used(library, tmp_path):
    factor = factor_of("plain")
    model = graph_of(factor)
    content = bytearray(b"\0")
    for tensor in model.graph.initializer:
        raw = tensor.raw_data
        set_external_data(tensor, "weights.bin", offset=len(content), length=len(raw))
        tensor.ClearField("raw_data")
        content += raw + b"\0" * (len(raw) % 2)  # every tensor at an odd offset
    (tmp_path / "weights.bin").write_bytes(content)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    x = torch.randn(2, 3, D_IN)
    (y,) = open_session(tmp_path / "model.onnx", library).run(None, {"x": x.numpy()})
    np.testing.assert_allclose(y, expected(factor, x), atol=1e-5, rtol=1e-5)


def without(part: str):
    return lambda parts: {name: t for name, t in parts.items() if name != part}


def changed(part: str, change):
    return lambda parts: {name: change(t) if name == part else t for name, t in parts.items()}


def one_bit_more(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    mask[3, 0] ^= 1
    return mask


def not_finite(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[0, 0] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("kind", "damage", "changes", "message"),
    [
        ("plain", None, {"sparsity": 22}, r"block\.proj.*sparsity: 22 exceeds the 21 atoms"),
        ("plain", None, {"sparsity": 8}, r"coeffs: expected BF16 \[44, 8\], got BF16 \[44, 9\]"),
        ("plain", None, {"d_in": None}, r"d_in: missing"),
        ("plain", None, {"d_in": -1}, r"d_in: expected an integer from 1"),
        ("plain", None, {"d_in": "32"}, r"d_in: missing"),
        ("plain", None, {"bias": 2}, r"bias: expected 0 or 1, got 2"),
        ("plain", None, {"support": "some"}, r"support: 'some' is none of mask, full"),
        ("plain", None, {"coeffs_dtype": "int2"}, r"coeffs_dtype: 'int2' is none of"),
        ("plain", None, {"bias": 0}, r"bias: unexpected, the attributes describe no such tensor"),
        ("plain", without("mask"), {}, r"mask: missing, expected an initialiser"),
        ("plain", without("dictionary"), {}, r"dictionary: missing, expected an initialiser"),
        ("plain", changed("mask", one_bit_more), {}, r"mask: mask row 3: expected exactly s = 9"),
        ("plain", changed("dictionary", not_finite), {}, r"dictionary: holds a value that is not"),
        ("plain", changed("coeffs", torch.Tensor.float), {}, r"got F32"),
        ("plain", changed("dictionary", lambda t: t.T), {}, r"expected BF16 \[32, 21\]"),
        ("shared int4", changed("coeffs_scale", torch.neg), {}, r"scale that is not positive"),
        ("shared int4", without("coeffs_scale"), {}, r"coeffs_scale: missing"),
    ],
)
def test_damaged_nodes_are_refused_when_the_session_opens(library, kind, damage, changes, message):
    factor = factor_of(kind)
    parts = parts_of(factor) if damage is None else damage(parts_of(factor))
    model = graph_of(factor, parts, **changes).SerializeToString()
    with pytest.raises(Exception, match=message):
        open_session(model, library)


def test_tensors_must_be_initialisers(library):
    model = graph_of(factor_of("plain"), given=("mask",)).SerializeToString()
    with pytest.raises(Exception, match="mask: missing, expected an initialiser"):
        open_session(model, library)


def test_inputs_of_another_width_are_refused(library):
    model = graph_of(factor_of("plain"))
    model.graph.input[0].type.tensor_type.shape.dim[2].Clear()
    model.graph.output[0].type.tensor_type.shape.dim[2].Clear()
    session = open_session(model.SerializeToString(), library)
    with pytest.raises(Exception, match="x: expected 32 inputs in the last dimension, got 31"):
        session.run(None, {"x": np.zeros((1, 2, 31), np.float32)})
