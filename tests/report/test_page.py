"""The page: well-formed, self-contained, escaped, complete; readable in both themes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made_up import METHODS, TASKS, TEXTS, comparison, failed, large, run
from page_reader import Reader, assert_self_contained

from cospadi.errors import InputError
from cospadi.report import parts
from cospadi.report.page import html_text, write_html

CSS = Path(parts.__file__).with_name(parts.STYLE_FILE).read_text(encoding="utf-8")


def finished(label="cospadi", ratio=0.2, seed=1, layers=2, **changes):
    item = run("cospadi", label, ratio, seed, quality=3.0, seconds=10, layers=layers)
    return {**item, **changes}


def sixty_runs():
    runs = [
        run(method, f"{label} {i}", ratio, 1, quality=q + i / 7, seconds=s, layers=2)
        for i in range(2)
        for ratio in (0.2, 0.3, 0.4)
        for method, label, q, s in METHODS[:10]
    ]
    return comparison(runs, layers=2)


def odd():
    data = comparison([], layers=1)
    evil = '</style></title><script>alert("1")</script>&amp;\x1b[31m\x00\ud800 é漢字\u202e'
    data["title"] = data["machine"] = data["command"] = evil
    data["texts"], data["tasks"] = [evil], [evil]
    data["dense"] = {"perplexity": {evil: 20.0}, "tasks": {evil: {"value": 0.5, "stderr": None}}}
    item = finished(evil, layers=1, perplexity={evil: 30.0})
    item["tasks"] = {evil: {"value": 0.4, "stderr": 0.01}}
    item["modules"] = {evil: {"relative_error": 0.3}, f"a.3.{evil}": {"relative_error": 0.1}}
    data["runs"] = [item, failed(evil, evil + "2", 0.2, 1, evil)]
    data["model"]["linear_bytes"] = item["dense_bytes"]
    data["spectra"] = [{"module": evil, "singular_values": [1.0], "support_use": [2.0, 0.0]}]
    return data


COMPARISONS = {
    "large": large,
    "sixty runs": sixty_runs,
    "one run": lambda: comparison([finished()], layers=2),
    "no runs": lambda: comparison([]),
    "no tasks": lambda: comparison([finished()], tasks=(), layers=2),
    "no texts": lambda: comparison([finished()], texts=(), layers=2),
    "all failed": lambda: comparison([failed("svd", "svd", 0.2, 1, "no memory")]),
    "fixed size": lambda: comparison([finished(ratio=None)], layers=2),
    "odd names": odd,
}


@pytest.fixture(scope="module")
def large_page():
    return Reader(html_text(large()))


@pytest.mark.parametrize("name", COMPARISONS)
def test_pages_are_well_formed_and_self_contained(name):
    text = html_text(COMPARISONS[name]())
    reader = Reader(text)
    assert_self_contained(reader)
    styles = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert styles == [CSS] and not re.search(r"url\(|@import|https?:", CSS)
    assert reader.tags.count("main") == 1 and "Conditions" in reader.text


@pytest.mark.parametrize("name", COMPARISONS)
def test_no_number_is_missing_a_form(name):
    words = Reader(html_text(COMPARISONS[name]())).text
    assert not re.search(r"\b(nan|NaN|inf|None|null|undefined)\b", words)


@pytest.mark.parametrize("name", COMPARISONS)
def test_the_same_data_gives_the_same_page(name):
    assert html_text(COMPARISONS[name]()) == html_text(COMPARISONS[name]())


def test_odd_names_are_text():
    text = html_text(odd())
    assert "\x1b" not in text and "\x00" not in text
    reader = Reader(text)
    assert "script" not in reader.tags
    assert '</style></title><script>alert("1")</script>&amp;\ufffd[31m' in reader.text
    text.encode("utf-8")  # no lone surrogate is left


def test_every_run_is_there(large_page):
    names = {row[0] for row in large_page.rows}
    for method, label, _, _ in METHODS:
        assert any(label in name for name in names), method
    assert "102 runs (95 complete, 3 partial, 4 failed)" in large_page.text
    assert large_page.text.count("Gram of model.layers.29.mlp.down_proj is not finite") == 2 + 3
    assert "svd-llm, ratio 0.2, seed 1 failed: cospadi compress ended with code 137" in (
        large_page.text
    )
    by_start = [row for row in large_page.rows if row[0].startswith("magnitude")]
    assert any("partial" in row[0] for row in by_start)


def test_conditions_are_there(large_page):
    data = large()
    for fact in (
        data["command"],
        data["calibration"]["description"],
        data["calibration"]["ids_sha256"],
        data["model"]["fingerprint"],
        data["machine"],
        "torch 2.13.0",
        "1024 tokens of context, first 32 windows",
    ):
        assert fact in large_page.text, fact


def test_main_table_shows_all_conventions_and_the_numbers():
    item = finished(layers=1, stored_bytes=4_000_000, resumed=True)
    item["perplexity"] = {TEXTS[0]: 56.714}
    item["ratio"] = {"stored": 0.201, "values": 0.25, "new": 0.11}
    item["model_ratio"] = {"stored": 0.158}
    reader = Reader(html_text(comparison([item], layers=1)))
    heads = next(row for row in reader.rows if "wiki.test.raw" in row and "stored" in row)
    row = next(row for row in reader.rows if row[0] == "cospadi")[1:]
    assert len(row) == len(heads)
    assert heads == [
        "MB",
        *TEXTS,
        *["stored", "values", "new"] * 2,
        "calibr.",
        "fit",
        "total",
        "GB",
    ]
    assert row[:10] == [
        *("4.00", "56.71", "–"),
        *("20.1", "25.0", "11.0", "15.8", "–", "–"),
        "318",
    ]
    assert row[-2].endswith("‡") and "interrupted and resumed" in reader.text


def test_sizes_and_peaks_of_several_seeds():
    sizes = {1: (4_000_000, 2_000_000_000), 2: (4_200_000, 2_500_000_000)}
    items = [
        finished(seed=seed, layers=1, stored_bytes=stored, peak_memory_bytes=peak)
        for seed, (stored, peak) in sizes.items()
    ]
    reader = Reader(html_text(comparison(items, layers=1)))
    row = next(row for row in reader.rows if row[0] == "cospadi")
    assert row[1] == "4.00–4.20" and row[-1] == "2.50"


def test_the_best_is_marked_in_its_row_alone():
    items = [finished(label, layers=1) for label in ("a", "b", "c")]
    for item, ppl in zip(items, (40.0, 30.0, 35.0), strict=True):
        item["perplexity"] = {text: ppl for text in TEXTS}
        item["stored_bytes"] = int(0.8 * item["dense_bytes"])
    reader = Reader(html_text(comparison(items, layers=1, tasks=())))
    marked = {row[0]: row[2] for row in reader.rows if row[0] in ("a", "b", "c")}
    assert marked == {"a": "40.00", "b": "●30.00", "c": "35.00"}
    assert [row[0] for row in reader.rows if row[0] in marked] == ["b", "c", "a"]
    assert "b 30.00 (1.24\u2009× dense)next: c, 16.7\u2009% above" in [
        cell for row in reader.rows for cell in row
    ]


def test_a_run_over_its_bytes_is_flagged_and_not_best():
    small, large_run = finished("small", layers=1), finished("big", layers=1)
    other = finished("other", layers=1)
    for item, share, ppl in ((small, 0.8, 40.0), (large_run, 0.9, 30.0), (other, 0.8, 50.0)):
        item["stored_bytes"] = int(share * item["dense_bytes"])
        item["perplexity"] = {text: ppl for text in TEXTS}
    reader = Reader(html_text(comparison([small, large_run, other], layers=1, tasks=())))
    cells = {row[0]: row for row in reader.rows if row[0] in ("small", "big")}
    assert cells["big"][1].endswith("†") and "●" not in "".join(cells["big"])
    assert cells["small"][2].startswith("●")


def test_means_of_tasks_need_all_tasks():
    whole, holed = finished("whole", layers=1), finished("holed", layers=1)
    del holed["tasks"]["piqa"]
    reader = Reader(html_text(comparison([whole, holed], layers=1)))
    row = {row[0]: row for row in reader.rows if len(row) == 2 + len(TASKS)}
    values = [entry["value"] for entry in whole["tasks"].values()]
    error = 0.011 * len(TASKS) ** 0.5 / len(TASKS)
    assert row["whole"][-1] == f"{sum(values) / len(values):.3f}± {error:.3f}"
    assert row["holed"][-1] == "–" and row["holed"][1] == "–"


def test_a_row_with_fewer_seeds_says_so():
    runs = [finished("a", seed=s, layers=1) for s in (1, 2)] + [finished("b", seed=1, layers=1)]
    runs.append(failed("cospadi", "b", 0.2, 2, "killed"))
    names = {row[0] for row in Reader(html_text(comparison(runs, layers=1))).rows}
    assert "b1 of 2 seeds" in names and "a" in names


def test_large_pages_stay_small():
    assert len(html_text(large())) < 600_000


def test_file_is_written_whole_and_errors_are_ours(tmp_path):
    data = comparison([finished()], layers=2)
    path = tmp_path / "index.html"
    write_html(data, path)
    write_html(data, path)
    assert path.read_text(encoding="utf-8") == html_text(data)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="cannot be written"):
        write_html(data, tmp_path / "missing" / "index.html")


# ---- Style sheet ----------------------------------------------------------------


def themes():
    """Variables of the light, dark and print themes."""
    blocks = re.findall(r":root \{([^}]*--ground[^}]*)\}", CSS)
    assert len(blocks) == 3
    return [dict(re.findall(r"(--[\w-]+): (#[0-9a-f]+);", block)) for block in blocks]


def contrast(a, b):
    """WCAG 2 contrast ratio of two colours."""

    def luminance(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
        linear = []
        for i in (0, 2, 4):
            c = int(digits[i : i + 2], 16) / 255
            linear.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_every_variable_is_defined_in_every_theme():
    used = set(re.findall(r"var\((--[\w-]+)\)", CSS))
    for theme in themes():
        assert set(theme) == used


@pytest.mark.parametrize("theme", range(3), ids=["light", "dark", "print"])
def test_contrast(theme):
    """WCAG AA: 4.5 for text, 3 for marks."""
    colours = themes()[theme]
    ground = colours["--ground"]
    for name in ("--ink", "--soft", "--faint", "--bad"):
        assert contrast(colours[name], ground) >= 4.5, name
    for name in (f"--s{i}" for i in range(7)):
        assert contrast(colours[name], ground) >= 3.0, name


def test_every_class_that_is_styled_is_used(large_page):
    used = {c for _, key, value in large_page.attributes if key == "class" for c in value.split()}
    used |= {"void", "tie", "command"}  # shown only by other data
    body = re.sub(r"/\*.*?\*/", "", CSS, flags=re.DOTALL)
    styled = set(re.findall(r"\.([a-z][\w-]*)(?=[^{};]*\{)", body))
    assert styled <= used
