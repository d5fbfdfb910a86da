"""docs/zoo.md and its picture, from the figures that bench/zoo.py kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spikedecoder.energy.units import si
from spikedecoder.viz import save
from spikedecoder.viz._figure import COLOURS, figure, look


def render(zoo: dict[str, Any], picture: str) -> str:
    """The page, as Markdown."""
    text, steps, length = zoo["text"], zoo["steps"], zoo["length"]
    char, word = text["char"], text["word"]
    lines = [
        "# The zoo: four kinds of decoder on one text",
        "",
        f"![Bits per character, spike rate and estimated energy of the models below]({picture})",
        "",
        "`python bench/zoo.py` trains all of them and writes this page, in about 12 minutes of one core; an "
        "interrupted run goes on. "
        f"{zoo['date']}, {zoo['machine']}.",
        "",
        "All read the same string: the built-in text, lower-cased and cleaned to letters, apostrophes and "
        f"full stops, {char['train']:,} characters ({word['train']:,} words) to learn and "
        f"{char['held_out']:,} characters ({word['held_out']:,} words) held out. "
        "All have three blocks, 96 channels, T = 4 where they spike; "
        f"{steps['char']} steps of 8 x {length['char']} characters, or {steps['word']} steps of "
        f"8 x {length['word']} words. One seed each.",
        "",
        "| kind | what spikes |",
        "|---|---|",
        "| fully spiking | everything: every matrix product takes spikes, the head's too (timesteps are "
        "concatenated); BatchNorm, a constant scale and shift at inference |",
        "| SpikeDecoder | everything but the head's input, which is a count of spikes; learned thresholds |",
        "| partly spiking | embedding and attention; MLP and head compute with real numbers |",
        "| non-spiking | nothing: softmax attention, GELU, one pass |",
        "",
    ]
    timed = zoo.get("speeds")
    for tokens, name in (("char", "Characters"), ("word", "Words")):
        rows = [r for r in zoo["rows"].values() if r["tokens"] == tokens]
        head = [
            "kind",
            "parameters",
            "bits per character",
            *(["bits per word"] if tokens == "word" else []),
            "accuracy",
            "spike rate",
            "energy per character",
            "with memory",
            "int8",
            *(["tokens/s"] if timed else []),
        ]
        lines += [f"## {name}", "", _row(head), _row(["---"] * len(head))]
        for r in rows:
            joules = r["joules_per_character"]
            lines.append(
                _row(
                    [
                        r["kind"],
                        f"{r['parameters']:,}",
                        f"{r['bits_per_character']:.3f}",
                        *([f"{r['bits_per_token']:.3f}"] if tokens == "word" else []),
                        f"{r['accuracy']:.1%}",
                        "-" if r["spike_rate"] is None else f"{r['spike_rate']:.1%}",
                        si(joules["fp32"]),
                        si(joules["fp32, memory"]),
                        si(joules["int8"]),
                        *([f"{r['tokens_per_second']:,.0f}"] if timed else []),
                    ]
                )
            )
        grams = ", ".join(f"{n} {bits:.3f}" for n, bits in text[tokens]["ngrams"].items())
        lines += ["", f"n-gram models of the same {name.lower()}, in bits per character: {grams}.", ""]
    lines += [
        "## How to read it",
        "",
        "- **Bits per character of a word model**: its bits, plus log2(28) bits for each letter (and the "
        f"end) of a word that it does not know ({word['unknown']:.1%} of the held-out words; a word seen "
        "fewer than three times is unknown), divided by the characters of the held-out text. So both "
        "halves code the same string. Accuracy is per token, so words and characters differ there."
        + _of_words(zoo),
        "- **Spike rate**: spikes per neuron and timestep on the held-out text, mean of the layers.",
        "- **Energy**: an estimate (see [energy.md](energy.md)) of writing the held-out text token by token: "
        "operations counted from the spikes that fired, 45 nm, fp32 arithmetic alone; with memory; and int8 "
        "weights, arithmetic alone. Divided by characters, so that words and characters compare.",
        "- The non-spiking model is its own twin: the row to compare with, in fp32 and in int8, where a "
        "multiplication costs little. The partly spiking one computes its MLP on real numbers at each of T "
        "timesteps, T times the work.",
    ]
    if timed:
        lines.append(
            f"- **tokens/s**: one text generated alone, best of three rounds of 200 tokens; {timed}. "
            "Repeat with `python bench/zoo.py --speeds`. The first two kinds run in the extension's compiled "
            "step, the other two module by module: a comparison of implementations, not of kinds."
        )
    else:
        lines.append("- Speeds are left out: the machine was shared while these models were trained.")
    return "\n".join(lines) + "\n"


def _of_words(zoo: dict[str, Any]) -> str:
    """What to say if no word model has learned more than a bigram knows."""
    best = min(r["bits_per_character"] for r in zoo["rows"].values() if r["tokens"] == "word")
    if best <= zoo["text"]["word"]["ngrams"]["bigram"]:
        return ""
    return (
        " After so few steps on so few words no word model beats the bigram: their rows compare kinds at "
        "equal training, and are not good word models."
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def draw(zoo: dict[str, Any], path: Path) -> None:
    """Bits, rate and energy of each model, one panel each."""
    rows = list(zoo["rows"].values())
    names = [f"{r['kind']}, {r['tokens']}s" for r in rows]
    places = [i + (0.6 if r["tokens"] == "word" else 0.0) for i, r in enumerate(rows)]
    with look():
        fig = figure(9.0, 0.32 * len(rows) + 1.1)
        panels = fig.subplots(1, 3, sharey=True)
        values = [
            ("bits per character", [r["bits_per_character"] for r in rows], "{:.2f}"),
            ("spikes per neuron and timestep", [r["spike_rate"] or 0.0 for r in rows], "{:.0%}"),
            (
                "nJ per character, estimate, 45 nm fp32",
                [r["joules_per_character"]["fp32"] * 1e9 for r in rows],
                "{:,.0f}",
            ),
        ]
        colours = [COLOURS[7] if r["spike_rate"] is None else COLOURS[0] for r in rows]
        for ax, (title, numbers, form) in zip(panels, values, strict=True):
            ax.barh(places, numbers, color=colours)
            for place, number in zip(places, numbers, strict=True):
                ax.text(number, place, " " + form.format(number), va="center", fontsize=8)
            ax.set_xlim(0, max(numbers) * 1.22 or 1)
            ax.set_title(title, fontsize=9)
            ax.set_xticks([])
            ax.spines["bottom"].set_visible(False)
        panels[0].set_yticks(places, names)
        panels[0].invert_yaxis()
        save(fig, path)
