"""The table of what interp finds in which models says what is so."""

from __future__ import annotations

import runpy
from typing import Any

import pytest

from helpers.checkout import ROOT

PAGE = ROOT / "docs" / "interp_coverage.md"
#: Some of each kind of attention, of refusal, and of model.
SAMPLE = (
    *("LlamaForCausalLM", "BloomForCausalLM", "FalconForCausalLM", "Gemma2ForCausalLM", "DeepseekV3ForCausalLM"),
    *("BertForMaskedLM", "DebertaV2ForMaskedLM", "T5ForConditionalGeneration", "BartForConditionalGeneration"),
    *("SD 1.5", "Flux", "whisper"),
)


def rows() -> dict[str, list[str]]:
    """Name -> cells of the table."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name.strip("`"): rest for name, *rest in cells if len(rest) == 10}


def test_the_table_is_of_many_models_whose_outputs_are_the_same() -> None:
    table = rows()
    text = [name for name in table if name.endswith(("LM", "LMHeadModel", "ForConditionalGeneration"))]
    assert len(text) >= 60
    equal = {name: cells[8] for name, cells in table.items() if cells[8] != "-"}
    assert {name for name, said in equal.items() if said != "yes"} <= {"Transformer", "TransformerEncoder"}
    assert not any(said == "no" for said in equal.values())
    refused = [name for name, cells in table.items() if cells[0] == "-"]
    assert all(table[name][9] for name in refused)


@pytest.fixture(scope="module")
def cover() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "tools" / "cover_interp.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_rows_are_what_is_found(name: str, cover: dict[str, Any]) -> None:
    pytest.importorskip("diffusers")
    text = {model for models in cover["text_models"]().values() for model in models}
    make = cover["text_model" if name in text else "zoo_model"]
    line = cover["made"](name, make)
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == rows()[name]
