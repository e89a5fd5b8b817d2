"""Weights in huge pages: the same tensors with the same values, elsewhere."""

from __future__ import annotations

import copy
import gc
import mmap
import weakref

import pytest
import torch
from torch import nn

from cospadi.model.huge_pages import use_huge_pages

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages on request"
)


def layers() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(70, 30), nn.Linear(30, 3, bias=False), nn.Linear(70, 30))
    model[2].weight = model[0].weight  # tied
    model[1].register_buffer("mask", torch.arange(33, dtype=torch.uint8))
    model[1].register_buffer("none", torch.empty(0))
    return model.bfloat16()


def test_values_stay_and_tensors_stay_the_same_objects():
    model = layers()
    before = copy.deepcopy(model.state_dict())
    objects = {name: id(tensor) for name, tensor in model.named_parameters()}
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    moved = use_huge_pages(model, least_bytes=0)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.dtype == before[name].dtype
        if tensor.numel():
            assert tensor.data_ptr() != places[name], name
            assert tensor.data_ptr() % 64 == 0
    assert {name: id(tensor) for name, tensor in model.named_parameters()} == objects
    assert model[2].weight is model[0].weight
    assert moved == 2 * (70 * 30 + 2 * 30 + 30 * 3) + 33


def test_tensors_have_storages_of_their_own():
    model = layers()
    use_huge_pages(model, least_bytes=0)
    storages = [tensor.untyped_storage() for tensor in model.parameters()]
    assert len({storage.data_ptr() for storage in storages}) == len(storages)
    for tensor, storage in zip(model.parameters(), storages, strict=True):
        assert storage.nbytes() == tensor.nbytes


def test_training_and_copies_go_on_as_before():
    model = layers().float()
    use_huge_pages(model, least_bytes=0)
    model[0](torch.randn(2, 70)).sum().backward()
    assert model[0].weight.grad is not None
    with torch.no_grad():
        model[0].weight.add_(1.0)
    twin = copy.deepcopy(model)
    assert torch.equal(twin[0].weight, model[0].weight)
    assert twin[0].weight.data_ptr() != model[0].weight.data_ptr()


def test_memory_goes_with_the_last_tensor():
    model = layers()
    use_huge_pages(model, least_bytes=0)
    held = [weakref.ref(tensor) for tensor in model.parameters()]
    del model
    gc.collect()
    assert all(ref() is None for ref in held)


def test_small_models_views_and_other_devices_stay_where_they_are():
    model = layers()
    place = model[0].weight.data_ptr()
    assert use_huge_pages(model) == 0
    assert model[0].weight.data_ptr() == place
    whole = torch.randn(20, 4)
    part = nn.Module()
    part.register_buffer("view", whole[4:8])
    part.register_buffer("meta", torch.empty(3, device="meta"))
    assert use_huge_pages([part], least_bytes=0) == 0
    assert part.view.data_ptr() == whole[4:8].data_ptr()


def test_several_chunks(monkeypatch):
    from cospadi.model import huge_pages

    monkeypatch.setattr(huge_pages, "_CHUNK_BYTES", 300)
    model = layers()
    before = copy.deepcopy(model.state_dict())
    assert use_huge_pages(model, least_bytes=0) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_without_memory_nothing_happens(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no memory")

    model = layers()
    place = model[0].weight.data_ptr()
    monkeypatch.setattr("cospadi.model.huge_pages.mmap.mmap", refuse)
    assert use_huge_pages(model, least_bytes=0) == 0
    assert model[0].weight.data_ptr() == place
