"""The pages hang together: links lead somewhere, the index is complete, computed figures are those of the program."""

from __future__ import annotations

import re

import pytest
import transformers
from snippets import DOCUMENTS, ROOT
from torch import device

from cospadi.model.discover import discover
from cospadi.pipeline.memory import estimate, possible_layouts
from cospadi.pipeline.plan import make_plan
from cospadi.pipeline.recipe import Recipe

PAGES = (*DOCUMENTS, "FORMAT.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
SIZES = {
    "SmolLM2-135M": ("Llama", 49152, 576, 1536, 30, 9, 3, 64, True),
    "Llama-3.2-1B": ("Llama", 128256, 2048, 8192, 16, 32, 8, 64, True),
    "Llama-3.1-8B": ("Llama", 128256, 4096, 14336, 32, 32, 8, 128, False),
    "Qwen2.5-7B": ("Qwen2", 152064, 3584, 18944, 28, 28, 4, 128, False),
    "Qwen3-8B": ("Qwen3", 151936, 4096, 12288, 36, 32, 8, 128, False),
}
"""Family, vocabulary, width, MLP width, layers, heads, heads of keys, head width, whether the head is tied."""


@pytest.mark.parametrize("document", PAGES)
def test_links_lead_somewhere(document):
    path = ROOT / document
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_the_index_names_every_page():
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def shapes_of(name):
    family, vocabulary, hidden, mlp, layers, heads, key_heads, head, is_tied = SIZES[name]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head,
        tie_word_embeddings=is_tied,
    )
    with device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def gigabytes(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g}"


@pytest.mark.parametrize("name", SIZES)
def test_the_table_of_memory_is_what_plan_computes(name, monkeypatch):
    # of a process that has loaded what a plan needs, not all that other tests loaded before
    monkeypatch.setattr("cospadi.pipeline.memory.resident_bytes", lambda: 400_000_000)
    text = (ROOT / "docs/resources.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", text, re.MULTILINE)
    shapes, recipe = shapes_of(name), Recipe(ratio=0.3)
    targets, skipped = discover(shapes)
    plan = make_plan(targets, skipped, recipe)
    layouts = possible_layouts(targets, recipe, spill=False, is_streamable=True)
    needs = [estimate(shapes, targets, plan, recipe, layout, fits_bytes=0) for layout in layouts]
    peaks = [need.peak_bytes for need in needs]
    linears, output, *memory = (cell.replace("GB", "").strip() for cell in row.split("|"))
    assert linears == f"{gigabytes(plan.dense_bits / 8)} to {gigabytes(plan.stored_bits / 8)}"
    assert output == gigabytes(needs[0].output_bytes)
    expected = [value / 1e9 for value in (peaks[0], peaks[1], min(peaks))]
    assert list(map(float, memory)) == pytest.approx(expected, rel=0.01, abs=0.03)
