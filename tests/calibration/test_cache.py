"""Grams on disk: the same bits as an uncached run, and no file that is damaged or of another run is ever used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cospadi.calibration import cache as cache_module
from cospadi.calibration.cache import GramCache, collect_cached_grams, gram_fingerprint
from cospadi.calibration.capture import InputGroup
from cospadi.calibration.statistics import ActivationGram, collect_grams
from cospadi.errors import CheckpointError, InputError
from cospadi.model.discover import discover
from tiny_models import VOCABULARY, make_model


def token_ids(n=6, length=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (n, length), generator=generator)


class Run:
    """One call of `collect_cached_grams`, with what it reported and how often the model ran."""

    def __init__(self, model, targets, ids, folder, *, weights="sha256:00", **arguments):
        self.reports = []
        self.n_batches = 0
        self.passes = []
        self.grams = {}

        def count(done, _total):
            self.n_batches = done

        for finished in collect_cached_grams(
            model,
            targets,
            ids,
            folder=folder,
            weights=weights,
            report=self.reports.append,
            batch_size=2,
            progress=count,
            **arguments,
        ):
            self.passes.append((finished.index, finished.n_passes, len(finished.grams)))
            assert not self.grams.keys() & finished.grams.keys()
            self.grams.update(finished.grams)


def uncached(model, targets, ids):
    return {
        key: gram
        for finished in collect_grams(model, targets, ids, batch_size=2)
        for key, gram in finished.grams.items()
    }


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for key, gram in found.items():
        assert torch.equal(gram.gram, wanted[key].gram)
        assert (gram.n_tokens, gram.n_nonfinite) == (wanted[key].n_tokens, 0)
        assert gram.members == wanted[key].members


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bits_equal_an_uncached_run(family, tmp_path):
    model = make_model(family)
    targets, _ = discover(model)
    ids = token_ids()
    wanted = uncached(model, targets, ids)
    first = Run(model, targets, ids, tmp_path / "new" / "grams")
    assert first.n_batches == 3
    second = Run(model, targets, ids, tmp_path / "new" / "grams")
    assert second.n_batches == 0
    for run in (first, second):
        assert run.reports == []
        assert_equal(run.grams, wanted)
    files = sorted((tmp_path / "new" / "grams").iterdir())
    assert len(files) == len(wanted)
    # half of the full fp64 matrices, panels and header aside
    assert sum(f.stat().st_size for f in files) < sum(g.gram.nbytes for g in wanted.values()) * 1.1


@pytest.mark.parametrize("d_in", [1, 255, 256, 257, 600])
def test_panels_hold_the_whole_gram(d_in, tmp_path):
    root = torch.randn(d_in, d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gram = root + root.T
    cache = GramCache(tmp_path, "f")
    cache.write(ActivationGram(gram, 7, 0, ["a", "b"]))
    found = cache.read(InputGroup("a", ("a", "b"), d_in, 0), torch.device("cpu"))
    assert torch.equal(found.gram, gram)
    assert (found.n_tokens, found.members) == (7, ["a", "b"])
    with safe_open(cache.path("a"), framework="pt") as stored:  # the outside reader agrees
        assert torch.equal(stored.get_tensor("rows_000000"), gram[:256, : min(256, d_in)])
    with pytest.raises(CheckpointError, match=r"expected the tensors|must be"):
        cache.read(InputGroup("a", ("a", "b"), d_in + 1, 0), torch.device("cpu"))


def test_only_what_is_missing_is_collected(tmp_path):
    model = make_model("llama")
    targets, _ = discover(model)
    ids = token_ids()
    first_block = [t for t in targets if t.block == 0]
    Run(model, first_block, ids, tmp_path)
    ran = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: ran.append(1))
    again = Run(model, first_block, ids, tmp_path, max_gram_bytes=8 * 160 * 160 + 1)
    assert again.n_batches == 0
    assert len(again.passes) == 2  # the bound holds for reading: three of 64 features, one of 160
    assert len(ran) == 1  # the probe alone
    everything = Run(model, targets, ids, tmp_path)
    assert everything.passes == [(0, 2, 4), (1, 2, 4)]
    assert list(everything.grams)[:4] == list(again.grams)
    assert_equal(everything.grams, uncached(model, targets, ids))
    skipped = frozenset(t.name for t in targets if t.block == 0)
    rest = Run(model, targets, ids, tmp_path, skip_targets=skipped)
    assert len(rest.grams) == 4
    assert Run(model, targets, ids, tmp_path, skip_targets={t.name for t in targets}).passes == []


def test_reading_is_bounded_without_a_bound_of_the_caller(tmp_path, monkeypatch):
    model = make_model("llama")
    targets, _ = discover(model)
    Run(model, targets, token_ids(), tmp_path)
    monkeypatch.setattr(cache_module, "_READ_BYTES", 8 * 160 * 160)
    assert [n for *_, n in Run(model, targets, token_ids(), tmp_path).passes] == [3, 1, 3, 1]


@pytest.mark.parametrize("change", ["ids", "shape", "weights", "batch", "threads", "dtype"])
def test_another_run_uses_other_files(change, tmp_path, monkeypatch):
    model = make_model("llama")
    ids = token_ids(6, 24)
    wanted = gram_fingerprint(model, ids, weights="w", batch_size=2)
    weights, batch_size = "w", 2
    if change == "ids":
        ids = token_ids(6, 24, seed=1)
    elif change == "shape":
        ids = ids.reshape(12, 12)
    elif change == "weights":
        weights = "x"
    elif change == "batch":
        batch_size = 3
    elif change == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    else:
        model = model.bfloat16()
    assert gram_fingerprint(model, ids, weights=weights, batch_size=batch_size) != wanted


def damage(path: Path, kind: str) -> None:
    content = bytearray(path.read_bytes())
    if kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "empty":
        content = bytearray()
    elif kind == "value":
        content[len(content) // 2] ^= 1
    elif kind == "checksum":
        content[-1] ^= 128
    elif kind == "header":
        content[12] ^= 4
    elif kind == "longer":
        content += b"x"
    path.write_bytes(content)


@pytest.mark.parametrize(
    "kind", ["truncated", "empty", "value", "checksum", "header", "longer", "foreign", "text"]
)
def test_unusable_file_is_reported_and_collected_again(kind, tmp_path):
    model = make_model("llama")
    targets, _ = discover(model)
    ids = token_ids()
    wanted = uncached(model, targets, ids)
    Run(model, targets, ids, tmp_path)
    fingerprint = gram_fingerprint(model, ids, weights="sha256:00", batch_size=2)
    key = "model.layers.1.self_attn.o_proj"
    path = GramCache(tmp_path, fingerprint).path(key)
    if kind == "foreign":  # the same model with other tokens
        other = gram_fingerprint(model, token_ids(seed=5), weights="sha256:00", batch_size=2)
        Run(model, targets, token_ids(seed=5), tmp_path)
        shutil.copy(GramCache(tmp_path, other).path(key), path)
    elif kind == "text":
        path.write_text("not a Gram at all, but long enough to look at")
    else:
        damage(path, kind)
    run = Run(model, targets, ids, tmp_path)
    assert len(run.reports) == 1
    assert f"stored Gram of {key} is not used" in run.reports[0]
    assert "\n" not in run.reports[0]
    assert run.n_batches == 3
    assert run.grams.keys() == wanted.keys()
    for name, gram in run.grams.items():
        assert torch.equal(gram.gram, wanted[name].gram)
    repaired = Run(model, targets, ids, tmp_path)
    assert (repaired.reports, repaired.n_batches) == ([], 0)


def test_every_flipped_byte_is_noticed(tmp_path):
    cache = GramCache(tmp_path, "f")
    gram = torch.eye(3, dtype=torch.float64) * 0.3
    group = InputGroup("a", ("a",), 3, 0)
    cache.write(ActivationGram(gram, 5, 0, ["a"]))
    path = cache.path("a")
    good = path.read_bytes()
    for position in range(len(good)):
        content = bytearray(good)
        content[position] ^= 1
        path.write_bytes(content)
        try:
            found = cache.read(group, torch.device("cpu"))
        except CheckpointError:
            continue
        # blanks behind the JSON of the header carry nothing
        assert torch.equal(found.gram, gram)
        assert found.n_tokens == 5


def test_gram_of_fewer_members_is_not_enough(tmp_path):
    model = make_model("llama")
    ids = token_ids()
    q_alone, _ = discover(model, targets=[r"model\.layers\.0\.self_attn\.q_proj"])
    Run(model, q_alone, ids, tmp_path)
    q_and_k, _ = discover(model, targets=[r"model\.layers\.0\.self_attn\.[qk]_proj"])
    run = Run(model, q_and_k, ids, tmp_path)
    assert "was stored for model.layers.0.self_attn.q_proj, wanted for" in run.reports[0]
    assert_equal(run.grams, uncached(model, q_and_k, ids))
    # more members than wanted are fine
    run = Run(model, q_alone, ids, tmp_path)
    assert (run.reports, run.n_batches) == ([], 0)
    assert_equal(run.grams, uncached(model, q_alone, ids))


def test_killed_writer_leaves_nothing_that_counts(tmp_path, monkeypatch):
    cache = GramCache(tmp_path, "f")
    gram = ActivationGram(torch.eye(3, dtype=torch.float64), 5, 0, ["a"])

    def refuse(_handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refuse)
        with pytest.raises(OSError, match="No space"):
            cache.write(gram)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / f".{cache.path('a').name}.partial-1").write_bytes(b"half")
    assert not cache.holds(InputGroup("a", ("a",), 3, 0))


def test_full_disk_is_reported_and_the_run_goes_on(tmp_path, monkeypatch):
    model = make_model("llama")
    targets, _ = discover(model)
    ids = token_ids()

    def refuse(_handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refuse)
        run = Run(model, targets, ids, tmp_path)
    assert len(run.reports) == 8
    assert "is not stored" in run.reports[0] and "No space left" in run.reports[0]
    assert_equal(run.grams, uncached(model, targets, ids))


def test_bad_arguments(tmp_path):
    model = make_model("llama")
    targets, _ = discover(model)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be made"):
        Run(model, targets, token_ids(), tmp_path / "file" / "grams")
    Run(model, targets, token_ids(), tmp_path)
    with pytest.raises(InputError, match=r"max_gram_bytes = 1000 .* is less"):
        Run(model, targets, token_ids(), tmp_path, max_gram_bytes=1000)
    with pytest.raises(InputError, match="vocabulary"):
        Run(model, targets, token_ids() + VOCABULARY, tmp_path)
    with pytest.raises(InputError, match=r"\[n_samples, length\]"):
        Run(model, targets, token_ids()[0], tmp_path)
