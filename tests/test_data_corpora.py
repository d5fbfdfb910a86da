"""Text from Python itself, from files and standard input, and from a server on this machine."""

from __future__ import annotations

import hashlib
import io
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

import spikedecoder.data.corpora as corpora
from spikedecoder.data import (
    CORPORA,
    CorpusSource,
    DownloadError,
    builtin_text,
    default_cache_dir,
    download_corpus,
    read_text_files,
    strip_gutenberg_frame,
)


def test_builtin_text() -> None:
    text = builtin_text()
    assert 300_000 < len(text) < 1_000_000
    assert " the " in text and text == builtin_text()


def test_the_builtin_text_holds_out_what_it_does_not_teach() -> None:
    """Topics that are part of others would be learned by heart: no run of prose stands in both parts."""
    text = builtin_text()
    cut = len(text) * 9 // 10
    taught = {text[i : i + 100] for i in range(cut - 100)}
    held_out = [text[i : i + 100] for i in range(cut, len(text) - 100)]
    copied = [run for run in held_out if run in taught and len(set(run)) > 20]
    assert len(copied) < len(held_out) / 100


def test_builtin_text_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match=r"built-in text is not there.*pass --text FILE"):
        builtin_text()


def read(*paths: Path | str, encoding: str = "utf-8") -> str:
    return "".join(read_text_files(paths, encoding))


def test_files_are_joined(tmp_path: Path) -> None:
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    a.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree")
    b.write_bytes("\ufefffour é\n".encode())
    c.write_bytes("five".encode("utf-16"))
    for alias in ("utf16", "U16", "UTF_16"):
        assert read(c, encoding=alias) == "five"
    assert read(a, b) == "one\ntwo\nthree\nfour é\n"
    assert "".join(read_text_files(str(a))) == "one\ntwo\nthree"
    assert read(c, encoding="utf-16") == "five"
    b.write_bytes("é".encode("latin-1"))
    assert read(b, encoding="latin-1") == "é"


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1 << 20])
def test_blocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(corpora, "BLOCK_BYTES", block)
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfa\r\n\xc3\xa9\r\r\n\xf0\x9f\x98\x80b\r")
    assert read(path) == "a\né\n\n\U0001f600b\n"
    path.write_bytes(b"abc\xc3\xa9de\xc3(")
    with pytest.raises(ValueError, match=r"text: not valid utf-8 text \(byte 0xc3 at 7: "):
        read(path)
    path.write_bytes(b"abc\xc3")
    with pytest.raises(ValueError, match=r"byte 0xc3 at 3: unexpected end"):
        read(path)
    path.write_bytes(b"abcdef\0g")
    with pytest.raises(ValueError, match=r"text: looks like a binary file \(NUL at byte 6\)"):
        read(path)


def test_bad_files(tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    for content in (b"", b"\xef\xbb\xbf"):
        empty.write_bytes(content)
        with pytest.raises(ValueError, match=r"empty\.txt: the file is empty"):
            read(empty)
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no such file"):
        read(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=f"{tmp_path.name}: is a directory; expected a text file"):
        read(tmp_path)
    with pytest.raises(ValueError, match="encoding: Python knows no encoding 'klingon'"):
        read(empty, encoding="klingon")
    with pytest.raises(TypeError, match="encoding: expected a name, such as utf-8, got NoneType"):
        read(empty, encoding=None)  # type: ignore[arg-type]
    for encoding in ("utf-16", "utf-32"):  # without a NUL in it, too
        for text in ("a text", "漢字"):
            empty.write_bytes(text.encode(encoding))
            with pytest.raises(
                ValueError, match=rf"begins as {encoding} text does, expected utf-8; convert it to utf-8, as"
            ):
                read(empty)
    image = tmp_path / "x.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    with pytest.raises(ValueError, match=r"x\.png: looks like a binary file"):
        read(image)
    image.write_bytes("a\0b".encode("utf-16"))
    with pytest.raises(ValueError, match=r"x\.png: looks like a binary file"):
        read(image, encoding="utf-16")


@pytest.mark.skipif(sys.platform != "linux", reason="takes a file that cannot be read from Linux")
def test_a_failed_read_names_the_file() -> None:
    with pytest.raises(OSError, match=r"cannot be read \(Input/output error\): '/proc/self/mem'"):
        read("/proc/self/mem")


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO(b"from\r\nstdin")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=stream))
    file = tmp_path / "f"
    file.write_text("file")
    assert read("-", file) == "from\nstdin\nfile"
    assert not stream.closed
    with pytest.raises(ValueError, match="standard input: the file is empty"):
        read("-")


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPIKEDECODER_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("SPIKEDECODER_CACHE")
    assert "spikedecoder" in default_cache_dir().parts


BOOK = (
    "\ufeffThe Project Gutenberg eBook\r\n\r\n"
    "*** START OF THE PROJECT GUTENBERG EBOOK WAR\r\nAND PEACE ***\r\n"
    "\r\nWell, Prince\r\nthe end\r\n\r\n"
    "*** END OF THE PROJECT GUTENBERG EBOOK WAR AND PEACE ***\r\nlicence\r\n"
).encode()
STRIPPED = "Well, Prince\nthe end\n"


def test_strip_gutenberg_frame() -> None:
    assert strip_gutenberg_frame(BOOK.decode("utf-8-sig")) == STRIPPED
    assert strip_gutenberg_frame("no frame\r\n\n") == "no frame\n\n"


class Server:
    """What it serves can be changed between requests; it counts them."""

    def __init__(self) -> None:
        self.pages = {"/book.txt": BOOK}
        self.requests = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                body = outer.pages.get(self.path)
                self.send_response(200 if body is not None else 404)
                self.send_header("Content-Length", str(len(body or b"")))
                self.end_headers()
                self.wfile.write(body or b"")

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    running = Server()
    thread = threading.Thread(target=running.http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.http.shutdown()
    thread.join()
    running.http.server_close()


def test_download_once_with_checksum(server: Server, tmp_path: Path) -> None:
    checksum = hashlib.sha256(BOOK).hexdigest()
    for _ in range(2):
        path = download_corpus("war-and-peace", tmp_path, f"{server.url}/book.txt", checksum)
        assert path.read_text("utf-8") == STRIPPED
    assert server.requests == 1


def test_first_checksum_is_remembered(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = CorpusSource("book", f"{server.url}/book.txt", None, "public domain")
    monkeypatch.setitem(CORPORA, "war-and-peace", source)
    download_corpus(cache_dir=tmp_path)
    (raw,) = (tmp_path / "corpora").glob("*.download")
    (record,) = (tmp_path / "corpora").glob("*.sha256")
    assert record.read_text().strip() == hashlib.sha256(BOOK).hexdigest()
    raw.write_bytes(BOOK + b"changed")
    with pytest.raises(DownloadError, match=r"cached file .* has changed: .*delete it to download it again"):
        download_corpus(cache_dir=tmp_path)
    assert server.requests == 1
    raw.unlink()
    server.pages["/book.txt"] = BOOK.replace(b"Well", b"Oh")  # a new edition
    assert download_corpus(cache_dir=tmp_path).read_text("utf-8").startswith("Oh, Prince")


def test_failed_downloads(server: Server, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    deaf = socket.socket()  # bound, so that nobody else gets the port, but not listening
    request.addfinalizer(deaf.close)
    deaf.bind(("127.0.0.1", 0))
    refused = f"http://127.0.0.1:{deaf.getsockname()[1]}/book.txt"
    server.pages["/login"] = b"\n<!DOCTYPE html><html>Log in"
    server.pages["/empty"] = b" \n"
    server.pages["/latin"] = b"caf\xe9"
    cases = [
        (f"{server.url}/book.txt", "0" * 64, "checksum of .* differs"),
        (f"{server.url}/none.txt", None, "cannot download .*404"),
        (refused, None, "cannot download .*refused"),
        (f"{server.url}/login", None, "sent a web page, expected a text file"),
        (f"{server.url}/empty", None, "empty or binary"),
        (f"{server.url}/latin", None, "sent no utf-8 text"),
    ]
    for url, checksum, message in cases:
        with pytest.raises(DownloadError, match=message) as caught:
            download_corpus("mine", tmp_path, url, checksum)
        assert "mine" in str(caught.value) and "\n" not in str(caught.value)
        if url.endswith(".txt"):
            assert str(tmp_path) in str(caught.value) and "--text FILE" in str(caught.value)
    assert list((tmp_path / "corpora").iterdir()) == []


def test_unknown_corpus(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="corpus: expected one of war-and-peace, got 'bible'"):
        download_corpus("bible", tmp_path)
    with pytest.raises(ValueError, match="corpus: expected one of"):
        download_corpus("../evil", tmp_path, "http://127.0.0.1:1/x")
