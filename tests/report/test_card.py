"""The model card: what it says, and that names cannot become markup."""

from __future__ import annotations

import re

import yaml
from made_up_compression import compression

from cospadi.report.card import MEASURED, model_card, with_measured
from cospadi.report.scores import COMPRESSED, ORIGINAL, Score


def body_of(card):
    front, body = card.removeprefix("---\n").split("---\n", 1)
    return yaml.safe_load(front), body


def test_the_trap_is_the_first_line_and_the_facts_are_there():
    data = compression()
    front, body = body_of(model_card(data))
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["cospadi", "compressed"],
    }
    first = body.splitlines()[0]
    assert first.startswith("**Load with `import cospadi.hf` first.**")
    for fact in (
        f"`{data['calibration']['ids_sha256']}`",
        f"`{data['source']['fingerprint']}`",
        "| removed, bytes as stored | 38.0 % of the linears, 30.4 % of the model |",
        "[report.html](report.html)",
        "cospadi compress MODEL --out NEW --recipe recipe.yaml --threads 2 ",
        "| compressed linears | 210 |",
        "torch 2.13.0",
        "`pip wheel . --no-deps -w dist`",
        "Not measured yet",
    ):
        assert fact in body, fact


def test_a_model_of_the_hub_is_named_as_base():
    source = {"name": "org/model: #1", "kind": "hub"}
    front, _ = body_of(model_card(compression(layers=1, source=source)))
    assert front["base_model"] == "org/model: #1"


def test_what_the_source_states_is_in_the_front_matter():
    source = {"name": "copy", "kind": "folder", "license": "apache-2.0", "base_model": "org/model"}
    front, _ = body_of(model_card(compression(layers=1, source=source)))
    assert (front["license"], front["base_model"]) == ("apache-2.0", "org/model")


def test_the_built_in_text_is_called_what_it_is():
    remark = "the built-in text is for trying out, not for shipping"
    for text, is_said in (("builtin", True), ("builtin[:9]", True), ("builtin.txt", False)):
        recipe = {"method": "cospadi", "calibration": text}
        assert (remark in model_card(compression(layers=1, recipe=recipe))) == is_said


SCORES = [
    Score(
        "/home/me/small", "/data/wiki.test.raw", "perplexity", 24.16, None, "2 windows", COMPRESSED
    ),
    Score("m", "/data/wiki.test.raw", "perplexity", 22.88, None, "2 windows", ORIGINAL),
    Score("m", "piqa", "acc", 0.66, 0.011, "1838 items", ORIGINAL),
    Score("small", "piqa", "acc", 0.65, 0.012, "1838 items", COMPRESSED),
]


def test_measurements_stand_side_by_side_with_their_difference():
    _, body = body_of(model_card(compression(layers=1), SCORES))
    assert "Not measured" not in body and "/data" not in body and "/home" not in body
    rows = [line.replace("\u2009", " ") for line in body.splitlines()]
    at = rows.index("| wiki.test.raw, perplexity | original | 22.88 | – | 2 windows |")
    assert rows[at + 1 : at + 4] == [
        "| wiki.test.raw, perplexity | compressed | 24.16 | +1.28 (+5.6 %) | 2 windows |",
        "| piqa, acc | original | 0.6600 ± 0.0110 | – | 1838 items |",
        "| piqa, acc | compressed | 0.6500 ± 0.0120 | −0.0100 | 1838 items |",
    ]


def test_only_the_section_of_measurements_is_written_anew():
    data = compression(layers=1)
    card = model_card(data).replace("# SmolLM2", "My own words.\n\n# SmolLM2")
    measured = with_measured(card, SCORES)
    assert measured == model_card(data, SCORES).replace("# SmolLM2", "My own words.\n\n# SmolLM2")
    assert with_measured(measured, SCORES) == measured
    assert with_measured(measured, []) == card
    older = card.replace(card[card.index(MEASURED) : card.index("## Reproduce")], "")
    assert with_measured(older, SCORES) == measured
    own = with_measured("nothing of ours\n", SCORES)
    assert own.startswith("nothing of ours\n") and own.count(MEASURED) == 1


def test_measured_names_are_text():
    evil = "a | b\n\n## Reproduce\n[x](http://y) <script>"
    card = model_card(compression(layers=1), [Score(evil, evil, evil, 0.5, None, evil)])
    assert card.count("\n## ") == 2 and not re.search(r"(?<!\\)<script|(?<!\\)\]\(http", card)
    assert with_measured(card, []) == model_card(compression(layers=1))


def test_without_a_tokenizer_the_example_uses_none():
    assert "AutoTokenizer" in model_card(compression(layers=1))
    assert "okenizer" not in model_card(compression(layers=1), has_tokenizer=False)


def test_names_are_text():
    evil = "a | b\n---\n# [x](http://y) <script> `code` **bold**"
    source = {"name": evil, "kind": "hub", "fingerprint": evil}
    data = compression(layers=1, source=source, failed=[evil], calibration={"description": evil})
    front, body = body_of(model_card(data))
    assert front["base_model"] == evil
    prose = re.sub(r"`[^`\n]*`", "", body)  # nothing is markup between back quotes
    assert "\\<script" in prose and not re.search(r"(?<!\\)<script|(?<!\\)\]\(http", prose)
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert all(line.replace("\\|", "").count("|") == 3 for line in rows)
