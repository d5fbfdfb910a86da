"""The page of the zoo: what it counts is what the code counts now, and it can be written anew."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from spikedecoder import SpikeDecoder
from spikedecoder.kinds import KINDS

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))  # its modules import each other by name

zoo, zoo_page = (importlib.import_module(name) for name in ("zoo", "zoo_page"))

SECTIONS = {"char": "Characters", "word": "Words"}


def section(page: str, name: str) -> str:
    return page.partition(f"## {name}\n")[2].partition("\n## ")[0]


def test_the_page_has_todays_parameters_and_text_sizes(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    path = zoo.clean(None, tmp_path)
    for tokens, name in SECTIONS.items():
        tokenizer = zoo.load(path, tokens).tokenizer
        for kind in KINDS:
            with torch.device("meta"):
                model = SpikeDecoder(zoo.config_of(kind, tokens, tokenizer))
            parameters = sum(p.numel() for p in model.parameters())
            assert f"| {kind} | {parameters:,} |" in section(page, name)
    text = zoo.describe(path)
    char, word = text["char"], text["word"]
    assert f"{char['train']:,} characters ({word['train']:,} words) to learn" in page
    assert f"{char['held_out']:,} characters ({word['held_out']:,} words) held out" in page
    assert f"({word['unknown']:.1%} of the held-out words" in page
    for tokens, name in SECTIONS.items():
        grams = ", ".join(f"{n} {bits:.3f}" for n, bits in text[tokens]["ngrams"].items())
        assert f"in bits per character: {grams}." in section(page, name)


def row(kind: str, tokens: str) -> dict[str, Any]:
    """As `zoo.run` returns it."""
    return {
        "kind": kind,
        "tokens": tokens,
        "parameters": 12345,
        "bits_per_character": 2.5,
        "bits_per_token": 7.25,
        "accuracy": 0.5,
        "spike_rate": None if kind == "non-spiking" else 0.125,
        "joules_per_character": {"fp32": 1e-7, "fp32, memory": 2e-5, "int8": 3e-8},
        "tokens_per_second": 4321.0,
    }


@pytest.mark.parametrize("timed", [False, True])
def test_kept_figures_become_the_page_and_its_picture(tmp_path: Path, timed: bool) -> None:
    pytest.importorskip("matplotlib")
    sizes = {"train": 1000, "held_out": 100, "unknown": 0.25, "ngrams": {"unigram": 4.0, "bigram": 3.5}}
    kept = {
        "rows": {zoo.key(kind, tokens): row(kind, tokens) for tokens in zoo.TOKENS for kind in KINDS},
        "steps": {"char": 8, "word": 3},
        "length": zoo.LENGTH,
        "text": dict.fromkeys(zoo.TOKENS, sizes),
        "machine": "a machine",
        "date": "2026-01-01",
        **({"speeds": "2026-01-02, 1 thread, a machine"} if timed else {}),
    }
    kept = json.loads(json.dumps(kept))  # as zoo.json holds it
    page = zoo_page.render(kept, "zoo.png")
    speed = " 4,321 |" if timed else ""
    rate = {kind: "-" if kind == "non-spiking" else "12.5%" for kind in KINDS}
    for kind in KINDS:
        joules = f"50.0% | {rate[kind]} | 100 nJ | 20.0 µJ | 30.0 nJ |{speed}\n"
        assert f"| {kind} | 12,345 | 2.500 | {joules}" in section(page, "Characters")
        assert f"| {kind} | 12,345 | 2.500 | 7.250 | {joules}" in section(page, "Words")
    assert "unigram 4.000, bigram 3.500." in page and "(25.0% of the held-out words" in page
    assert "8 steps of 8 x 128 characters, or 3 steps of 8 x 64 words" in page
    assert ("Speeds are left out" in page) is not timed
    zoo_page.draw(kept, tmp_path / "zoo.png")
    assert (tmp_path / "zoo.png").read_bytes().startswith(b"\x89PNG")
