"""The model card: ``README.md`` of a compressed checkpoint, from plain data alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cospadi.report.compression import BUILTIN_TEXT, Compression, read_compression
from cospadi.report.markup import clean
from cospadi.report.numbers import MISSING, percent, size
from cospadi.report.scores import Score, blocks_of, difference, original_of

PAGE_FILE = "report.html"
CARD_FILE = "README.md"

MEASURED = "## Measured"

_MEASURED_SECTION = re.compile(rf"^{MEASURED}$.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_NEXT_SECTION = re.compile(r"^## Reproduce$|\Z", re.MULTILINE)
_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#~])")

LOAD = """import cospadi.hf  # registers the method; must come first
from transformers import AutoModelForCausalLM

folder = "."  # where this file is, or the name of the repository on the hub
model = AutoModelForCausalLM.from_pretrained(folder)
"""

LOAD_AND_GENERATE = """import cospadi.hf  # registers the method; must come first
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is, or the name of the repository on the hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)

inputs = tokenizer("The ocean is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))
"""

REMOVED = {
    "stored": "bytes as stored",
    "values": "number of values, whatever their width",
    "mask16": "16-bit values and mask (CoSpaDi, Eq. 10)",
    "mask14": "14-bit coefficients and mask (CoSpaDi, Eq. 11)",
}
"""The conventions of `cospadi.report.conventions.CONVENTIONS` in a few words."""


def model_card(
    data: Mapping[str, Any], scores: Sequence[Score] = (), *, has_tokenizer: bool = True
) -> str:
    """Markdown with the front matter that the hub reads.

    Parameters
    ----------
    data : mapping
        Of ``cospadi_report.json``, and of the run record for the number of threads.
    scores : sequence of Score
        What was measured since.
    has_tokenizer : bool
        Whether the example may use one.
    """
    found = read_compression(data)
    example = (LOAD_AND_GENERATE if has_tokenizer else LOAD).rstrip()
    front = [
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [cospadi, compressed]",
    ]
    stated = found.source.get("base_model")
    base = found.name if found.source.get("kind") == "hub" else stated
    for key, value in (("base_model", base), ("license", found.source.get("license"))):
        if isinstance(value, str):
            front.append(f"{key}: {json.dumps(value)}")
    version = _plain(found.versions.get("cospadi", MISSING))
    rows = "\n".join(f"| {term} | {value} |" for term, value in _rows(found))
    again = found.command
    check = "cospadi verify . --source MODEL".ljust(len(again))
    return f"""---
{chr(10).join(front)}
---
**Load with `import cospadi.hf` first.** Without it transformers cannot read the compressed layers.

```python
{example}
```

This needs transformers and the cospadi package, which is installed from a checkout of its repository: `pip install .`
there, or `pip wheel . --no-deps -w dist` and `pip install dist/cospadi-*.whl` where the wheel is to be kept.

# {_plain(found.name)}, compressed

Compressed by cospadi {version}, method {_plain(found.method)}. [{PAGE_FILE}]({PAGE_FILE}) shows what every layer got:
sizes, errors, time.

| | |
|---|---|
{rows}

The share removed is given in the ways in which publications count it, always against dense bfloat16 weights.

{_measured(scores)}
## Reproduce

```sh
{again}   # MODEL: the source above
{check}   # recomputes the stated errors
```

A text that the recipe names by a relative path is looked for where the command runs: `--calibration TEXT` says where it
is, for both commands.

`recipe.yaml` holds every setting, `cospadi_report.json` the error of every layer, the versions and the hash of the
calibration tokens. The number of threads decides the order of sums, and with it the last bits; so does the processor's
instruction set.
"""


def with_measured(card: str, scores: Sequence[Score]) -> str:
    """A card with its section of measurements written anew; the rest, which its owner may have edited, stays.

    Where there is no such section it comes before the one on reproducing, or at the end.
    """
    section = _measured(scores)
    if _MEASURED_SECTION.search(card):
        return _MEASURED_SECTION.sub(lambda _: section + "\n", card, count=1)
    return _NEXT_SECTION.sub(lambda found: f"{section}\n{found[0]}", card, count=1)


def _measured(scores: Sequence[Score]) -> str:
    if not scores:
        return f"{MEASURED}\n\nNot measured yet; [{PAGE_FILE}]({PAGE_FILE}) says how.\n"
    rows = []
    for block in blocks_of(scores):
        original = original_of(block)
        for score in block:
            error = "" if score.stderr is None else f" ± {score.shown_error}"
            what = f"{_plain(score.heading)}, {_plain(score.metric)}"
            value = f"{score.shown_value}{error}"
            change = difference(score, original)
            protocol = _plain(score.protocol)
            rows.append(f"| {what} | {_plain(score.label)} | {value} | {change} | {protocol} |")
    table = "\n".join(rows)
    return f"""{MEASURED}

| text or task | model | value ± standard error | difference | measured on |
|---|---|---|---|---|
{table}

By `cospadi eval`. Lower perplexity is better, higher accuracy is better. Errors of values say how much texts and
questions vary; those of differences are paired, window by window and question by question.
"""


def _rows(data: Compression) -> list[tuple[str, str]]:
    calibration = data.calibration
    rows = [("source", _plain(data.name))]
    if data.source.get("fingerprint") is not None:
        rows.append(("fingerprint of its weights", _code(data.source["fingerprint"])))
    rows.append(("compressed linears", str(len(data.linears))))
    for label, n_bytes in (
        ("bytes of the linears", data.linear_bytes),
        ("bytes of the model", data.model_bytes),
    ):
        if {"dense", "stored"} <= n_bytes.keys():
            text = f"{size(n_bytes['dense'])} in bfloat16, now {size(n_bytes['stored'])}"
            rows.append((label, text))
    for key, name in REMOVED.items():
        if key in data.ratio:
            whole = ""
            if key in data.model_ratio:
                whole = f", {percent(data.model_ratio[key])} % of the model"
            rows.append((f"removed, {name}", f"{percent(data.ratio[key])} % of the linears{whole}"))
    rows.append(("calibration", _plain(calibration.get("description") or "none")))
    if data.is_builtin_text:
        rows.append(("about this text", BUILTIN_TEXT))
    if calibration.get("ids_sha256") is not None:
        rows.append(("SHA-256 of its token ids", _code(calibration["ids_sha256"])))
    versions = ", ".join(f"{name} {value}" for name, value in data.versions.items())
    rows.append(("versions", _plain(versions or MISSING)))
    rows.append(("stayed dense after a failure", _plain(", ".join(data.failed) or "none")))
    return rows


def _plain(value: object) -> str:
    """Text of one line in which nothing is markup: names and paths may come from strangers."""
    return _MARKDOWN.sub(r"\\\1", clean(" ".join(str(value).split())))


def _code(value: object) -> str:
    """A hash in a table."""
    return f"`{re.sub('[`|]', '?', clean(' '.join(str(value).split())))}`"
