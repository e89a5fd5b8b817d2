"""Calibration windows: what is chosen, that it is always the same, and the errors."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cospadi.calibration.data import builtin_text, load_calibration
from cospadi.calibration.ids import ids_sha256
from cospadi.calibration.text import DocumentRange, read_documents, split_range, wikitext_rows
from cospadi.errors import InputError


def stream_of(tokenizer, documents):
    ids = [tokenizer(d + "\n\n", add_special_tokens=False)["input_ids"] for d in documents]
    return [i for document in ids for i in document]


def fails(match, *arguments, **keywords):
    with pytest.raises(InputError, match=match) as caught:
        load_calibration(*arguments, **keywords)
    assert "\n" not in str(caught.value)


def test_windows_are_distinct_pieces_of_the_stream(tiny_text, tiny_tokenizer):
    made = load_calibration(tiny_text, tiny_tokenizer, n_samples=10, sequence_length=50, seed=3)
    assert (made.ids.dtype, made.ids.shape) == (torch.int64, (10, 50))
    stream = stream_of(tiny_tokenizer, [tiny_text.read_text()])
    windows = [stream[i * 50 : (i + 1) * 50] for i in range(len(stream) // 50)]
    chosen = [windows.index(row) for row in made.ids.tolist()]
    assert len(set(chosen)) == 10
    assert chosen != sorted(chosen)


def test_seed_decides_and_fewer_samples_are_a_prefix(tiny_text, tiny_tokenizer):
    def make(n, seed):
        return load_calibration(
            tiny_text, tiny_tokenizer, n_samples=n, sequence_length=32, seed=seed
        )

    first = make(20, 0)
    assert torch.equal(first.ids, make(20, 0).ids)
    assert first.sha256 == make(20, 0).sha256
    assert torch.equal(first.ids[:7], make(7, 0).ids)
    assert first.sha256 != make(20, 1).sha256
    assert not torch.equal(first.ids, make(20, 1).ids)


def test_hash_is_of_little_endian_int64():
    ids = torch.tensor([[1, 2], [3, 400]], dtype=torch.int32)
    wanted = hashlib.sha256(struct.pack("<4q", 1, 2, 3, 400)).hexdigest()
    assert ids_sha256(ids) == wanted
    assert ids_sha256(ids.T.contiguous().T) == wanted


def test_choice_does_not_depend_on_the_global_generator(tiny_text, tiny_tokenizer):
    hashes = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        made = load_calibration(tiny_text, tiny_tokenizer, n_samples=3, sequence_length=40)
        hashes.add(made.sha256)
    assert len(hashes) == 1


def test_each_window_begins_with_the_leading_special_tokens(tiny_text, tiny_tokenizer_bos):
    made = load_calibration(tiny_text, tiny_tokenizer_bos, n_samples=5, sequence_length=20)
    assert made.ids.shape == (5, 20)
    assert (made.ids[:, 0] == 0).all()
    assert (made.ids[:, 1:] != 0).all()


def test_json_lines_and_folder(tmp_path, tiny_tokenizer):
    documents = [f"Document {i} speaks of {i * i} things. " * 5 for i in range(6)]
    lines = [json.dumps({"text": d, "id": 1}) for d in documents]
    (tmp_path / "b.jsonl").write_text("\n".join([*lines, "", '{"text": " "}']))
    made = load_calibration(tmp_path / "b.jsonl", tiny_tokenizer, n_samples=2, sequence_length=30)
    assert "6 documents" in made.description
    assert str(tmp_path) not in made.description
    assert "seed 0" in made.description

    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("behind")
    (tmp_path / "a.txt").write_text("before")
    (tmp_path / "ignored.bin").write_bytes(b"\xff\xfe")
    _, found = read_documents(tmp_path)
    assert list(found) == ["before", *documents, "behind"]


def test_text_beyond_the_limit_is_not_read(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr("cospadi.calibration.data._LEAST_CHARACTERS", 1000)
    path = tmp_path / "big.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i:0399d} "}) for i in range(50)))
    made = load_calibration(path, tiny_tokenizer, n_samples=2, sequence_length=20)
    assert "first 3 documents, 1000 characters" in made.description


def test_text_too_short_states_both_counts(tmp_path, tiny_tokenizer):
    path = tmp_path / "short.txt"
    path.write_text("one two three")
    fails(
        "short.txt.*make 0 windows of 64 tokens, 4 were asked",
        path,
        tiny_tokenizer,
        n_samples=4,
        sequence_length=64,
    )
    path.write_text("")
    fails("0 tokens make 0 windows", path, tiny_tokenizer, n_samples=1, sequence_length=2)


def test_bad_sources(tmp_path, tiny_tokenizer):
    fails("does not exist", "nothing.txt", tiny_tokenizer)
    fails("does not exist", tmp_path / "nothing", tiny_tokenizer)
    fails("does not exist", "nothing.safetensors", tiny_tokenizer)
    fails("holds no .txt", tmp_path, tiny_tokenizer)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\n')
    fails("bad.jsonl, line 2 must be", bad, tiny_tokenizer)
    bad.write_text('{"text": "fine"}\n\n{"text": ')
    fails("bad.jsonl, line 3 is not valid JSON", bad, tiny_tokenizer)
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\x89\xff\xfe\x00")
    fails("binary.txt is not UTF-8", binary, tiny_tokenizer)
    fails("n_samples must be at least 1", tiny_tokenizer, tiny_tokenizer, n_samples=0)
    fails("sequence_length must be at least 2", "builtin", tiny_tokenizer, sequence_length=1)
    fails("name.:config", "a:b:c:d", tiny_tokenizer)


def test_hub_data_set_without_network_fails_at_once(tiny_tokenizer):
    pytest.importorskip("datasets")
    fails("hub cannot be reached", "someone/corpus:en", tiny_tokenizer)


def test_hub_data_set_is_streamed(tiny_tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    seen = []

    def load_dataset(name, config, **arguments):
        seen.append((name, config, arguments))
        return ({"text": f"row {i} " * 40} for i in range(50))

    monkeypatch.setattr("cospadi.calibration.text.require_hub", lambda *a, **k: True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    made = load_calibration(
        "someone/corpus:en:validation", tiny_tokenizer, n_samples=4, sequence_length=16
    )
    assert made.ids.shape == (4, 16)
    assert seen == [("someone/corpus", "en", {"split": "validation", "streaming": True})]
    load_calibration("someone/corpus", tiny_tokenizer, n_samples=4, sequence_length=16)
    assert seen[1] == ("someone/corpus", None, {"split": "train", "streaming": True})


def test_builtin_halves_are_disjoint_and_large():
    from pydoc_data.topics import topics

    halves = {half: builtin_text(half) for half in ("calibration", "evaluation")}
    assert sum(map(len, halves.values())) == sum(map(len, topics.values())) + 2 * (len(topics) - 2)
    assert min(map(len, halves.values())) > 100_000
    name = sorted(topics)[1]
    assert topics[name] in halves["evaluation"]
    assert topics[name] not in halves["calibration"]


def test_builtin_windows_overlap_only_if_they_must(tiny_tokenizer):
    few = load_calibration("builtin", tiny_tokenizer, n_samples=4, sequence_length=64)
    assert "overlapping" not in few.description
    n_tokens = int(few.description.split(" characters, ")[1].split(" tokens")[0])
    n = n_tokens // 1024 + 5
    many = load_calibration("builtin", tiny_tokenizer, n_samples=n, sequence_length=1024, seed=1)
    assert f"{n} overlapping windows" in many.description
    assert len({tuple(row) for row in many.ids.tolist()}) == n
    other = load_calibration("builtin", tiny_tokenizer, n_samples=n, sequence_length=1024, seed=2)
    assert other.sha256 != many.sha256
    fails("too short", "builtin", tiny_tokenizer, n_samples=1, sequence_length=10**6)


def test_token_ids_are_taken_as_they_are(tmp_path, tiny_tokenizer):
    ids = torch.arange(60, dtype=torch.int32).reshape(6, 10)
    path = tmp_path / "ids.safetensors"
    save_file({"calibration": ids, "test": ids + 1}, path)
    everything = load_calibration(path, tiny_tokenizer)
    assert torch.equal(everything.ids, ids.long())
    part = load_calibration(str(path), tiny_tokenizer, n_samples=2, sequence_length=7, seed=9)
    assert torch.equal(part.ids, ids[:2, :7].long())
    fails("holds 6 x 10 token ids, 7 x 10", path, tiny_tokenizer, n_samples=7)

    save_file({"anything": torch.arange(100)}, path)
    stream = load_calibration(path, tiny_tokenizer, n_samples=5, sequence_length=20)
    assert sorted(stream.ids.flatten().tolist()) == list(range(100))

    save_file({"a": ids, "b": ids + 1}, path)
    fails("needs a tensor named 'calibration'", path, tiny_tokenizer)
    save_file({"calibration": ids.float()}, path)
    fails("must hold integer token ids", path, tiny_tokenizer)
    path.write_bytes(path.read_bytes()[:50])
    fails("not a readable safetensors", path, tiny_tokenizer)


def test_wikitext_rows_follow_the_published_data_set():
    raw = " \n = Title = \n \n Some text . \n Second . \n"
    rows = ["", " = Title = \n", "", " Some text . \n", " Second . \n"]
    assert wikitext_rows(raw) == "\n\n".join(rows)
    assert wikitext_rows(raw.rstrip("\n")) == "\n\n".join(rows)


# ---- document ranges -----------------------------------------------------------------------------


def write_lines(path, n):
    """Write documents "doc 0", "doc 1", ... with a blank document behind each third."""
    lines = []
    for i in range(n):
        lines.append(json.dumps({"text": f"doc {i}"}))
        if i % 3 == 2:
            lines.append(json.dumps({"text": " "}))
    path.write_text("\n".join(lines))
    return [f"doc {i}" for i in range(n)]


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        ("[:4]", slice(None, 4)),
        ("[4:]", slice(4, None)),
        ("[2:7]", slice(2, 7)),
        ("[ 2 : 7 ]", slice(2, 7)),
        ("[:]", slice(None)),
        ("[9:10]", slice(9, 10)),
        ("[0:10]", slice(0, 10)),
    ],
)
def test_range_is_the_python_slice_of_the_documents(tmp_path, written, wanted):
    documents = write_lines(tmp_path / "a.jsonl", 10)
    name, found = read_documents(f"{tmp_path}/a.jsonl{written}")
    assert list(found) == documents[wanted]
    assert name.startswith("a.jsonl[")
    _, found = read_documents(tmp_path / f"a.jsonl{written}")
    assert list(found) == documents[wanted]
    _, found = read_documents(f"{tmp_path}{written}")  # the folder
    assert list(found) == documents[wanted]


@given(
    st.integers(0, 50).flatmap(
        lambda start: st.tuples(st.just(start), st.none() | st.integers(start + 1, 99))
    )
)
def test_range_reads_back_what_it_writes(bounds):
    wanted = DocumentRange(*bounds)
    assert split_range(f"owner/corpus:en:train{wanted}") == ("owner/corpus:en:train", wanted)


@pytest.mark.parametrize(
    ("written", "match"),
    [
        ("[:11]", r"range \[:11\] of a.jsonl: it holds 10 documents"),
        ("[10:]", "holds 10 documents"),
        ("[3:12]", "holds 10 documents"),
        ("[-2:]", r"expected \[start:stop\]"),
        ("[:-2]", r"expected \[start:stop\]"),
        ("[3]", r"expected \[start:stop\]"),
        ("[0:8:2]", r"expected \[start:stop\]"),
        ("[]", r"expected \[start:stop\]"),
        ("[5:5]", "selects no document"),
        ("[5:2]", "selects no document"),
    ],
)
def test_bad_ranges(tmp_path, tiny_tokenizer, written, match):
    write_lines(tmp_path / "a.jsonl", 10)
    fails(match, f"{tmp_path}/a.jsonl{written}", tiny_tokenizer, n_samples=1, sequence_length=2)


def test_range_of_one_document_and_of_the_builtin_text(tmp_path, tiny_tokenizer):
    (tmp_path / "a.txt").write_text("one document")
    assert list(read_documents(f"{tmp_path}/a.txt[:1]")[1]) == ["one document"]
    for written in ("[1:]", "[:2]"):
        _, found = read_documents(f"{tmp_path}/a.txt{written}")
        with pytest.raises(InputError, match=r"a\.txt: it holds 1 documents"):
            list(found)
    halves = builtin_text("calibration")
    name, found = read_documents("builtin[:3]")
    documents = list(found)
    assert len(documents) == 3
    assert halves.startswith("\n\n".join(documents))
    assert name.endswith("[:3]")
    _, found = read_documents("builtin[:1000]")
    with pytest.raises(InputError, match=r"range \[:1000\] of builtin"):
        list(found)
    made = load_calibration("builtin[:1]", tiny_tokenizer, n_samples=30, sequence_length=64)
    assert "overlapping" in made.description


def test_range_of_missing_files_and_of_token_ids(tmp_path, tiny_tokenizer):
    fails("does not exist", "nothing.jsonl[:3]", tiny_tokenizer)
    fails("does not exist", tmp_path / "nothing[:3]", tiny_tokenizer)
    save_file({"a": torch.arange(9)}, tmp_path / "ids.safetensors")
    fails("token ids have no documents", f"{tmp_path}/ids.safetensors[:3]", tiny_tokenizer)


def test_brackets_in_names_stay_names(tmp_path):
    documents = write_lines(tmp_path / "a.jsonl", 5)
    (tmp_path / "part[1:2]").mkdir()
    write_lines(tmp_path / "part[1:2]" / "a.jsonl", 4)
    assert list(read_documents(f"{tmp_path}/part[1:2]")[1]) == documents[:4]
    assert list(read_documents(f"{tmp_path}/part[1:2][3:]")[1]) == documents[3:4]
    (tmp_path / "b[7].jsonl").write_text('{"text": "only"}')
    assert list(read_documents(tmp_path / "b[7].jsonl")[1]) == ["only"]
    (tmp_path / "a.jsonl[:2]").write_text("a file of this very name")
    assert list(read_documents(f"{tmp_path}/a.jsonl[:2]")[1]) == ["a file of this very name"]


def test_windows_of_a_range_never_see_other_documents(tmp_path, tiny_tokenizer):
    def write(path, behind):
        documents = [f"Document {i} speaks of {i * i} things. " * 5 for i in range(12)]
        documents[8:] = [behind] * 4
        path.write_text("\n".join(json.dumps({"text": d}) for d in documents))

    made = []
    for number, behind in enumerate(("unseen " * 40, "other words " * 90)):
        path = tmp_path / f"{number}" / "text.jsonl"
        path.parent.mkdir()
        write(path, behind)
        made.append(
            load_calibration(f"{path}[:8]", tiny_tokenizer, n_samples=9, sequence_length=64)
        )
        # damage behind the range is not even read
        path.write_text("\n".join([*path.read_text().split("\n")[:8], "{damaged"]))
        again = load_calibration(f"{path}[:8]", tiny_tokenizer, n_samples=9, sequence_length=64)
        assert again.sha256 == made[-1].sha256
    assert made[0].sha256 == made[1].sha256
    assert made[0].description == made[1].description
    assert "text.jsonl[:8]: 8 documents" in made[0].description


def test_range_of_a_hub_data_set_reads_no_further(tiny_tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    read = []

    def rows():
        for i in range(50):
            read.append(i)
            yield {"text": f"row {i} " * 40}

    monkeypatch.setattr("cospadi.calibration.text.require_hub", lambda *a, **k: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: rows())
    made = load_calibration(
        "someone/corpus:en[2:6]", tiny_tokenizer, n_samples=4, sequence_length=16
    )
    assert read == list(range(6))
    assert "someone/corpus:en[2:6]: 4 documents" in made.description
