"""The model card: what it says, and that names cannot become markup."""

from __future__ import annotations

import re

import yaml
from made_up_compression import compression

from cospadi.report.card import model_card


def body_of(card):
    front, body = card.removeprefix("---\n").split("---\n", 1)
    return yaml.safe_load(front), body


def test_the_trap_is_the_first_line_and_the_facts_are_there():
    data = compression()
    front, body = body_of(model_card(data))
    assert front == {"library_name": "transformers", "tags": ["cospadi", "compressed"]}
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
    ):
        assert fact in body, fact


def test_a_model_of_the_hub_is_named_as_base():
    source = {"name": "org/model: #1", "kind": "hub"}
    front, _ = body_of(model_card(compression(layers=1, source=source)))
    assert front["base_model"] == "org/model: #1"


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
