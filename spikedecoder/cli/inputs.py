"""What several commands read: a trained model, and a text in its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spikedecoder.data import Tokenizer
    from spikedecoder.model import SpikeDecoder


def load(checkpoint: str, device: str) -> tuple[SpikeDecoder, str]:
    """The model on `device` ("auto": a GPU if there is one), and the folder or hub name it came from."""
    import torch

    from spikedecoder.model import SpikeDecoder

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = find_checkpoint(checkpoint)
    try:
        target = torch.device(device)
        torch.empty(1, device=target).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: got {device!r}, which this machine cannot use ({reason})") from None
    return SpikeDecoder.from_pretrained(where, device=target), where


def find_checkpoint(checkpoint: str) -> str:
    """The folder with the model: `checkpoint` itself, or its best/ or last/. A hub name is returned as it is.

    Raises ValueError if `checkpoint` is neither.
    """
    folder = Path(checkpoint)
    if not folder.exists():
        owner, _, name = checkpoint.partition("/")
        if not name or "/" in name or owner in ("", ".", "..", "~") or Path(owner).exists():
            raise ValueError(
                f"--checkpoint: {checkpoint!r}: no such folder (a name on the hub is OWNER/NAME)"
            )
        return checkpoint
    if not folder.is_dir():
        raise ValueError(f"--checkpoint: {checkpoint!r} is a file, takes a folder with config.json in it")
    for candidate in (folder, folder / "best", folder / "last"):
        if (candidate / "config.json").is_file():
            return str(candidate)
    raise ValueError(f"--checkpoint: {checkpoint!r} has no config.json, nor have best/ or last/ in it")


def tokenizer_of(model: SpikeDecoder, where: str) -> Tokenizer:
    """The tokenizer that was saved with a model; ValueError if there is none."""
    if model.tokenizer is None:
        raise ValueError(f"{where}: has no tokenizer.json, without which it can neither read nor write text")
    return model.tokenizer


def tokens_of(model: SpikeDecoder, where: str, text: str, errors: str, name: str) -> list[int]:
    """The text's ids, at least one. `name`: of the text, for messages."""
    from spikedecoder.generation import encode_prompt

    ids = encode_prompt(tokenizer_of(model, where), text, errors, name)
    if not ids:
        raise ValueError(f"the text holds no token that {where} knows")
    return ids


def given_text(prompt: str | None, text: Path | None) -> tuple[str, str]:
    """The text from --prompt or from the file of --text, and the name of that option."""
    if prompt is not None and text is None:
        return prompt, "--prompt"
    if text is not None and prompt is None:
        return read_text(text), "--text"
    raise ValueError(f"--prompt, --text: got {'neither' if text is None else 'both'}, takes one of them")


def read_text(path: Path) -> str:
    """A file's text, read as in training."""
    from spikedecoder.data.corpora import read_text_files

    try:
        return "".join(read_text_files([path]))
    except OSError as error:
        raise OSError(f"--text: {error}") from None
    except ValueError as error:
        raise ValueError(f"--text: {error}") from None
