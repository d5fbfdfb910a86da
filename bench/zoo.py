"""Four kinds of decoder, on characters and on words of the same text: how well they learn, what they cost.

    python bench/zoo.py               trains what is missing, writes docs/zoo.md and docs/zoo.png
    python bench/zoo.py --speeds      only times the trained models again
    python bench/zoo.py --out runs/small --char-steps 20 --word-steps 20 --doc runs/small/zoo.md

All eight models read one text: the built-in one (or --text), lower-cased and cleaned to letters, apostrophes
and full stops, so that words and characters are the same string. Its last tenth is held out. Runs are kept in
OUT/runs/KIND-TOKENS and figures in OUT/zoo.json: an interrupted zoo goes on where it stopped. Takes about 12
minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processor import processor

from spikedecoder import SpikeDecoder, SpikeDecoderConfig, __version__, energy
from spikedecoder._files import write_bytes
from spikedecoder.checkpoint import write_json
from spikedecoder.data import (
    Corpus,
    Tokenizer,
    builtin_text,
    clean_words,
    ngram_bits,
    prepare_corpus,
    read_text_files,
)
from spikedecoder.generation import SamplingParams, generate
from spikedecoder.kinds import KINDS
from spikedecoder.training import TrainConfig, train
from spikedecoder.training.run_folder import RUN

TOKENS = ("char", "word")
# the recipe of all four kinds, kept here so that the page stays reproducible when the presets change
RECIPE: dict[str, Any] = {"embedding_gain": 2.0, "token_shift": 4, "mlp_token_shift": 2}
MIN_COUNT = 3  # a word seen less often is unknown
LENGTH = {"char": 128, "word": 64}  # context
_SPELLING = math.log2(28)  # bits per character of an unknown word: letters, apostrophe, its end
_ENERGY_TOKENS = 4096


def clean(paths: list[str] | None, out: Path) -> Path:
    """Write OUT/text.txt: the words of the text, joined again, such that cleaning leaves it as it is."""
    text, before = "".join(read_text_files(paths)) if paths else builtin_text(), ""
    while text != before:  # again if cleaning makes two apostrophes of three
        text, before = " ".join(clean_words(text)).replace(" .", "."), text
    path = out / "text.txt"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_bytes(path, text.encode())
    return path


def load(path: Path, tokens: str) -> Corpus:
    return prepare_corpus([path], tokenizer=tokens, min_count=MIN_COUNT if tokens == "word" else 1)


def held_out_text(path: Path, corpus: Corpus) -> str:
    return path.read_text(encoding="utf-8")[-corpus.val_characters :]


def characters_predicted(path: Path, corpus: Corpus, tokens: str) -> tuple[int, float]:
    """(characters of the held-out text after its first token, bits that spell its unknown words)."""
    text = held_out_text(path, corpus)
    if tokens == "char":
        return len(text) - 1, 0.0
    words = clean_words(text)
    known = set(corpus.tokenizer.tokens)
    unknown = [word for word in words[1:] if word not in known]
    return len(text) - len(words[0]), sum(len(word) + 1 for word in unknown) * _SPELLING


def settings(tokens: str, steps: int) -> TrainConfig:
    return TrainConfig(
        steps=steps,
        lr=4e-3,
        eval_every=100,
        eval_tokens=None,
        save_every=50,
        tokenizer=tokens,  # type: ignore[arg-type]
        min_count=MIN_COUNT if tokens == "word" else 1,
    )


def config_of(kind: str, tokens: str, tokenizer: Tokenizer) -> SpikeDecoderConfig:
    fixed = {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id, "max_len": LENGTH[tokens]}
    return SpikeDecoderConfig.from_dict({**RECIPE, **fixed, **KINDS[kind]})


def run(kind: str, tokens: str, path: Path, out: Path, steps: int) -> dict[str, Any]:
    """Train one model, or go on with it, and return its row of the table."""
    corpus = load(path, tokens)
    folder = out / "runs" / f"{kind.replace(' ', '-')}-{tokens}"
    result = train(
        config_of(kind, tokens, corpus.tokenizer),
        corpus,
        settings(tokens, steps),
        out=folder,
        resume=(folder / RUN).is_file(),
        source={"preset": None, "text": [str(path.resolve())], "corpus": None},
    )
    if result.interrupted:
        raise KeyboardInterrupt
    e = result.evaluation
    assert e is not None
    characters, spelling = characters_predicted(path, corpus, tokens)
    row = {
        "kind": kind,
        "tokens": tokens,
        "steps": steps,
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "bits_per_token": e.bits,
        "bits_per_character": (e.bits * e.tokens + spelling) / characters,
        "accuracy": e.accuracy,
        "held_out_tokens": e.tokens,
        "held_out_characters": characters,
        "spelling_bits": spelling,
        "spike_rate": statistics.mean(e.spike_rates.values()) if e.spike_rates else None,
    }
    return row | costs(result.model, corpus.val, e.tokens / characters)


def costs(model: SpikeDecoder, tokens: np.ndarray, tokens_per_character: float) -> dict[str, Any]:
    """Estimated joules per character of generating held-out text, token by token."""
    length = model.config.max_len
    whole = min(_ENERGY_TOKENS, len(tokens)) // length * length
    batch = torch.from_numpy(np.asarray(tokens[:whole], dtype=np.int64)).reshape(-1, length)
    ledger = energy.measure(model, batch, mode="token")
    found: dict[str, Any] = {"input_rate": ledger.rate, "energy_tokens": whole}
    found["joules_per_character"] = {
        name: source.joules(memory=memory, number_format=number).per_token * tokens_per_character
        for name, source, memory, number in (
            ("fp32", ledger, False, "fp32"),
            ("fp32, memory", ledger, True, "fp32"),
            ("int8", ledger, False, "int8"),
            ("twin fp32", energy.ann_ledger(ledger), False, "fp32"),
            ("twin fp32, memory", energy.ann_ledger(ledger), True, "fp32"),
            ("twin int8", energy.ann_ledger(ledger), False, "int8"),
        )
    }
    return found


def speed(model: SpikeDecoder, rounds: int = 3, count: int = 200) -> float:
    """Tokens/s of one text generated alone; the best of `rounds`."""
    prompt, sampling = [[2, 3, 4, 5]], SamplingParams(temperature=0.8, seed=0)
    generate(model, prompt, 16, sampling)
    best = math.inf
    for _ in range(rounds):
        begin = time.perf_counter()
        generate(model, prompt, count, sampling)
        best = min(best, time.perf_counter() - begin)
    return count / best


def machine() -> str:
    return f"{processor()}, torch {torch.__version__}, spikedecoder {__version__}"


def key(kind: str, tokens: str) -> str:
    return f"{kind}, {tokens}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", nargs="*", help="text files; default: the built-in text")
    parser.add_argument("--char-steps", type=int, default=800)
    parser.add_argument("--word-steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"))
    parser.add_argument("--doc", type=Path, default=Path("docs/zoo.md"), help="its picture lies beside it")
    parser.add_argument(
        "--speeds", action="store_true", help="only time generation again, and write the page"
    )
    options = parser.parse_args()
    from zoo_page import draw, render

    path = clean(options.text, options.out)
    steps = {"char": options.char_steps, "word": options.word_steps}
    file = options.out / "zoo.json"
    zoo: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"rows": {}}
    if zoo.get("steps", steps) != steps:
        parser.error(f"--out: {file} holds a zoo of {zoo['steps']} steps; takes a folder of its own")
    zoo |= {"steps": steps, "length": LENGTH, "machine": machine()}
    zoo.setdefault("date", time.strftime("%Y-%m-%d"))
    if not options.speeds:
        for tokens in TOKENS:
            for kind in KINDS:
                if key(kind, tokens) in zoo["rows"]:
                    continue
                begin = time.perf_counter()
                row = run(kind, tokens, path, options.out, steps[tokens])
                row["seconds"] = time.perf_counter() - begin
                zoo["rows"][key(kind, tokens)] = row
                write_json(file, zoo)
                print(f"{key(kind, tokens)}: {row['bits_per_character']:.3f} bits per character", flush=True)
    zoo["text"] = describe(path)
    if options.speeds:
        torch.set_num_threads(1)
        for name, row in zoo["rows"].items():
            folder = options.out / "runs" / name.replace(", ", "-").replace(" ", "-") / "last"
            row["tokens_per_second"] = speed(SpikeDecoder.from_pretrained(folder))
            print(f"{name}: {row['tokens_per_second']:,.0f} tokens/s", flush=True)
        zoo["speeds"] = f"{time.strftime('%Y-%m-%d')}, 1 thread, {machine()}"
    write_json(file, zoo)
    write_bytes(options.doc, render(zoo, options.doc.with_suffix(".png").name).encode())
    try:
        draw(zoo, options.doc.with_suffix(".png"))
    except ValueError as error:
        print(error)  # no matplotlib


def describe(path: Path) -> dict[str, Any]:
    """Size of the text for each kind of token, and bits per character of n-gram models on it."""
    found: dict[str, Any] = {}
    for tokens in TOKENS:
        corpus = load(path, tokens)
        characters, spelling = characters_predicted(path, corpus, tokens)
        predicted = len(corpus.val) - 1
        unk = corpus.tokenizer.unk_id
        found[tokens] = {
            "vocabulary": corpus.tokenizer.vocab_size,
            "train": len(corpus.train),
            "held_out": predicted,
            "characters": characters,
            "unknown": float(np.mean(corpus.val == unk)) if unk is not None and tokens == "word" else 0.0,
            "ngrams": {
                name: (bits * predicted + spelling) / characters
                for name, bits in ngram_bits(corpus.train, corpus.val, corpus.tokenizer.vocab_size).items()
            },
        }
    return found


if __name__ == "__main__":
    main()
