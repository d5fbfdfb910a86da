"""Sources of text: the documentation within Python, files and standard input, and a public-domain book."""

from __future__ import annotations

import codecs
import hashlib
import io
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ._files import BLOCK_BYTES, atomic_writer, default_cache_dir, make_cache_dir, sha256_of_file

STDIN = "-"
_CONVERT = "convert it to utf-8, as with iconv (or, in Python, give prepare_corpus its encoding)"
_WIDE_MARKS = {  # those of 32 bits first: the little-endian one begins with the one of 16 bits
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class DownloadError(OSError):
    """A corpus could not be downloaded, or the download is not what was expected."""


@dataclass(frozen=True)
class CorpusSource:
    """A text that can be downloaded. ``sha256`` is None if no checksum can be fixed in advance."""

    title: str
    url: str
    sha256: str | None
    licence: str


CORPORA = {
    "war-and-peace": CorpusSource(
        title="Leo Tolstoy, War and Peace (Project Gutenberg, ebook 2600)",
        url="https://www.gutenberg.org/cache/epub/2600/pg2600.txt",
        sha256=None,  # Project Gutenberg re-edits its files in place
        licence="public domain in the USA; https://www.gutenberg.org/policy/license.html",
    ),
}


def builtin_text() -> str:
    """About 373 000 characters of English that come with Python: its documentation topics.

    The topics of ``pydoc_data.topics``, sorted by name and joined by line ends. Topics that are part of
    another one ("while" of "compound") are left out: otherwise held-out text would also be training text.
    The text differs a little between Python releases. Raises FileNotFoundError if this Python lacks it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(
            "the built-in text is not there: this Python comes without pydoc_data.topics; pass --text FILE"
        ) from None
    return "\n".join(topics[name] for name in _no_part_of_another(topics))


def _no_part_of_another(topics: dict[str, str]) -> list[str]:
    """The names, sorted, of topics whose lines (not counting short ones and rules) are not all in another."""
    lines = {
        name: {line for line in map(str.strip, text.splitlines()) if len(line) > 20 and len(set(line)) > 2}
        for name, text in topics.items()
    }

    def is_part(name: str) -> bool:
        own = lines[name]
        return any((len(of), other) > (len(own), name) and own <= of for other, of in lines.items())

    return [name for name in sorted(topics) if not is_part(name)]


def read_text_files(paths: Iterable[str | Path], encoding: str = "utf-8") -> Iterator[str]:
    """Yield the text of several files in chunks of about a megabyte; ``-`` is standard input.

    A byte order mark is left out, line ends become ``\\n``, and one is put between files if the first does
    not end in one. Errors name the file: FileNotFoundError if it is missing, ValueError if it is a directory,
    is empty, is binary (has NUL characters) or is not text in ``encoding``. ValueError also for an encoding
    that Python does not know.
    """
    if not isinstance(encoding, str):
        raise TypeError(f"encoding: expected a name, such as utf-8, got {type(encoding).__name__}")
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise ValueError(f"encoding: Python knows no encoding {encoding!r}") from None
    if isinstance(paths, (str, Path)):
        paths = [paths]
    last = "\n"
    for path in paths:
        if not last.endswith("\n"):
            yield "\n"
        with _open_bytes(path) as file:
            for last in _decoded(file, "standard input" if str(path) == STDIN else str(path), encoding):
                yield last


def _open_bytes(path: str | Path) -> AbstractContextManager[BinaryIO]:
    if str(path) == STDIN:
        return nullcontext(sys.stdin.buffer)  # not ours to close
    if Path(path).is_dir():
        raise ValueError(f"{path}: is a directory; expected a text file")
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None


def _decoded(file: BinaryIO, name: str, encoding: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))  # NUL bytes are normal there
    read = 0
    first = True
    wrong = ""  # how the file's first bytes contradict the encoding
    while True:
        try:
            block = file.read(BLOCK_BYTES)
        except OSError as error:
            raise OSError(error.errno, f"cannot be read ({error.strerror})", name) from None
        if not read and not wide:
            mark = next((mark for mark in _WIDE_MARKS if block.startswith(mark)), None)
            wrong = f"begins as {_WIDE_MARKS[mark]} text does, expected {encoding}" if mark else ""
        if b"\0" in block and not wide:
            if wrong:
                raise ValueError(f"{name}: {wrong}; {_CONVERT}")
            raise ValueError(f"{name}: looks like a binary file (NUL at byte {read + block.index(0)})")
        read += len(block)
        try:
            text = lines.decode(block, final=not block)
        except UnicodeDecodeError as error:
            # The decoder prepends what it kept of the previous block, so count from the end.
            position = read - len(error.object) + error.start
            byte = f"byte 0x{error.object[error.start]:02x} at {position}: {error.reason}"
            wrong = wrong or f"not valid {encoding} text ({byte})"
            raise ValueError(f"{name}: {wrong}; {_CONVERT}") from None
        if first and text:
            text = text.removeprefix("\ufeff")
            first = not text  # a mark alone is not text
        if "\0" in text:
            raise ValueError(f"{name}: looks like a binary file (NUL character)")
        if text:
            yield text
        if not block:
            break
    if first:
        raise ValueError(f"{name}: the file is empty")


def download_corpus(
    name: str = "war-and-peace",
    cache_dir: str | Path | None = None,
    url: str | None = None,
    sha256: str | None = None,
    progressbar: bool = False,
) -> Path:
    """Download a text once; return the path of its cached copy (UTF-8, Project Gutenberg's frame removed).

    ``name`` is one of ``CORPORA``, or any name if ``url`` is given. ``cache_dir`` None is
    ``default_cache_dir()``. ``sha256`` is the checksum of the file as downloaded. **For "war-and-peace" no
    checksum is known in advance**, because Project Gutenberg edits its files in place: the checksum of the
    first download is written beside the file and verified at every later use, so later changes and damage are
    noticed, but the first download itself is taken on trust.

    Raises ValueError for an unknown name, and DownloadError (an OSError) if the download fails, the checksum
    differs, or a web page arrives instead of a text. A failed download leaves nothing in the cache.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or (url is None and name not in CORPORA):
        raise ValueError(f"corpus: expected one of {', '.join(CORPORA)}, got {name!r}")
    if url is None:
        source = CORPORA[name]
        url, sha256 = source.url, sha256 or source.sha256
    folder = (default_cache_dir() if cache_dir is None else Path(cache_dir)) / "corpora"
    stem = f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}"
    raw, record, text = folder / f"{stem}.download", folder / f"{stem}.sha256", folder / f"{stem}.txt"

    if raw.is_file() and (sha256 or record.is_file()):
        expected = sha256 or record.read_text("ascii").strip()
        actual = sha256_of_file(raw)
        if actual != expected:
            raise DownloadError(
                f"corpus {name}: the cached file {raw} has changed: expected sha256 {expected}, got "
                f"{actual}; delete it to download it again"
            )
    else:
        _download(name, url, sha256, raw, record, progressbar)
    body = strip_gutenberg_frame(raw.read_bytes().decode("utf-8-sig"))
    with atomic_writer(text) as file:
        file.write(body.encode("utf-8"))
    return text


def _download(name: str, url: str, sha256: str | None, raw: Path, record: Path, progressbar: bool) -> None:
    import pooch
    import requests

    help_text = f"Would be cached at {raw}. To train on a text of your own, pass --text FILE"
    make_cache_dir(raw.parent)
    # In a separate folder until its checksum is recorded, so that a file at `raw` can always be verified.
    with tempfile.TemporaryDirectory(dir=raw.parent, prefix=".download-") as folder:
        try:
            part = pooch.retrieve(
                url,
                known_hash=None if sha256 is None else f"sha256:{sha256}",
                fname=raw.name,
                path=folder,
                downloader=pooch.HTTPDownloader(progressbar=progressbar, timeout=30),
            )
        except requests.RequestException as error:
            raise DownloadError(f"corpus {name}: cannot download {url}: {error}. {help_text}") from None
        except ValueError as error:  # how pooch reports a checksum that differs
            reason = " ".join(str(error).split())
            raise DownloadError(f"corpus {name}: checksum of {url} differs: {reason}. {help_text}") from None
        data = Path(part).read_bytes()
        _check_is_text(name, url, data)
        with atomic_writer(record) as file:
            file.write(hashlib.sha256(data).hexdigest().encode("ascii") + b"\n")
        Path(part).replace(raw)


def _check_is_text(name: str, url: str, data: bytes) -> None:
    """DownloadError unless ``data`` is text; what usually arrives instead is a network's login page."""
    head = data[:1024].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if head.startswith((b"<!doctype", b"<html")):
        raise DownloadError(f"corpus {name}: {url} sent a web page, expected a text file")
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DownloadError(f"corpus {name}: {url} sent no utf-8 text (byte {error.start})") from None
    if b"\0" in data or not data.strip():
        raise DownloadError(f"corpus {name}: {url} sent a file that is empty or binary")


_GUTENBERG_START = re.compile(r"\*\*\* ?START OF (?:THE|THIS) PROJECT GUTENBERG EBOOK.{0,300}?\*\*\*", re.S)
_GUTENBERG_END = re.compile(r"\*\*\* ?END OF (?:THE|THIS) PROJECT GUTENBERG EBOOK")


def strip_gutenberg_frame(text: str) -> str:
    """The book without Project Gutenberg's header and footer; in any text, line ends become ``\\n``."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    start = _GUTENBERG_START.search(text)
    if start:
        text = text[start.end() :]
    end = _GUTENBERG_END.search(text)
    if end:
        text = text[: end.start()]
    return text.strip("\n") + "\n" if start or end else text
