"""Damaged checkpoints end in an error of ours, or load with the sizes that they had; never in anything else."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from compressed_models import logits

import cospadi
from cospadi.checkpoint.reader import SINGLE_FILE, read_checkpoint
from cospadi.errors import InputError

ODD_VALUES = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**40,
    1.5,
    "",
    "x",
    "../x",
    "float32",
    "bfloat14",
    "int8",
    "int4",
    "full",
    "model.layers.0.mlp.gate_proj",
    "\x00",
    [],
    {},
    [0],
    {"a": 1},
)


def sizes(checkpoint) -> dict:
    return {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()}


def read_everything(folder) -> dict:
    checkpoint = read_checkpoint(folder)
    for name in checkpoint.data.modules:
        checkpoint.factor(name)
    return sizes(checkpoint)


def places(value, found=None) -> list:
    """Return (container, key) of every value inside a JSON value."""
    found = [] if found is None else found
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        found.append((value, key))
        if isinstance(item, (dict, list)):
            places(item, found)
    return found


def mutate_json(rng: random.Random, config: dict) -> None:
    for _ in range(rng.randint(1, 2)):
        container, key = rng.choice(places(config))
        action = rng.randrange(4)
        if action == 0:
            del container[key]
        elif action == 1 and isinstance(container[key], int):
            container[key] += rng.choice((-1, 1, 8, 1000))
        elif action == 2 and isinstance(container, dict):
            container[f"{key}{rng.choice(('x', '.', '/', ''))}"] = container.pop(key)
        else:
            container[key] = rng.choice(ODD_VALUES)


def mutate_bytes(rng: random.Random, data: bytearray, limit: int) -> None:
    for _ in range(rng.randint(1, 4)):
        position = rng.randrange(min(limit, len(data)))
        action = rng.randrange(4)
        if action == 0:
            data[position] ^= 1 << rng.randrange(8)
        elif action == 1:
            data[position] = rng.randrange(256)
        elif action == 2:
            del data[position : position + rng.randint(1, 9)]
        else:
            data[position:position] = rng.randbytes(rng.randint(1, 9))


def outcome(action) -> dict | None:
    try:
        return action()
    except InputError as error:  # CheckpointError is one
        assert str(error)
        assert "\n" not in str(error)
        return None


@pytest.fixture(params=["plain", "every kind"])
def source(request, stored, varied):
    """The folder of a checkpoint that must not be changed."""
    return (stored if request.param == "plain" else varied)["llama"]


@pytest.fixture
def copied(source, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(source, tmp_path / "copy"))


@pytest.fixture
def original(source):
    return read_everything(source)


def test_config_values(copied, original):
    rng = random.Random(1)
    text = (copied / "config.json").read_text()
    seen = [0, 0]
    for _ in range(400):
        config = json.loads(text)
        part = config["quantization_config"] if rng.random() < 0.8 else config
        mutate_json(rng, part)
        (copied / "config.json").write_text(json.dumps(config))
        found = outcome(lambda: read_everything(copied))
        seen[found is None] += 1
        assert found is None or found == original
    assert min(seen) > 20  # both outcomes were exercised


def test_values_of_one_module(copied, original):
    """Several keys of a module at once, so that mutations meet which are plausible together."""
    rng = random.Random(7)
    text = (copied / "config.json").read_text()
    keys = ("n_atoms", "n_identity", "sparsity", "coeffs_group", "dictionary", "support")
    keys += ("coeffs_dtype", "dictionary_dtype")
    seen = [0, 0]
    for _ in range(400):
        config = json.loads(text)
        modules = config["quantization_config"]["modules"]
        name, other = rng.choices(list(modules), k=2)
        for key in rng.sample(keys, rng.randint(1, 4)):
            value = modules[other].get(key, rng.choice((0, 4, 8, 32, other)))
            modules[name][key] = value
        (copied / "config.json").write_text(json.dumps(config))
        found = outcome(lambda: read_everything(copied))
        seen[found is None] += 1
        assert found is None or found == original
    assert min(seen) > 5


def test_tensor_values(copied, original):
    """Damaged values are refused, or decode to finite weights."""
    rng = random.Random(8)
    path = copied / SINGLE_FILE
    source = path.read_bytes()
    checkpoint = read_checkpoint(copied)
    infos = [
        info
        for name, info in checkpoint.tensors.items()
        if name in checkpoint.data.expected_tensors() and info.nbytes
    ]

    def weights() -> dict:
        checkpoint = read_checkpoint(copied)
        return {n: checkpoint.factor(n).dense_weight() for n in checkpoint.data.modules}

    seen = [0, 0]
    for _ in range(150):
        data = bytearray(source)
        info = rng.choice(infos)
        for _ in range(rng.randint(1, 3)):
            data[info.offset + rng.randrange(info.nbytes)] = rng.choice((0, 0x7F, 0x80, 0xFF))
        path.write_bytes(data)
        found = outcome(weights)
        seen[found is None] += 1
        assert found is None or all(w.isfinite().all() for w in found.values())
    assert min(seen) > 5


def test_config_bytes(copied, original):
    rng = random.Random(2)
    text = (copied / "config.json").read_bytes()
    for _ in range(200):
        data = bytearray(text)
        mutate_bytes(rng, data, len(data))
        (copied / "config.json").write_bytes(data)
        found = outcome(lambda: read_everything(copied))
        assert found is None or found == original


def test_safetensors_bytes(copied, original):
    rng = random.Random(3)
    path = copied / SINGLE_FILE
    source = path.read_bytes()
    header = 8 + int.from_bytes(source[:8], "little")
    for turn in range(300):
        data = bytearray(source)
        limit = (8, header, len(data))[turn % 3]
        mutate_bytes(rng, data, limit)
        if turn % 5 == 0:
            del data[rng.randrange(len(data)) :]
        path.write_bytes(data)
        found = outcome(lambda: read_everything(copied))
        # names of dense tensors may have changed; those of compressed modules may not
        assert found is None or {k: v for k, v in found.items() if k in original}.items() <= (
            original.items()
        )


def test_index_bytes(copied, original):
    rng = random.Random(4)
    (copied / SINGLE_FILE).rename(copied / "a.safetensors")
    index = copied / "model.safetensors.index.json"
    text = json.dumps({"weight_map": dict.fromkeys(original, "a.safetensors")}).encode()
    for _ in range(150):
        data = bytearray(text)
        mutate_bytes(rng, data, len(data))
        index.write_bytes(data)
        found = outcome(lambda: read_everything(copied))
        assert found is None or found == original


def test_loading_mutated_configs(copied, source):
    """The whole way through transformers, whose own reading of the config may fail in any manner."""
    rng = random.Random(5)
    text = (copied / "config.json").read_text()
    expected = logits(cospadi.load(source)[0]).shape

    def load_and_run():
        model, _ = cospadi.load(copied)
        return {name: tuple(p.shape) for name, p in model.named_parameters()}

    whole = load_and_run()
    loaded = 0
    for turn in range(60):
        config = json.loads(text)
        quantization = config.pop("quantization_config")
        mutate_json(rng, config if turn % 2 else quantization)
        (copied / "config.json").write_text(
            json.dumps({**config, "quantization_config": quantization})
        )
        found = outcome(load_and_run)
        loaded += found is not None
        assert found is None or found == whole
    assert loaded > 5
    assert expected[-1] == 61


def test_loading_mutated_weights(copied, source):
    rng = random.Random(6)
    path = copied / SINGLE_FILE
    whole = path.read_bytes()
    for turn in range(40):
        data = bytearray(whole)
        mutate_bytes(rng, data, 8 + int.from_bytes(whole[:8], "little") if turn % 2 else 10**9)
        path.write_bytes(data)
        outcome(lambda: {} if cospadi.load(copied) else None)
    shutil.copy(source / SINGLE_FILE, path)
    cospadi.load(copied)
