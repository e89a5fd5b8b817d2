"""The page of one compression: self-contained, escaped, complete, and ordered by the numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from made_up_compression import SHIFTED, compression
from page_reader import Reader, assert_self_contained

from cospadi.cli.app import app
from cospadi.errors import InputError
from cospadi.report import parts
from cospadi.report.compression import read_compression
from cospadi.report.compression_page import HOW_TO_MEASURE, STYLES, compression_page
from cospadi.report.linear_table import linear_table
from cospadi.report.maps import colour_scale
from cospadi.report.scores import (
    COMPRESSED,
    ORIGINAL,
    difference,
    kept_scores,
    merged,
    read_scores,
    to_plain,
)

CSS = "".join(Path(parts.__file__).with_name(name).read_text(encoding="utf-8") for name in STYLES)
EVIL = '</style></title><script>alert("1")</script>&amp;\x1b[31m\x00\ud800 é漢字\u202e'


def evaluation(model, perplexity, text="wiki.test.raw"):
    return {
        "model": model,
        "text": text,
        "perplexity": perplexity,
        "windows": 16,
        "context": 1024,
        "ids_sha256": "ab" * 32,
    }


def odd():
    data = compression(layers=1, notes=[EVIL], failed=[EVIL])
    module = next(iter(data["modules"].values()))
    data["modules"] = {EVIL: {**module, "leader": EVIL, "whitening": [EVIL]}, f"a.3.{EVIL}": module}
    data["modules"][f"a.{'9' * 5000}.b"] = module
    for part in ("source", "recipe", "calibration", "versions"):
        data[part] = {EVIL: EVIL, "name": EVIL, "method": EVIL, "description": EVIL}
    data["stages"] = {EVIL: 3.0}
    data["dense"] = [{"module": EVIL, "reason": EVIL}]
    return data


COMPRESSIONS = {
    "whole model": compression,
    "one linear": lambda: {
        **compression(layers=1),
        "modules": dict(list(compression(layers=1)["modules"].items())[:1]),
    },
    "without calibration": lambda: compression(layers=1, calibration=None, allocation=None),
    "older report": lambda: {
        "modules": {"a.0.b": {"relative_error": 0.1}},
        "ratio": {"stored": 0.2},
    },
    "nothing": dict,
    "odd names": odd,
}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_pages_are_well_formed_and_self_contained(name):
    data = COMPRESSIONS[name]()
    text = compression_page(data)
    reader = Reader(text)
    assert_self_contained(reader)
    assert re.findall(r"<style>(.*?)</style>", text, re.DOTALL) == [CSS]
    assert not re.search(r"url\(|@import|https?:", CSS)
    assert not re.search(r"\b(nan|NaN|inf|None|undefined)\b", reader.text)
    assert text == compression_page(data)


def test_odd_names_are_text():
    text = compression_page(odd(), read_scores(evaluation(EVIL, 3.0, EVIL), "e.json"))
    assert "\x1b" not in text and "\x00" not in text
    reader = Reader(text)
    assert "script" not in reader.tags
    shown = '</style></title><script>alert("1")</script>&amp;\ufffd[31m'
    assert reader.text.count(shown) >= 12
    text.encode("utf-8")  # no lone surrogate is left


def test_everything_is_there():
    data = compression()
    reader = Reader(compression_page(data))
    for fact in (
        "210 linears of SmolLM2-135M-Instruct.Q4_1.gguf compressed by method cospadi",
        data["calibration"]["description"],
        data["calibration"]["ids_sha256"],
        data["source"]["fingerprint"],
        "torch 2.13.0",
        "0.0695 nats per token, with the same share for all 0.1602",
        f"2 linears: {SHIFTED[0]}, then {SHIFTED[1]} model.layers.0.mlp.down_proj",
        "42.7 to 113.8 calibration tokens per input dimension; fewest: model.layers.0.mlp.down_proj",
        "Input channels that stay at zero : in 2 linears model.layers.0.mlp.down_proj (3)",
        "208 linears: cholesky (nothing to repair)",
        "14 learned atoms of 7 linears were used by no output at the end",
        "the GGUF file was dequantised from Q4_1",
        "1 tensor : not in a block lm_head",
        "Taken where it helped: 2 of 3 blocks",
        "On 2 threads. Interrupted and resumed: 3 linears",
        "cospadi compress MODEL --out NEW --recipe recipe.yaml --threads 2",
    ):
        assert fact in reader.text, fact
    assert ["division of the budget", "1\u20091\u2009100"[2:], "45.8\u2009%"] in reader.rows
    assert ["0", "0.0164", "0.0150", "not better: left as fitted", "9.5"] in reader.rows


def test_bytes_and_ratios_are_those_of_the_data():
    data = compression(layers=1)
    data["bytes"] = {
        "linears": {"dense": 10_000_000, "stored": 7_500_000},
        "model": {"dense": 20_000_000, "stored": 17_500_000},
    }
    data["ratio"] = {"stored": 0.25, "values": 0.3, "mask16": 0.26, "mask14": 0.29}
    data["model_ratio"] = {"stored": 0.125, "values": 0.15}
    rows = [[c.replace("\u2009", "") for c in row] for row in Reader(compression_page(data)).rows]
    assert ["compressed linears", "10.0MB", "7.50MB", "25.0%", "30.0%", "26.0%", "29.0%"] in rows
    assert ["whole model", "20.0MB", "17.5MB", "12.5%", "15.0%", "–", "–"] in rows


def test_linears_are_shown_with_their_numbers():
    data = compression(layers=2)
    name = "model.layers.1.mlp.up_proj"
    data["modules"][name] |= {
        "d_in": 576, "d_out": 1536, "n_identity": 576, "n_atoms": 200, "sparsity": 300,
        "coeffs_dtype": "int8", "dictionary_dtype": "float16", "dense_bytes": 1_769_472,
        "stored_bytes": 884_736, "relative_error": 0.12345, "weight_error": 0.5, "seconds": 3.21,
    }  # fmt: skip
    data["allocation"] = {"losses": {name: 1.5e-4}, "even_losses": {name: 2e-3}}
    data["modules"][name]["leader"] = "model.layers.0.mlp.up_proj"
    rows = Reader(compression_page(data)).rows
    (row,) = [row for row in rows if row[0].startswith(name)]
    assert row[0].endswith("dictionary of model.layers.0.mlp.up_proj")
    assert row[1:] == [
        *("576 × 1536", "576", "200", "300", "int8", "float16", "8.00", "0.88", "50.0"),
        *("0.1235", "0.5000", "113.8", "1.50e−04", "2.00e−03", "3.2"),
    ]


def test_every_order_is_that_of_its_numbers_and_known_to_the_style_sheet():
    found = read_compression(compression(layers=4))
    linears = list(found.linears)
    table = linear_table(linears)
    orders = {node.get("id").removeprefix("order-") for node in table.iter("input")} - {"model"}
    assert orders == {"atoms", "bits", "bytes", "kept", "error", "loss", "seconds"}
    values = {
        "error": lambda item: item.relative_error,
        "bytes": lambda item: item.stored_bytes,
        "seconds": lambda item: item.seconds,
    }
    rows = list(table.find(".//tbody"))
    for order in orders:
        assert f"#order-{order}:checked) tbody tr {{ order: var(--by-{order}); }}" in CSS
        places = [int(re.search(rf"--by-{order}:(\d+)", row.get("style"))[1]) for row in rows]
        assert sorted(places) == list(range(len(linears)))
        if order in values:
            shown = [
                value for _, value in sorted(zip(places, map(values[order], linears), strict=True))
            ]
            assert shown == sorted(shown, reverse=True)
    assert all(len(row) == 1 + int(table.find(".//table").get("style")[-2:]) for row in rows)


def test_colours_of_the_map_are_those_of_the_errors():
    data = compression(layers=3)
    errors = {name: item["relative_error"] for name, item in data["modules"].items()}
    text = compression_page(data)
    worst, best = max(errors, key=errors.get), min(errors, key=errors.get)

    def brightness(name):
        layer, projection = re.match(r"model\.layers\.(\d+)\.(.*)", name).groups()
        title = f"layer {layer}, {projection}: {errors[name]:.3f}"
        found = re.search(rf'fill="#(\w+)"[^>]*><title>{re.escape(title)}', text)
        return sum(int(found[1][i : i + 2], 16) for i in (0, 2, 4))

    assert brightness(worst) > brightness(best)
    assert f"mean {sum(errors.values()) / len(errors):.3f}" in text


def test_failures_come_first_and_are_counted():
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(5)]
    dense = [{"module": "lm_head", "reason": "meant"}]
    dense += [{"module": name, "reason": "Gram is zero"} for name in names]
    reader = Reader(compression_page(compression(layers=1, dense=dense, failed=names)))
    assert "Partial: 5 linears had to stay dense" in reader.text
    assert reader.text.index("failed, 5 tensors : Gram is zero") < reader.text.index(
        "1 tensor : meant"
    )
    assert ", ".join(names) in reader.text


def piqa(value, stderr, items, **more):
    """A task as eval --json writes it."""
    entry = {"value": value, "stderr": stderr, "metric": "acc_norm", "items": items}
    return {**entry, "items_sha256": "cd" * 32, **more}


def test_errors_are_those_of_windows_and_questions_and_differences_are_paired():
    """Both models find the same windows hard: what differs between them is known far better than either."""
    losses, worse = [3.0, 3.2, 3.4, 3.0], [3.11, 3.31, 3.49, 3.13]
    answers, wrong = [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0]

    def file(model, nll, right, role):
        mean = statistics.mean(nll)
        data = {**evaluation(model, math.exp(mean)), "windows": 4, "window_nll": nll}
        share = statistics.mean(right)
        data["tasks"] = {"piqa": piqa(share, statistics.stdev(right) / 2, 4, item_scores=right)}
        return [dataclasses.replace(s, role=role) for s in read_scores(data, "e.json")]

    scores = file("a", losses, answers, ORIGINAL) + file("b", worse, wrong, COMPRESSED)
    dense, _, small, _ = scores
    assert dense.stderr == pytest.approx(dense.value * statistics.stdev(losses) / 2)
    block = statistics.stdev(y - x for x, y in zip(losses, worse, strict=True)) / 2
    shown = difference(small, dense).replace("\u2009", " ")
    relative = math.expm1(statistics.mean(worse) - statistics.mean(losses))
    assert shown.endswith(f"(+{100 * relative:.1f} ± {100 * (1 + relative) * block:.1f} %)")
    assert difference(scores[3], scores[1]) == "−0.2500 ± 0.2500"
    assert kept_scores(to_plain(scores), "run") == scores
    # other questions: not one protocol, and nothing to pair
    other = {"model": "c", "tasks": {"piqa": piqa(0.5, 0.1, 4, items_sha256="ef" * 32)}}
    assert read_scores(other, "e.json")[0].protocol != scores[1].protocol


def test_scores_of_equal_protocol_stand_together():
    task = {"piqa": piqa(0.66, 0.011, 1838)}
    files = [
        evaluation("dense", 22.88),
        {"model": "small", "tasks": task},
        evaluation("small", 24.16),
    ]
    files.append({**evaluation("small", 3.0), "windows": 2})
    scores = [score for file in files for score in read_scores(file, "e.json")]
    rows = Reader(compression_page(compression(layers=1), scores)).rows
    at = rows.index(["wiki.test.raw, perplexity (16 windows of 1024 tokens, ids abababababab)"])
    assert rows[at + 1 : at + 3] == [["dense", "22.88", "–", "–"], ["small", "24.16", "–", "–"]]
    assert ["wiki.test.raw, perplexity (2 windows of 1024 tokens, ids abababababab)"] in rows
    assert ["small", "0.6600", "0.0110", "–"] in rows


def measured(value, role, model="m", **changes):
    (score,) = read_scores(evaluation(model, value), "e.json")
    return replace(score, role=role, **changes)


def test_original_and_compressed_are_named_and_compared():
    scores = [measured(30.0, None, "other"), measured(24.0, COMPRESSED), measured(20.0, ORIGINAL)]
    reader = Reader(compression_page(compression(layers=1), scores))
    rows = [[cell.replace("\u2009", " ") for cell in row] for row in reader.rows]
    at = rows.index(["original", "20.00", "–", "–"])
    assert rows[at + 1] == ["compressed", "24.00", "–", "+4.00 (+20.0 %)"]
    assert rows[at + 2] == ["other", "30.00", "–", "+10.00 (+50.0 %)"]
    text = reader.text.replace("\u2009", " ")
    before = text.index("20.00 → 24.00, +4.00 (+20.0 %)")
    assert before < text.index("Measured") < text.index("Fingerprint of its weights")
    assert "Not measured yet" not in text


def test_numbers_of_different_protocols_are_not_compared():
    scores = [measured(20.0, ORIGINAL), measured(24.0, COMPRESSED, protocol="2 windows")]
    reader = Reader(compression_page(compression(layers=1), scores))
    assert ["compressed", "24.00", "–", "–"] in reader.rows and "→ 24.00" not in reader.text


def test_a_page_without_measurements_says_how_to_get_them():
    """Every option that it names exists."""
    text = Reader(compression_page(compression(layers=1))).text
    assert "Not measured yet" in text
    for line in HOW_TO_MEASURE.splitlines():
        assert line in text
        words = line.split()
        command = typer.main.get_command(app).get_command(None, words[1])
        command.make_context(words[1], words[2:])


def test_kept_numbers_come_back_and_newer_ones_replace_them():
    first = [measured(20.0, ORIGINAL), measured(24.0, COMPRESSED), measured(9.0, None, "x")]
    assert kept_scores(json.loads(json.dumps(to_plain(first))), "run") == first
    again = merged(first, [measured(23.0, COMPRESSED, "elsewhere", protocol="all windows")])
    assert [score.value for score in again] == [20.0, 9.0, 23.0]
    named = merged(first, [measured(8.0, ORIGINAL, "x")])
    assert [score.value for score in named] == [24.0, 8.0]
    assert len(merged(first, [measured(1.0, COMPRESSED, what="c4.txt")])) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": "big"}, r"run\[0\].value: expected a finite number"),
        ({"value": None}, "expected a value"),
        ({"model": 3}, r"run\[0\].model: expected text"),
        ({"role": ["original"]}, "no role or one of"),
        ({"stderr": True}, r"run\[0\].stderr"),
    ],
)
def test_damaged_kept_numbers_are_named(change, message):
    (item,) = to_plain([measured(20.0, ORIGINAL)])
    with pytest.raises(InputError, match=message):
        kept_scores([item | change], "run")


def test_the_table_of_linears_is_folded_and_its_terms_are_explained():
    text = compression_page(compression(layers=1))
    before = text[: text.index('class="ordered"')]
    assert before.rindex("<details>") > before.rindex("</p>")
    words = Reader(text).text
    for term in ("“% kept” is", "X are the inputs, W is the original weight, Ŵ the compressed one"):
        assert term in words
    assert "the error of the weight, ‖W − Ŵ‖ / ‖W‖, looks at no text" in words


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "e.json: key 'model' is missing"),
        ({"model": "a"}, "neither a perplexity nor tasks"),
        ({"model": "a", "perplexity": "big"}, "perplexity: expected a finite number"),
        ({"model": "a", "tasks": [1]}, "tasks: expected an object"),
        ({"model": "a", "perplexity": 3.0}, "e.json: windows is missing"),
        ({"model": "a", "perplexity": 3.0, "windows": 2, "context": 8}, "key 'ids_sha256' is miss"),
        ({**evaluation("a", 3.0), "window_nll": [1.0]}, "window_nll: expected 16 numbers, got 1"),
        ({**evaluation("a", 3.0), "window_nll": [None]}, r"window_nll\[0\]: expected a finite"),
        ({"model": "a", "tasks": {"piqa": {}}}, r"tasks\['piqa'\]: key 'value' is missing"),
        ({"model": "a", "tasks": {"piqa": piqa(None, None, 3)}}, "value: expected a number"),
    ],
)
def test_bad_evaluations_are_named(data, message):
    with pytest.raises(InputError, match=message):
        read_scores(data, "e.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": {"a": {"relative_error": "small"}}}, r"modules\['a'\].relative_error"),
        ({"modules": {"a": {"d_in": -1}}}, "d_in: expected an integer from 0"),
        ({"modules": {"a": {"stored_bytes": 10**300}}}, "stored_bytes: expected an integer from 0"),
        ({"modules": {"a": {"whitening": [3]}}}, r"whitening\[0\]: expected text"),
        ({"modules": [1]}, "modules: expected an object"),
        ({"modules": {"a": {"n_tokens": 0.5}}}, "n_tokens: expected an integer from 0"),
        ({"seconds": 10**400}, "seconds: expected a finite number"),
        ({"dense": [{}]}, r"dense\[0\]: key 'module' is missing"),
        ({"reconstruction": 3}, "reconstruction: expected a list"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        compression_page(compression(layers=1, **changes))


def test_every_class_that_is_styled_is_used():
    own = Path(parts.__file__).with_name("compression.css").read_text(encoding="utf-8")
    styled = set(re.findall(r"\.([a-z][\w-]*)(?=[^{};]*\{)", re.sub(r"/\*.*?\*/", "", own)))
    reader = Reader(compression_page(compression()))
    used = {c for _, key, value in reader.attributes if key == "class" for c in value.split()}
    assert styled <= used


def test_rounding_errors_between_equal_numbers_have_no_colour():
    low, high = colour_scale([0.3, 0.3 + 1e-12]).domain
    assert low <= 0.3 < high and high - low >= 0.001
