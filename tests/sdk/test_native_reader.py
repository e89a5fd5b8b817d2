"""The C++ reader against the Python one, through the C interface: the same layers, the same refusals."""

from __future__ import annotations

import ctypes
import json
import random
import shutil
from ctypes import POINTER, byref, c_char_p, c_double, c_int32, c_int64, c_void_p

import pytest
import torch
from compressed_models import FAMILIES, write_varied

from cospadi.checkpoint.reader import SINGLE_FILE, read_checkpoint
from cospadi.errors import CheckpointError, NewerFormatError, NotCompressedError

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODES = {CheckpointError: 5, NewerFormatError: 6, NotCompressedError: 7}


class Matrix(ctypes.Structure):
    """``cospadi_matrix`` and ``cospadi_const_matrix``."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("rows", c_int64),
        ("cols", c_int64),
        ("stride", c_int64),
    ]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Matrix:
        """Return a contiguous matrix as C sees it."""
        rows, cols = tensor.shape
        return cls(tensor.data_ptr(), DTYPES[tensor.dtype], rows, cols, cols)


class Native:
    """The few calls of the C interface that the tests need."""

    def __init__(self, library) -> None:
        self.lib = ctypes.CDLL(str(library))
        self.lib.cospadi_last_error.restype = c_char_p
        for name in ("cospadi_checkpoint_close", "cospadi_layer_close"):
            getattr(self.lib, name).argtypes = [c_void_p]
            getattr(self.lib, name).restype = None

    def open(self, folder) -> tuple[int, c_void_p]:
        """Return status and handle of a folder."""
        handle = c_void_p()
        return self.lib.cospadi_checkpoint_open(str(folder).encode(), byref(handle)), handle

    def load(self, handle: c_void_p, name: str) -> tuple[int, c_void_p]:
        """Return status and handle of a layer."""
        layer = c_void_p()
        status = self.lib.cospadi_layer_load(handle, name.encode(), c_int32(1), byref(layer))
        return status, layer

    def modules(self, handle: c_void_p) -> list[str]:
        """Return the names of the compressed modules."""
        count, name = c_int64(), c_char_p()
        assert self.lib.cospadi_checkpoint_module_count(handle, byref(count)) == 0
        names = []
        for i in range(count.value):
            assert self.lib.cospadi_checkpoint_module_name(handle, c_int64(i), byref(name)) == 0
            names.append(name.value.decode())
        return names

    def outcome(self, folder) -> int:
        """Return the status of opening a folder and loading all of its layers."""
        status, handle = self.open(folder)
        if status:
            assert b"\n" not in self.lib.cospadi_last_error()
            return status
        try:
            for name in self.modules(handle):
                status, layer = self.load(handle, name)
                self.lib.cospadi_layer_close(layer)
                if status:
                    return status
        finally:
            self.lib.cospadi_checkpoint_close(handle)
        return 0

    def forward(self, folder, name: str, x: torch.Tensor, d_out: int) -> torch.Tensor:
        """Return what a layer makes of `x`."""
        status, handle = self.open(folder)
        assert status == 0, self.lib.cospadi_last_error()
        status, layer = self.load(handle, name)
        assert status == 0, self.lib.cospadi_last_error()
        self.lib.cospadi_checkpoint_close(handle)  # a layer does not need it
        y = torch.full((x.shape[0], d_out), torch.nan, dtype=x.dtype)
        inputs, outputs = Matrix.of(x), Matrix.of(y)
        status = self.lib.cospadi_layer_forward(layer, byref(inputs), byref(outputs), c_int32(2))
        assert status == 0, self.lib.cospadi_last_error()
        self.lib.cospadi_layer_close(layer)
        return y


@pytest.fixture(scope="module")
def native(sdk) -> Native:
    return Native(sdk.library)


def python_outcome(folder) -> int:
    try:
        checkpoint = read_checkpoint(folder)
        for name in checkpoint.data.modules:
            checkpoint.factor(name)
    except CheckpointError as error:
        return CODES[type(error)]
    return 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_compute_what_python_computes(native, varied, family, dtype):
    torch.manual_seed(0)
    checkpoint = read_checkpoint(varied[family])
    for name, entry in checkpoint.data.modules.items():
        factor = checkpoint.factor(name)
        x = torch.randn(5, entry.spec.d_in).to(dtype)
        expected = x.double() @ factor.dense_weight().double().T
        if factor.bias is not None:
            expected += factor.bias.double()
        y = native.forward(varied[family], name, x, entry.spec.d_out)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2  # bfloat16: two roundings to 8 bits
        assert (y.double() - expected).norm() <= tolerance * expected.norm(), name


def test_shards(native, tmp_path):
    folder = write_varied(tmp_path / "sharded", max_shard_size=6000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert native.outcome(folder) == 0


def test_plain_tensors(native, stored):
    class Tensor(ctypes.Structure):
        _fields_ = [
            ("name", c_char_p),
            ("data", c_void_p),
            ("bytes", c_int64),
            ("shape", POINTER(c_int64)),
            ("n_dims", c_int32),
            ("type", c_int32),
        ]

    checkpoint = read_checkpoint(stored["llama"])
    status, handle = native.open(stored["llama"])
    assert status == 0
    for name, info in checkpoint.tensors.items():
        tensor = Tensor()
        assert native.lib.cospadi_checkpoint_tensor(handle, name.encode(), byref(tensor)) == 0
        assert tuple(tensor.shape[: tensor.n_dims]) == info.shape
        raw = checkpoint.tensor(name).flatten().view(torch.uint8).numpy().tobytes()
        assert ctypes.string_at(tensor.data, tensor.bytes) == raw
    number = c_double()
    assert native.lib.cospadi_checkpoint_config_number(handle, b"hidden_size", byref(number)) == 0
    assert number.value == 32
    native.lib.cospadi_checkpoint_close(handle)


def test_a_dense_model_is_not_compressed(native, tiny_model_dir, tmp_path):
    assert native.outcome(tiny_model_dir("llama")) == 7
    assert native.outcome(tmp_path / "absent") == 7


ODD_VALUES = (None, True, -1, 0, 1, 2**31, 2**63, 10**40, 1.5, "", "../x", "int8", "int4", "full")
ODD_VALUES += ("bfloat14", "float32", "model.layers.0.mlp.gate_proj", [], {}, [0], {"a": 1})


def test_damaged_configs_have_the_same_outcome(native, copied_varied):
    rng = random.Random(1)
    path = copied_varied / "config.json"
    text = path.read_text()
    seen = {0: 0, 5: 0, 6: 0, 7: 0}
    for _ in range(400):
        config = json.loads(text)
        section = config["quantization_config"]
        module = rng.choice(list(section["modules"]))
        part = rng.choice((section, section["modules"], *[section["modules"][module]] * 4))
        key = rng.choice(list(part))
        if rng.random() < 0.2:
            del part[key]
        elif rng.random() < 0.2:
            part[f"{key}x"] = part.pop(key)
        else:
            part[key] = rng.choice(ODD_VALUES)
        path.write_text(json.dumps(config))
        expected = python_outcome(copied_varied)
        assert native.outcome(copied_varied) == expected, (module, key, part.get(key, "deleted"))
        seen[expected] += 1
    assert min(seen[0], seen[5], seen[6]) > 5


def test_damaged_bytes_have_the_same_outcome(native, copied_varied, varied):
    rng = random.Random(2)
    path = copied_varied / SINGLE_FILE
    whole = (varied["llama"] / SINGLE_FILE).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    seen = [0, 0]
    for turn in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(header) if turn % 3 == 0 else rng.randrange(header, len(data))
            data[place] = rng.choice((0, 0x7F, 0x80, 0xFF, 0x22, 0x31))
        if turn % 10 == 0:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        expected = python_outcome(copied_varied)
        assert native.outcome(copied_varied) == expected
        seen[expected == 0] += 1
    assert min(seen) > 20
    shutil.copy(varied["llama"] / SINGLE_FILE, path)
    assert native.outcome(copied_varied) == 0
