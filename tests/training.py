"""What the tests of training share: a small text, a small model, reporters that listen or interfere."""

import os
import signal
from pathlib import Path

import pytest

from spikedecoder import SpikeDecoderConfig
from spikedecoder.data import Corpus, prepare_corpus
from spikedecoder.training import (
    Reporter,
    TrainConfig,
)

STORY = "the cat sat on the mat. the dog ate the hat. a rat ran to the cat and sat. " * 40


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("text")
    (folder / "story.txt").write_text(STORY)
    return prepare_corpus([folder / "story.txt"], cache_dir=folder)


def tiny(corpus: Corpus, **changes: object) -> SpikeDecoderConfig:
    t = corpus.tokenizer
    small = {"max_len": 16, "token_dim": 12, "position_dim": 4, "heads": 2, "blocks": 1, "timesteps": 2}
    vocabulary = {"vocab_size": t.vocab_size, "pad_id": t.pad_id, "norm": "layer"}
    return SpikeDecoderConfig.preset("default-lif", **{**small, **vocabulary, **changes})


def settings(**changes: object) -> TrainConfig:
    base = {"steps": 12, "batch_size": 2, "eval_every": 5, "save_every": 2, "log_every": 3, "threads": 1}
    return TrainConfig.from_dict({**base, **changes})


class StopAt(Reporter):
    """Sends this process a signal after a step."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.at, self.number = step, number

    def tick(self, step: int, loss: float | None, tokens_per_second: float) -> None:
        if step == self.at:
            os.kill(os.getpid(), self.number)


class Messages(Reporter):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def message(self, text: str) -> None:
        self.texts.append(text)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
