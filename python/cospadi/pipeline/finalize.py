"""From finished factors to the checkpoint on disk."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from cospadi import __version__
from cospadi.calibration.data import CalibrationSet
from cospadi.checkpoint.format import CospadiConfigData, ModuleEntry
from cospadi.checkpoint.stream_writer import write_streamed
from cospadi.checkpoint.writer import RunRecord, write_checkpoint
from cospadi.factor.spec import STORAGE_DTYPES
from cospadi.model.layers import build_layers, replace_modules
from cospadi.model.source import SourceModel
from cospadi.model.streamed import StreamedSource, tied_names
from cospadi.pipeline.recipe import Recipe
from cospadi.pipeline.report import REPORT_FILE, report_data, split_report
from cospadi.pipeline.stored_factors import StoredFactors
from cospadi.report.card import CARD_FILE, PAGE_FILE, model_card
from cospadi.report.compression_page import compression_page

if TYPE_CHECKING:
    from cospadi.pipeline.compress import CompressResult

RECIPE_FILE = "recipe.yaml"


def write_output(
    source: SourceModel | StreamedSource,
    factors: StoredFactors,
    result: CompressResult,
    recipe: Recipe,
    calibration: CalibrationSet | None,
    versions: dict[str, str],
) -> None:
    """Swap the factors into the model and write it with recipe, report, its page and model card."""
    planned = {module.name: module for module in result.plan.modules}
    leaders = {
        name: planned[name].leader
        for name, spec in factors.specs.items()
        if not spec.owns_dictionary
    }
    entries = {
        name: ModuleEntry(spec, planned[name].layer_type, leaders.get(name))
        for name, spec in factors.specs.items()
    }
    data = CospadiConfigData(
        modules=entries,
        producer={"cospadi": __version__, "method": recipe.method},
    )
    data.ratio = data.removed_shares()
    everything = report_data(source, data, result, recipe, calibration, versions)
    report, run = split_report(everything)
    # the card names the threads, which differ from run to run, and gets what is measured later
    card = model_card(everything, has_tokenizer=source.tokenizer is not None)
    files = {
        REPORT_FILE: json.dumps(report, indent=1, allow_nan=False) + "\n",
        RECIPE_FILE: recipe.to_yaml(),
    }
    record = RunRecord(run, {PAGE_FILE: compression_page(everything), CARD_FILE: card})
    dtype = STORAGE_DTYPES[recipe.storage_dtype]
    if isinstance(source, StreamedSource):
        write_streamed(
            source.model,
            source.tokenizer,
            data,
            result.out_dir,
            read=source.read_stored,
            factor=factors.__getitem__,
            unstored=tied_names,
            extra_files=files,
            run=record,
            dtype=dtype,
        )
        return
    layer_types = {name: planned[name].layer_type for name in factors}
    replace_modules(source.model, build_layers(dict(factors), leaders, layer_types=layer_types))
    write_checkpoint(
        source.model,
        source.tokenizer,
        data,
        result.out_dir,
        extra_files=files,
        run=record,
        dtype=dtype,
    )
