"""Speed measurements: what is timed is checked, counted and named; not how fast it is."""

from __future__ import annotations

import time

import pytest
import torch

from cospadi import compress
from cospadi.errors import CospadiError, InputError
from cospadi.evaluation import linear_speed
from cospadi.evaluation.linear_speed import OWN_DENSE, TORCH_BF16, TORCH_FP32, measure_linears
from cospadi.evaluation.model_speed import measure_models
from cospadi.evaluation.timing import (
    gemm_peak,
    measure_in_turn,
    read_peak,
    summarise,
)
from cospadi.native import CODE_FORMATS
from cospadi.native.support import torch_threads


def test_contenders_take_turns():
    order = []
    timings = measure_in_turn(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=3, clock="wall"
    )
    assert order == ["a", "b"] * 4  # one round to warm up
    assert all(t.n == 3 and t.clock == "wall" and t.median > 0 for t in timings.values())


def test_bursts_are_counted_per_call():
    order = []
    calls = {"a": lambda: (order.append("a"), time.sleep(0.05)), "b": lambda: order.append("b")}
    timings = measure_in_turn(calls, repeats=2, clock="wall", burst=3)
    assert order == ["a", "b"] + ["a", "a", "a", "b", "b", "b"] * 2
    assert timings["a"].n == 2
    assert 0.05 <= timings["a"].best < 0.15


def test_quartiles():
    timing = summarise([4.0, 1.0, 2.0, 3.0, 5.0], "wall")
    assert (timing.lower_quartile, timing.median, timing.upper_quartile) == (2.0, 3.0, 4.0)
    assert timing.best == 1.0
    assert summarise([7.0], "wall").upper_quartile == 7.0


def test_peaks_keep_the_thread_count():
    before = torch.get_num_threads()
    assert gemm_peak(torch.float32, 1, size=64) > 0
    assert read_peak(2, megabytes=1) > 0
    with pytest.raises(RuntimeError), torch_threads(before + 1):
        raise RuntimeError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("rows", [1, 20])
def test_linears(rows):
    kinds = ("bfloat16", *CODE_FORMATS)
    found = measure_linears(64, 96, ratio=0.4, rows=rows, coeffs=kinds, repeats=1, megabytes=0)
    assert [one.variant for one in found] == [*kinds, TORCH_BF16, TORCH_FP32, OWN_DENSE]
    bf16, fp32 = found[0], found[-2]
    assert bf16.bytes <= 0.6 * 2 * 64 * 96
    assert fp32.bytes == 4 * 64 * 96
    assert fp32.flops == 2.0 * rows * 64 * 96
    assert bf16.flops == 2.0 * rows * (64 * bf16.n_atoms + (64 + bf16.n_atoms) * 96)
    assert all(one.bytes < bf16.bytes for one in found[1 : len(kinds)])
    assert bf16.as_json()["bytes_per_s"] == bf16.bytes / bf16.timing.median


def test_a_wrong_product_is_not_timed(monkeypatch):
    right = linear_speed.CospadiLinear.forward
    monkeypatch.setattr(
        linear_speed.CospadiLinear, "forward", lambda layer, x: 1.1 * right(layer, x)
    )
    with pytest.raises(CospadiError, match="product 64 x 96 differs from its reference by"):
        measure_linears(64, 96, ratio=0.4, rows=2, repeats=1, megabytes=0)


def test_a_ratio_that_leaves_nothing():
    with pytest.raises(InputError):
        measure_linears(64, 96, ratio=1.0, rows=1)


@pytest.fixture(scope="module")
def checkpoint(tiny_model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("speed") / "small"
    compress(tiny_model_dir("llama"), out, method="svd", ratio=0.4)
    return out


def test_models(checkpoint):
    compressed, dense = measure_models(checkpoint, prompt_tokens=5, new_tokens=3, repeats=2)
    assert (compressed.variant, dense.variant) == ("compressed", "dense")
    assert compressed.linear_bytes <= 0.6 * dense.linear_bytes
    assert compressed.decode.n == 6
    assert compressed.prefill.n == 2
    assert compressed.tokens_per_second > 0
    with pytest.raises(InputError, match="exceed the model's context of 128"):
        measure_models(checkpoint, prompt_tokens=120, new_tokens=9)
    with pytest.raises(InputError, match="at least 1 of each"):
        measure_models(checkpoint, prompt_tokens=0)
