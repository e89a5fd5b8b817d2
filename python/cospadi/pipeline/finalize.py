"""From finished factors to the checkpoint on disk."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cospadi import __version__
from cospadi.calibration.data import CalibrationSet
from cospadi.checkpoint.format import CospadiConfigData, ModuleEntry
from cospadi.checkpoint.writer import write_checkpoint
from cospadi.factor import STORAGE_DTYPES, SparseFactor
from cospadi.model.layers import build_layers, replace_modules
from cospadi.model.source import SourceModel
from cospadi.pipeline.recipe import Recipe

if TYPE_CHECKING:
    from cospadi.pipeline.compress import CompressResult

REPORT_FILE = "cospadi_report.json"
RECIPE_FILE = "recipe.yaml"
REPORT_VERSION = 1


def write_output(
    source: SourceModel,
    factors: dict[str, SparseFactor],
    result: CompressResult,
    recipe: Recipe,
    calibration: CalibrationSet | None,
    versions: dict[str, str],
) -> None:
    """Swap the factors into the model and write it with recipe, report and model card."""
    planned = {module.name: module for module in result.plan.modules}
    leaders = {
        name: planned[name].leader
        for name, factor in factors.items()
        if not factor.spec.owns_dictionary
    }
    entries = {
        name: ModuleEntry(factor.spec, planned[name].layer_type, leaders.get(name))
        for name, factor in factors.items()
    }
    data = CospadiConfigData(
        modules=entries,
        producer={"cospadi": __version__, "method": recipe.method},
    )
    data.ratio = data.removed_shares()
    report = {
        "report_version": REPORT_VERSION,
        "source": {"name": source.name, "kind": source.kind, "fingerprint": source.fingerprint},
        "recipe": recipe.to_mapping(),
        "calibration": None
        if calibration is None
        else {
            "ids_sha256": calibration.sha256,
            "shape": list(calibration.ids.shape),
            "description": calibration.description,
        },
        "versions": versions,
        "seconds": round(result.seconds, 2),
        "calibration_seconds": round(result.calibration_seconds, 2),
        "ratio": data.ratio,
        "modules": result.reports,
        "dense": [
            {"module": item.name, "shape": list(item.shape), "reason": item.reason}
            for item in result.dense
        ],
        "failed": list(result.failed),
        "allocation": None if result.allocation is None else result.allocation.to_mapping(),
        "reconstruction": result.reconstruction,
    }
    replace_modules(
        source.model,
        build_layers(
            factors, leaders, layer_types={name: planned[name].layer_type for name in factors}
        ),
    )
    write_checkpoint(
        source.model,
        source.tokenizer,
        data,
        result.out_dir,
        extra_files={
            REPORT_FILE: json.dumps(report, indent=1, allow_nan=False) + "\n",
            RECIPE_FILE: recipe.to_yaml(),
            "README.md": _model_card(source, data, recipe, report),
        },
        dtype=STORAGE_DTYPES[recipe.storage_dtype],
    )


def _model_card(
    source: SourceModel, data: CospadiConfigData, recipe: Recipe, report: dict[str, Any]
) -> str:
    calibration = report["calibration"]
    text = "none" if calibration is None else calibration["description"]
    return f"""---
library_name: transformers
tags: [cospadi, compressed]
---
**Load with `import cospadi.hf` first** (without it transformers cannot read the compressed layers):

```python
import cospadi.hf
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

{source.name}, compressed by cospadi {__version__} (method {recipe.method}).

| | |
|---|---|
| compressed linears | {len(data.modules)} |
| removed, bytes as stored | {data.ratio["stored"]:.2%} of the compressed linears |
| removed, values only | {data.ratio["values"]:.2%} of the compressed linears |
| removed, 16-bit values and mask (CoSpaDi Eq. 10) | {data.ratio["mask16"]:.2%} of the compressed linears |
| removed, 14-bit coefficients and mask (Eq. 11) | {data.ratio["mask14"]:.2%} of the compressed linears |
| calibration | {text} |
| stayed dense after a failure | {", ".join(report["failed"]) or "none"} |

`recipe.yaml` reproduces this checkpoint; `cospadi_report.json` holds the error of every layer.
"""
