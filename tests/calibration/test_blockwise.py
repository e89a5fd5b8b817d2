"""Blocks on stored hidden states against the ordinary forward, bit for bit, and models where that fails."""

from __future__ import annotations

import copy

import pytest
import torch
from decoder_models import DECODERS, make_decoder, token_ids
from torch import nn

from cospadi.calibration.blockwise import BlockStream, BlockwiseDecoder, BlockwiseError
from cospadi.errors import CospadiError, InputError
from tiny_models import CONTEXT, VOCABULARY, make_model


def block_inputs(model, ids, batch_size):
    """What enters each block in an ordinary forward of each batch, and what leaves the last one."""
    names = BlockwiseDecoder(model).names
    seen = [[] for _ in range(len(names) + 1)]
    handles = []
    for i, name in enumerate(names):
        handles.append(
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kwargs, i=i: seen[i].append(
                    (args[0] if args else kwargs["hidden_states"]).clone()
                ),
                with_kwargs=True,
            )
        )
    handles.append(
        model.get_submodule(names[-1]).register_forward_hook(
            lambda _m, _a, out: seen[-1].append((out[0] if isinstance(out, tuple) else out).clone())
        )
    )
    with torch.no_grad():
        for batch in torch.split(ids, batch_size):
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in seen]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("mapped", [False, True])
def test_hidden_states_equal_the_ordinary_forward(family, mapped, tmp_path):
    model = make_decoder(family)
    ids = token_ids(7)  # batches of 3, 3 and 1
    wanted = block_inputs(model, ids, 3)
    folder = tmp_path if mapped else None
    stream = BlockStream(BlockwiseDecoder(model), ids, batch_size=3, folder=folder)
    for index, hidden in enumerate(wanted[:-1]):
        assert stream.index == index
        assert torch.equal(stream.hidden, hidden)
        stream.advance()
    assert torch.equal(stream.hidden, wanted[-1])
    assert list(tmp_path.iterdir()) == []  # a mapped file has no name to leave behind
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_half_precision_is_stored_without_loss():
    model = make_model("llama").bfloat16()
    ids = token_ids(4)
    wanted = block_inputs(model, ids, 2)
    stream = BlockStream(BlockwiseDecoder(model), ids, batch_size=2)
    assert stream.hidden.dtype == torch.float32
    assert stream.run(slice(0, 2)).dtype == torch.bfloat16
    for hidden in wanted[:-1]:
        assert torch.equal(stream.hidden, hidden.float())
        stream.advance()
    assert torch.equal(stream.hidden, wanted[-1].float())


def test_stream_follows_the_model_and_fork_is_independent():
    model = make_model("llama")
    ids = token_ids(4)
    decoder = BlockwiseDecoder(model)
    stream = BlockStream(decoder, ids, batch_size=4)
    original = copy.deepcopy(model.model.layers[0])
    plain = block_inputs(model, ids, 4)
    model.model.layers[0].mlp.down_proj = nn.Linear(160, 64, bias=False)
    changed = block_inputs(model, ids, 4)
    other = stream.fork()
    stream.advance()
    other.advance(original)
    assert torch.equal(stream.hidden, changed[1])
    assert torch.equal(other.hidden, plain[1])
    assert not torch.equal(stream.hidden, other.hidden)
    assert (stream.index, other.index) == (1, 1)
    before = other.hidden.clone()
    other.run(slice(0, 4))
    assert torch.equal(other.hidden, before)
    assert other.index == 1


class Block(nn.Module):
    """A block with an input by name, or with an output that is none."""

    def __init__(self, features, output=None):
        super().__init__()
        self.linear = nn.Linear(features, features)
        self.output = output

    def forward(self, hidden_states, **kwargs):  # noqa: D102
        if self.output is not None:
            return self.output
        return (hidden_states + self.linear(hidden_states), kwargs)


class OddModel(nn.Module):
    """Blocks of which something is not as in other decoders."""

    def __init__(self, oddity):
        super().__init__()
        self.oddity = oddity
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.extra = nn.Embedding(VOCABULARY, 16)
        output = {"a": 1} if oddity == "output" else None
        self.layers = nn.ModuleList([Block(16, output) for _ in range(3)])

    def get_input_embeddings(self):  # noqa: D102
        return self.embed

    def forward(self, input_ids, use_cache):  # noqa: D102
        hidden = self.embed(input_ids)
        layers = list(self.layers)
        if self.oddity == "order":
            layers = layers[::-1]
        for i, layer in enumerate(layers):
            if self.oddity == "unnamed":
                hidden = layer(hidden_states=None)[0]
            if self.oddity == "between" and i == 2:
                hidden = hidden * 2
            hidden = layer(hidden_states=hidden)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return hidden


class TokenArguments(OddModel):
    """Gives its blocks something that depends on the tokens."""

    def forward(self, input_ids, use_cache):  # noqa: D102
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden_states=hidden, extra=self.extra(input_ids))[0]
        return hidden


class TokenBlock(Block):
    """Uses what depends on the tokens."""

    def forward(self, hidden_states, extra):  # noqa: D102
        return (hidden_states + extra,)


def test_hidden_states_by_name():
    model = OddModel(None)
    stream = BlockStream(BlockwiseDecoder(model), token_ids(4), batch_size=3)
    for _ in range(3):
        stream.advance()
    with torch.no_grad():
        wanted = torch.cat([model(batch, False) for batch in torch.split(token_ids(4), 3)])
    assert torch.equal(stream.hidden, wanted)


@pytest.mark.parametrize(
    ("oddity", "match"),
    [
        ("order", r"3 blocks are called in the order \[2, 1, 0\]"),
        ("between", "hidden states change between blocks 1 and 2"),
        ("unnamed", "block 0 is called without hidden states"),
        ("output", "block 0 returns dict instead of hidden states"),
    ],
)
def test_models_that_cannot_be_cut_are_named(oddity, match):
    model = OddModel(oddity)
    with pytest.raises(BlockwiseError, match=match) as caught:
        BlockStream(BlockwiseDecoder(model), token_ids(2))
    assert isinstance(caught.value, CospadiError)
    assert "OddModel cannot be run block by block" in str(caught.value)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_arguments_that_depend_on_tokens_are_noticed():
    model = TokenArguments(None)
    BlockStream(BlockwiseDecoder(model), token_ids(2))  # passed but not used: no harm
    model.layers[1] = TokenBlock(16)
    with pytest.raises(BlockwiseError, match="block 1 on stored hidden states gives other values"):
        BlockStream(BlockwiseDecoder(model), token_ids(2))


def test_training_mode_with_dropout_is_noticed():
    with pytest.raises(BlockwiseError, match="GPT2LMHeadModel cannot be run block by block"):
        BlockStream(BlockwiseDecoder(make_model("gpt2").train()), token_ids(2))


def test_bad_arguments(tmp_path):
    decoder = BlockwiseDecoder(make_model("llama"))
    with pytest.raises(InputError, match="batch_size"):
        BlockStream(decoder, token_ids(), batch_size=0)
    with pytest.raises(InputError, match=r"\[n_samples, length\]"):
        BlockStream(decoder, token_ids()[0])
    with pytest.raises(InputError, match="vocabulary"):
        BlockStream(decoder, token_ids() + VOCABULARY)
    with pytest.raises(InputError, match="exceed the model's context"):
        BlockStream(decoder, token_ids(1, CONTEXT + 1))
    with pytest.raises(InputError, match="cannot hold 43008 bytes of hidden states"):
        BlockStream(decoder, token_ids(), folder=tmp_path / "missing")
