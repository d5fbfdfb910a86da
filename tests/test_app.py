"""The app: what it finds and does, and the page itself in a real browser.

The browser tests need gradio and playwright (Python packages) and a Chromium:
pip install 'spikedecoder[app]' playwright; apt install chromium (or SPIKEDECODER_CHROMIUM=/path/to/it).
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig
from spikedecoder.activity import Activity
from spikedecoder.app.models import Library
from spikedecoder.cli import main
from spikedecoder.data import CharTokenizer, WordTokenizer
from spikedecoder.energy import measure
from spikedecoder.kinds import KINDS, kind_of

TEXT = "the cat sat on the mat. a rat ran."
TINY = {"max_len": 24, "token_dim": 10, "position_dim": 6, "heads": 2, "blocks": 1, "timesteps": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


def save(folder: Path, kind: str, words: bool = False, seed: int = 0, **changes: int) -> Path:
    tokenizer = WordTokenizer.from_text(TEXT) if words else CharTokenizer.from_text(TEXT)
    vocabulary = {"vocab_size": tokenizer.vocab_size, "pad_id": tokenizer.pad_id}
    torch.manual_seed(seed)
    config = SpikeDecoderConfig.from_dict(
        {"embedding_gain": 2.0, **TINY, **vocabulary, **KINDS[kind], **changes}
    )
    model = SpikeDecoder(config)
    model.tokenizer = tokenizer
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a run of each of three sorts, and things that are no models."""
    root = tmp_path / "runs"
    save(root / "spiking" / "best", "fully spiking")
    (root / "spiking" / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "val_loss": 1}\n')
    save(root / "group" / "ann", "non-spiking")
    save(root / "words" / "last", "SpikeDecoder", words=True)
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{")
    (root / "broken" / "model.safetensors").write_bytes(b"")
    (root / "empty").mkdir()
    return root


def test_kinds_are_told_from_configurations():
    for name, changes in KINDS.items():
        assert kind_of(SpikeDecoderConfig.preset("default-lif", **changes)) == name
    of = lambda **changes: kind_of(SpikeDecoderConfig(**changes))  # noqa: E731
    assert of() == "SpikeDecoder" and of(timesteps=1) == "fully spiking"
    assert of(spike_degree=3) == "SpikeDecoder" and of(spike_degree=1) == "partly spiking"
    assert of(attention_only=True) == "partly spiking" and of(reunite="final") == "fully spiking"


def test_the_library_finds_what_is_there_and_notices_what_changes(runs: Path):
    library = Library([runs])
    found = {m.label: (m.kind, m.tokens) for m in library.find()}
    assert found == {
        "spiking": ("fully spiking", "characters"),
        "group/ann": ("non-spiking", "characters"),
        "words": ("SpikeDecoder", "words"),
    }
    assert [m.label for m in library.find("non-spiking")] == ["group/ann"]
    assert library.find("non-spiking", "words") == []
    path = str(runs / "spiking")
    loaded = library.get(path)
    assert library.get(path) is loaded and loaded.label == "spiking"
    assert loaded.about.startswith("fully spiking, characters, 1 blocks of 16 channels, T = 2, context")
    one_pass = SpikeDecoder(loaded.model.config.replace(spike_degree=1))  # only its embedding spikes
    one_pass.tokenizer = loaded.model.tokenizer
    about = dataclasses.replace(loaded, model=one_pass).about
    assert about.startswith("partly spiking, characters, 1 blocks of 16 channels, context")
    time.sleep(0.01)
    save(runs / "spiking" / "best", "fully spiking", seed=1)  # trained on meanwhile
    assert library.get(path) is not loaded
    shutil.rmtree(runs / "spiking")
    with pytest.raises(ValueError, match="holds no model any more"):
        library.get(path)
    with pytest.raises(ValueError, match=r"checkpoint: .*nowhere holds no model; takes a folder"):
        library.get(str(runs / "nowhere"))
    with pytest.raises(ValueError, match="none chosen"):
        library.get(None)
    with pytest.raises(ValueError, match="not a JSON file"):
        library.get(str(runs / "broken"))
    (runs / "group" / "ann" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        library.get(str(runs / "group" / "ann"))


def test_links_and_folders_that_may_not_be_read(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "elsewhere" / "mine", "fully spiking")
    (runs / "linked").symlink_to(tmp_path / "elsewhere" / "mine")
    (runs / "group" / "back").symlink_to(runs)
    is_file = Path.is_file

    def refused(path: Path) -> bool:  # as Path.is_file does, but for root
        if "empty" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refused)
    library = Library([runs])
    assert [m.label for m in library.find()] == ["group/ann", "linked", "spiking", "words"]
    assert library.get(str(runs / "linked")).label == "linked"


def test_models_of_two_folders_that_share_a_name_are_told_apart(runs: Path, tmp_path: Path):
    pytest.importorskip("gradio")
    pytest.importorskip("matplotlib")
    from spikedecoder.app.handlers import Handlers, Session

    other = save(tmp_path / "more" / "spiking", "fully spiking", seed=1)
    library = Library([runs, tmp_path / "more"])
    labels = {m.path: m.label for m in library.find()}
    both = [str(runs / "spiking"), str(other)]
    assert [labels[path] for path in both] == both and labels[str(runs / "words")] == "words"
    assert [library.get(path).label for path in both] == both
    session = Session()
    list(Handlers(library).compare(session, both, "the", False, 3, 0.8, None, 1, False))
    assert list(session.ledgers) == both  # none took the other's place


def test_what_is_shown_is_what_the_text_cost(runs: Path):
    pytest.importorskip("matplotlib")
    from spikedecoder.app.writing import Settings, observe, write

    loaded = Library([runs]).get(str(runs / "spiking"))
    *_, written = write(loaded, "the cat", Settings(tokens=9, seed=3))
    assert written.text.startswith("the cat") and len(written.tokens) == len(written.predictions) == 9
    again = list(write(loaded, "the cat", Settings(tokens=9, seed=3)))[-1]
    assert again.text == written.text
    seen = observe(loaded, written)
    read = torch.tensor([written.prompt + written.tokens[:-1]])
    assert seen.cost.ledger.totals() == measure(loaded.model, read, mode="token").totals()
    assert seen.activity.spikes[seen.layers[0]].shape[2] == len(seen.labels) == 15
    assert "".join(seen.labels) == written.text[:-1]  # the last token was written, not read
    assert "9 tokens" in seen.summary and "estimated" in seen.summary
    silent = Library([runs]).get(str(runs / "group" / "ann"))
    *_, written = write(silent, "", Settings(tokens=3))
    assert observe(silent, written).layers == [] and "no spikes" in observe(silent, written).summary
    with pytest.raises(ValueError, match="outside the model's vocabulary: 'Z'"):
        next(write(loaded, "Z", Settings()))
    with pytest.raises(ValueError, match="tokens: got 0"):
        next(write(loaded, "a", Settings(tokens=0)))


@pytest.mark.parametrize(("max_len", "window"), [(128, (0, 66)), (64, (33, 66))])
def test_the_last_tokens_are_shown_with_what_came_before(
    tmp_path: Path, max_len: int, window: tuple[int, int]
):
    pytest.importorskip("matplotlib")
    from spikedecoder.app.writing import Settings, observe, write
    from spikedecoder.viz import record

    save(tmp_path / "run", "fully spiking", max_len=max_len)
    loaded = Library([tmp_path]).get(str(tmp_path / "run"))
    *_, written = write(loaded, "the cat", Settings(tokens=60, seed=3))
    seen = observe(loaded, written)
    read = (written.prompt + written.tokens)[slice(*window)]
    expected = record(loaded.model, torch.tensor([read]), scores=True)
    last = seen.activity.last(len(seen.labels))
    assert "".join(seen.labels) == written.text[:-1][-len(seen.labels) :]
    assert len(seen.labels) == min(40, len(read))
    for name, spikes in expected.spikes.items():
        assert torch.equal(seen.activity.spikes[name], spikes)
        assert torch.equal(last.spikes[name], spikes[:, :, -len(seen.labels) :])
    for name, scores in expected.scores.items():
        assert torch.equal(last.scores[name], scores[..., -len(seen.labels) :, -len(seen.labels) :])
    none = seen.activity.last(0)
    assert {s.shape[2] for s in (*none.spikes.values(), *none.potentials.values())} == {0}
    assert {s.shape[-2:] for s in none.scores.values()} == {(0, 0)}
    with pytest.raises(ValueError, match="tokens: got -1, takes an integer >= 0"):
        seen.activity.last(-1)


def test_potentials_are_those_of_the_layers_block_alone(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    from spikedecoder import viz
    from spikedecoder.app.writing import VIEWS, layer_figure

    names = ["embedding.lif", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "blocks.10.mlp.fc1", "blocks.11.lif"]
    activity = Activity({name: torch.zeros(1, 1, 1, 1, dtype=torch.bool) for name in names})
    activity.potentials = {name: torch.zeros(1, 1, 1, 1) for name in names}
    seen: Any = SimpleNamespace(activity=activity, labels=["a"])
    monkeypatch.setattr(viz, "potentials", lambda _, layers: layers)
    assert layer_figure(seen, VIEWS[2], "blocks.1.mlp.fc2") == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    assert layer_figure(seen, VIEWS[2], "blocks.10.mlp.fc1") == ["blocks.10.mlp.fc1"]
    assert layer_figure(seen, VIEWS[2], "embedding.lif") == ["embedding.lif"]


def test_one_training_at_a_time_and_it_can_be_stopped(tmp_path: Path):
    from spikedecoder.app.training import stop_training, train_small

    told: list[str] = []

    def tell(share: float, said: str) -> None:
        told.append(said)
        if "step" in said:
            stop_training()
            with pytest.raises(ValueError, match="being trained already"):
                train_small("non-spiking", "words", 1, tmp_path, tell)

    result = train_small("non-spiking", "characters", 50, tmp_path, tell)
    assert told[0] == "reading the text" and told[1].startswith("step 1 of 50")
    assert result is not None and (result.step, result.interrupted) == (1, "reporter")
    assert SpikeDecoder.from_pretrained(result.out).config == result.model.config  # what it had learned
    others = set(tmp_path.iterdir())
    at_once = lambda share, said: stop_training()  # noqa: E731
    assert train_small("non-spiking", "characters", 50, tmp_path, at_once) is None
    assert set(tmp_path.iterdir()) == others
    with pytest.raises(ValueError, match="kind: got 'x'"):
        train_small("x", "words", 1, tmp_path, tell)
    with pytest.raises(ValueError, match="steps: got 0"):
        train_small("non-spiking", "words", 0, tmp_path, tell)


def test_a_training_is_saved_when_the_app_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gr = pytest.importorskip("gradio")
    from spikedecoder.app import launch, training

    began, result = threading.Event(), []

    def tell(share: float, said: str) -> None:
        if "step" in said:
            began.set()

    def run() -> None:
        result.append(training.train_small("non-spiking", "characters", 100_000, tmp_path, tell))

    def block(page: Any) -> None:
        thread.start()
        assert began.wait(120)

    thread = threading.Thread(target=run)
    monkeypatch.setattr(gr.Blocks, "launch", lambda *_, **__: None)
    monkeypatch.setattr(gr.Blocks, "block_thread", block)
    launch([tmp_path])
    thread.join(1)
    assert not thread.is_alive() and result[0].interrupted == "reporter"
    assert (result[0].out / "last").exists()


def test_bad_arguments(tmp_path: Path, monkeypatch, capsys):
    from spikedecoder.app import launch

    for options, message in (
        ({"roots": []}, "roots: got none"),
        ({"port": 0}, "port: got 0"),
        ({"roots": [tmp_path, tmp_path / "none"]}, "no such folder"),
    ):
        with pytest.raises(ValueError, match=message):
            launch(**options)
    with pytest.raises(SystemExit) as exit_:
        main(["gui", "--checkpoint", str(tmp_path / "none")])
    assert exit_.value.code == 2 and "no such folder" in capsys.readouterr().err
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen at 127.0.0.1:{port}: the port is taken; .* --port"):
            launch([tmp_path], port=port)
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"pip install 'spikedecoder\[app\]'"):
        launch([tmp_path])


def test_pages_elsewhere_can_neither_read_it_nor_leave_files(tmp_path: Path):
    pytest.importorskip("gradio")
    import httpx

    from spikedecoder.app import launch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = launch([tmp_path], port=port, block=False)
    try:
        at = f"http://127.0.0.1:{port}"
        assert httpx.get(at).status_code == 200 and httpx.get(f"http://localhost:{port}").status_code == 200
        assert httpx.get(at, headers={"host": f"evil.example:{port}"}).status_code == 400
        for path in ("/gradio_api/upload", "/gradio_api/process_recording", "/upload"):
            answer = httpx.post(f"{at}{path}", files={"files": ("a.txt", b"from elsewhere")})
            assert answer.status_code == 403, path
        assert httpx.get(f"{at}/gradio_api/info").status_code == 200
    finally:
        page.close(verbose=False)


# --- the page, in a browser ---


@pytest.fixture(scope="module")
def browser():
    pytest.importorskip("gradio")
    sync_api = pytest.importorskip("playwright.sync_api")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = os.environ.get("SPIKEDECODER_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("no Chromium; install one, or name it in SPIKEDECODER_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def serve(browser):
    """Serves the app over a folder; gives a function that opens tabs."""
    from spikedecoder.app import launch

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pages, tabs = [], []

    def start(root: Path):
        pages.append(launch([root], port=port, block=False))

        def tab(width: int = 1280, height: int = 900):
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(60_000)
            page.problems = []
            page.on("console", lambda m: page.problems.append(m.text) if m.type == "error" else None)
            page.on("request", lambda r: page.problems.append(r.url) if _elsewhere(r.url, port) else None)
            tabs.append(page)
            page.goto(f"http://127.0.0.1:{port}")
            page.wait_for_selector("#prompt textarea")
            return page

        return tab

    yield start
    for page in tabs:
        page.close()
    for page in pages:
        page.close(verbose=False)


def _elsewhere(url: str, port: int) -> bool:
    return not url.startswith((f"http://127.0.0.1:{port}", f"http://localhost:{port}", "data:", "blob:"))


def until(condition, what: str, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited too long for {what}"
        time.sleep(0.05)


def about(page, start: str) -> None:
    until(lambda: page.inner_text("#about").startswith(start), f"a {start} model")


def written(page) -> str:
    return page.input_value("#text textarea")


def source(page, name: str) -> str | None:
    image = page.locator(f"#{name} img")
    return image.get_attribute("src") if image.count() else None


def write(page, prompt: str) -> None:
    """Write, and wait until everything about the text is there."""
    before = source(page, "heatmap")
    page.fill("#prompt textarea", prompt)
    page.click("#write")
    until(lambda: source(page, "heatmap") not in (None, before), "the heat map")
    until(lambda: "a token read, estimated" in page.inner_text("#figures"), "the figures")


def message(page) -> str:
    page.wait_for_selector(".toast-body")
    return page.locator(".toast-body").first.inner_text()


def overlaps(page) -> list[str]:
    """Pictures that lie under their label or under the page's edge."""
    return page.evaluate(
        """() => [...document.querySelectorAll('.picture')].filter(box => {
            const image = box.querySelector('img'), label = box.querySelector('label');
            if (!image || !label || !image.offsetParent) return false;
            const top = image.getBoundingClientRect().top, bottom = label.getBoundingClientRect().bottom;
            const edge = box.getBoundingClientRect().right > window.innerWidth;
            return edge || top < bottom - 1;
        }).map(box => box.id)"""
    )


def fits(page) -> bool:
    return page.evaluate("document.scrollingElement.scrollWidth <= window.innerWidth")


@pytest.mark.slow
def test_write_look_switch_and_compare(serve, runs: Path):
    page = serve(runs)()
    about(page, "non-spiking")  # group/ann, the first by name
    page.get_by_label("fully spiking", exact=True).check()
    about(page, "fully spiking")
    write(page, "the cat")
    assert written(page).startswith("the cat") and len(written(page)) > 40
    first = {name: source(page, name) for name in ("heatmap",)}
    page.get_by_role("tab", name="Spikes").click()
    until(lambda: source(page, "raster") and source(page, "rates"), "the raster")
    first["raster"] = source(page, "raster")
    assert overlaps(page) == []
    page.click("#layer input")
    page.get_by_role("option", name="blocks.0.mlp.fc1").click()
    until(lambda: source(page, "raster") != first["raster"], "the raster of another layer")
    for view in ("attention", "membrane potentials"):
        drawn = source(page, "raster")
        page.locator("#view").get_by_label(view).check()
        until(lambda drawn=drawn: source(page, "raster") != drawn, view)
    page.get_by_role("tab", name="Loss").click()
    until(lambda: source(page, "curves"), "the learning curves")
    page.get_by_role("tab", name="Energy").click()
    until(lambda: source(page, "energy"), "the energy")
    first["energy"] = source(page, "energy")
    page.get_by_label("Energy: bill moving data").check()
    until(lambda: source(page, "energy") != first["energy"], "the energy with memory")
    until(lambda: "memory: weights in" in page.inner_text("#energy-note"), "what it rests on")
    first["energy"] = source(page, "energy")

    # another text: other figures; then another kind: no spikes
    write(page, "a rat")
    assert written(page).startswith("a rat") and source(page, "heatmap") != first["heatmap"]
    until(lambda: source(page, "energy") != first["energy"], "the energy of the other text")
    page.get_by_label("non-spiking").check()
    about(page, "non-spiking")
    write(page, "the cat")
    page.get_by_role("tab", name="Spikes").click()
    until(lambda: "no spiking neurons" in page.inner_text("#silent"), "the word that nothing spikes")
    assert source(page, "raster") is None or not page.locator("#raster img").is_visible()
    page.get_by_label("words", exact=True).check()
    until(lambda: "No non-spiking model of words" in page.inner_text("#offer"), "the offer to train one")
    page.get_by_label("SpikeDecoder", exact=True).check()
    about(page, "SpikeDecoder, words")
    write(page, "the cat sat")
    assert written(page).startswith("the cat sat ")

    page.locator("#compare-panel button").first.click()
    for name in ("spiking", "group/ann"):
        page.locator("#models input").click()
        page.get_by_role("option", name=f"{name} (").click()
    page.keyboard.press("Escape")
    page.click("#compare")
    until(lambda: source(page, "compare-energy"), "the comparison")
    assert page.locator("#texts .card").count() == 2
    cells = page.locator("#texts td").all_inner_texts()
    assert [cells[0], cells[6]] == ["spiking", "group/ann"] and cells[8] == "-" and "J" in cells[3]
    assert overlaps(page) == [] and fits(page)
    page.set_viewport_size({"width": 390, "height": 844})
    until(lambda: fits(page), "the page on a phone", 10)
    assert overlaps(page) == []
    assert page.problems == []


@pytest.mark.slow
def test_what_goes_wrong_is_said_and_tabs_keep_apart(serve, runs: Path):
    tab = serve(runs)
    one = tab()
    about(one, "non-spiking")
    one.get_by_label("fully spiking", exact=True).check()
    about(one, "fully spiking")
    two = tab(390, 844)
    about(two, "non-spiking")
    write(one, "the mat")
    write(two, "on")
    assert written(one).startswith("the mat") and written(two).startswith("on")
    assert "no spikes" in two.inner_text("#figures") and "mean spike rate" in one.inner_text("#figures")
    one.get_by_role("tab", name="Spikes").click()
    until(lambda: source(one, "raster"), "the raster")
    raster = source(one, "raster")
    one.click("#layer input")
    one.get_by_role("option", name="head.lif").click()  # of its own text, after the other tab's
    until(lambda: source(one, "raster") != raster, "the raster of another layer")
    assert fits(two) and overlaps(two) == []

    one.fill("#prompt textarea", "ZEBRA")
    one.click("#write")
    assert "outside the model's vocabulary" in message(one)
    assert written(one).startswith("the mat")
    shutil.rmtree(runs / "group" / "ann")
    two.click("#write")
    assert "holds no model any more" in message(two)
    two.get_by_label("fully spiking", exact=True).check()
    about(two, "fully spiking")
    write(two, "cat")
    assert written(two).startswith("cat")


@pytest.mark.slow
def test_without_a_model_it_offers_to_train_one(serve, tmp_path: Path):
    page = serve(tmp_path / "runs")()
    until(lambda: "Train the small default first" in page.inner_text("#offer"), "the offer")
    page.click("#write")
    assert "none chosen" in message(page)
    page.get_by_label("non-spiking").check()
    page.locator("#steps input[type=number]").fill("10")
    page.locator("#steps input[type=number]").press("Enter")
    page.click("#train")
    until(lambda: "step " in page.inner_text("#trained"), "the progress", 120)
    until(lambda: "Trained: " in page.inner_text("#trained"), "the model", 180)
    about(page, "non-spiking, characters")
    write(page, "The ")
    assert written(page).startswith("The ")
    assert (tmp_path / "runs" / "non-spiking-characters-builtin-1" / "best" / "model.safetensors").is_file()
