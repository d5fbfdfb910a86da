"""A model as a folder: round trips, atomic writes, and clear errors for what cannot be read."""

from __future__ import annotations

import builtins
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.utils import prune

from spikedecoder import CheckpointError, SpikeDecoder, SpikeDecoderConfig
from spikedecoder import checkpoint as ck
from spikedecoder.data import CharTokenizer
from spikedecoder.data._files import atomic_writer
from spikedecoder.nn.attention import AttentionLIF
from spikedecoder.nn.norm import Norm


def _model():
    return SpikeDecoder(
        SpikeDecoderConfig(vocab_size=7, max_len=8, token_dim=6, position_dim=2, heads=2, blocks=1)
    )


@pytest.fixture
def saved(tmp_path):
    model = _model()
    model.tokenizer = CharTokenizer.from_text(["hello"])
    model.save_pretrained(tmp_path / "m")
    return model, tmp_path / "m"


def test_round_trip(saved):
    model, folder = saved
    loaded = SpikeDecoder.from_pretrained(folder)
    assert loaded.config == model.config and not loaded.training
    assert loaded.tokenizer.tokens == model.tokenizer.tokens
    tokens = torch.randint(0, 7, (2, 8))
    assert torch.equal(loaded(tokens), model.eval()(tokens))


def test_what_no_file_would_bring_back_is_not_lost(tmp_path):
    def neuron(model):
        model.blocks[0].mlp.input_lif = torch.nn.Threshold(1.0, 0.0)

    def threshold(model):
        lif = model.blocks[0].mlp.fc1.lif
        lif.params = dataclasses.replace(lif.params, v_threshold=0.3)

    def forward(model):
        model.head.forward = lambda x: x

    def scale(model):
        model.blocks[0].attention.attention_lif.scale *= 2

    for change, said in (
        (neuron, r"blocks\.0\.mlp\.input_lif is a Threshold, not a LIF"),
        (threshold, r"blocks\.0\.mlp\.fc1\.lif: params is LIFParams.*v_threshold=0\.3"),
        (forward, "head has a forward of its own"),
        (scale, r"blocks\.0\.attention\.attention_lif: scale is 0\.25, not 0\.125"),
    ):
        model = _model()
        change(model)
        with pytest.raises(ValueError, match=f"model: is not what its config makes .{said}"):
            model.save_pretrained(tmp_path / "m")
        assert not (tmp_path / "m").exists()

    class Counting(SpikeDecoder):
        """What a class of one's own keeps in its models is its own affair."""

        def __init__(self, config):
            super().__init__(config)
            self.calls, self.mask, self.log = 0, torch.zeros(3), object()

        def forward(self, tokens):
            self.calls += 1
            return super().forward(tokens)

    model = Counting(_model().config)
    model(torch.zeros(1, 2, dtype=torch.int64))
    model.save_pretrained(tmp_path / "counting")
    assert isinstance(Counting.from_pretrained(tmp_path / "counting"), Counting)
    model = _model()  # how a module runs is the object's
    model.recompute_activations()
    model.blocks[0].attention.attention_lif.dropout = 0.1
    model.half().train().save_pretrained(tmp_path / "m")


def test_options_that_mean_nothing_are_refused(saved):
    _, folder = saved
    for option in ("torch_dtype", "strict", "vocab_size"):
        with pytest.raises(
            TypeError, match=f"from_pretrained: got '{option}', takes name, device and revision"
        ):
            SpikeDecoder.from_pretrained(folder, **{option: None})
    assert SpikeDecoder.from_pretrained(folder, revision="main", local_files_only=True)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="this user may read everything")
def test_weights_that_may_not_be_read(saved):
    _, folder = saved
    (folder / ck.WEIGHTS).chmod(0)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read \(Permission denied\)"):
        SpikeDecoder.from_pretrained(folder)


def test_a_tokenizer_that_cannot_be_read_again_is_not_written(tmp_path):
    model = _model()
    model.tokenizer = object()
    with pytest.raises(TypeError, match=r"model\.tokenizer: got object, takes a CharTokenizer or a Word"):
        model.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_round_trip_keeps_dtype_and_buffers(tmp_path):
    config = SpikeDecoderConfig(
        vocab_size=7, max_len=8, token_dim=6, position_dim=2, heads=2, blocks=1, norm="power"
    )
    model = SpikeDecoder(config).double()
    model(torch.randint(0, 7, (2, 8)))
    model.save_pretrained(tmp_path)
    loaded = SpikeDecoder.from_pretrained(str(tmp_path))
    assert loaded.dtype == torch.float64
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_folder_holds_the_model_that_was_saved_last(tmp_path):
    config = SpikeDecoderConfig.preset("default-lif", vocab_size=5, max_len=12, blocks=1)
    first, second = SpikeDecoder(config), SpikeDecoder(config.replace(vocab_size=3))
    first.tokenizer = CharTokenizer.from_text("abc")
    first.save_pretrained(tmp_path)
    second.save_pretrained(tmp_path)
    loaded = SpikeDecoder.from_pretrained(tmp_path)
    assert loaded.tokenizer is None and loaded.config == second.config


def test_a_crash_among_the_renames_leaves_no_other_models_tokenizer(saved, monkeypatch):
    model, folder = saved
    model.tokenizer = None

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {ck.CONFIG, ck.WEIGHTS}


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    config = SpikeDecoderConfig.preset("default-ann", vocab_size=20, max_len=16, blocks=1)
    SpikeDecoder(config).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"cannot write \(No space left.*model.safetensors"):
        SpikeDecoder(config.replace(heads=8)).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_weights_that_no_config_makes_are_not_written(tmp_path):
    """Nor do they replace those that are there."""
    model = _model()
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    linear = model.blocks[0].mlp.fc1.linear
    prune.l1_unstructured(linear, "weight", 0.5)
    with pytest.raises(
        ValueError, match=r"model: .*missing blocks\.0\.mlp\.fc1\.linear\.weight; .*prune\.remove"
    ):
        model.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    prune.remove(linear, "weight")
    model.save_pretrained(tmp_path)
    assert torch.equal(
        SpikeDecoder.from_pretrained(tmp_path).blocks[0].mlp.fc1.linear.weight, linear.weight.detach()
    )


def test_a_save_imports_no_compiler(tmp_path):
    """It takes a second: that of what is looked at to know what a config makes is not needed."""
    code = (
        "import sys; from spikedecoder import SpikeDecoder, SpikeDecoderConfig\n"
        "SpikeDecoder(SpikeDecoderConfig.preset('default', vocab_size=9)).save_pretrained(sys.argv[1])\n"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "m")], check=True)


def test_tied_weights_are_saved(tmp_path):
    model = SpikeDecoder(SpikeDecoderConfig.preset("default-ann", vocab_size=20, max_len=16, blocks=1)).eval()
    model.head.linear.weight = model.embedding.token.weight
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 20, (2, 8))
    assert torch.equal(SpikeDecoder.from_pretrained(tmp_path)(ids), model(ids))


def test_each_tensor_keeps_its_dtype(tmp_path):
    model = SpikeDecoder(SpikeDecoderConfig.preset("default-lif", vocab_size=20, max_len=16, blocks=1))
    model.bfloat16()
    for module in model.modules():
        if isinstance(module, Norm):
            module.float()
            torch.nn.init.normal_(module.weight)
    model.save_pretrained(tmp_path)
    loaded = SpikeDecoder.from_pretrained(tmp_path)
    assert {t.dtype for t in loaded.parameters()} == {torch.bfloat16, torch.float32}
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decays_are_those_of_the_model_that_was_saved(tmp_path, dtype):
    model = SpikeDecoder(SpikeDecoderConfig.preset("default-lif", vocab_size=20, max_len=16, blocks=1))
    model.to(dtype).save_pretrained(tmp_path)
    (saved,), (loaded,) = (
        [m.decay for m in each.modules() if isinstance(m, AttentionLIF)]
        for each in (model, SpikeDecoder.from_pretrained(tmp_path))
    )
    assert loaded.dtype == saved.dtype and torch.equal(loaded, saved)


def test_works_offline_by_folder_and_says_why_a_hub_name_fails():
    assert os.environ.get("HF_HUB_OFFLINE") == "1"
    with pytest.raises(CheckpointError, match=r"nobody/nothing: no such folder here, and config\.json could"):
        SpikeDecoder.from_pretrained("nobody/nothing")
    with pytest.raises(ValueError, match="name: got '', takes a folder"):
        SpikeDecoder.from_pretrained("")


@pytest.mark.parametrize("card", [False, True])
def test_push_to_hub_uploads_the_files(saved, monkeypatch, card):
    import huggingface_hub

    model, folder = saved
    calls, files = [], {}

    class Api:
        def __init__(self, token=None):
            calls.append(("api", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))
            return huggingface_hub.RepoUrl(f"https://huggingface.co/somebody/{repo_id}")

        def create_branch(self, repo_id, **options):
            calls.append(("branch", repo_id, options))

        def file_exists(self, repo_id, name, **options):
            return card

        def upload_folder(self, *, repo_id, folder_path, **options):
            calls.append(("upload", repo_id, options))
            files.update((path.name, path.read_bytes()) for path in Path(folder_path).iterdir())
            return "https://huggingface.co/somebody/small/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    url = model.push_to_hub("small", private=True, token="t", branch="next", commit_message="m")
    assert url == "https://huggingface.co/somebody/small/commit/1"
    kept = {"delete_patterns": None if model.tokenizer else "tokenizer.json"}
    assert calls == [
        ("api", "t"),
        ("create", "small", {"private": True, "exist_ok": True}),
        ("branch", "somebody/small", {"branch": "next", "exist_ok": True}),
        ("upload", "somebody/small", {**kept, "revision": "next", "commit_message": "m", "create_pr": False}),
    ]
    readme = files.pop("README.md", None)
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    if card:
        assert readme is None  # theirs stays
    else:
        assert b'from_pretrained("somebody/small")' in readme and b"library_name: spikedecoder" in readme


def test_the_hub_is_imported_by_those_who_need_it():
    code = "import spikedecoder, sys; print('huggingface_hub' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_runs_folder_stands_for_its_best_model(tmp_path):
    last = _model()
    best = SpikeDecoder(last.config.replace(blocks=2))
    last.save_pretrained(tmp_path / "last")
    assert SpikeDecoder.from_pretrained(tmp_path).config.blocks == 1
    best.save_pretrained(tmp_path / "best")
    assert SpikeDecoder.from_pretrained(tmp_path).config.blocks == 2


def test_what_can_only_be_a_folder_is_not_asked_of_the_hub(tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("run", "runs/bok", tmp_path / "run"):
        with pytest.raises(CheckpointError, match="a name on the hub is OWNER/NAME"):
            SpikeDecoder.from_pretrained(name)


def _truncate(folder):
    path = folder / ck.WEIGHTS
    path.write_bytes(path.read_bytes()[:200])


def _larger_tokenizer(folder):
    ck.write_json(folder / ck.TOKENIZER, CharTokenizer.from_text(["abcdefghi"]).to_dict())


def _foreign(folder):
    (folder / ck.WEIGHTS).write_bytes(b"PK\x03\x04 not safetensors at all")


def _drop_tensor(folder):
    tensors = ck.read_tensors(folder / ck.WEIGHTS)
    del tensors["head.linear.bias"]
    ck.write_tensors(folder / ck.WEIGHTS, tensors)


def _add_tensor(folder):
    tensors = ck.read_tensors(folder / ck.WEIGHTS)
    ck.write_tensors(folder / ck.WEIGHTS, {**tensors, "surplus": torch.ones(1)})


def _reshape(folder):
    tensors = ck.read_tensors(folder / ck.WEIGHTS)
    tensors["head.linear.bias"] = torch.ones(3)
    ck.write_tensors(folder / ck.WEIGHTS, tensors)


def _retype(dtype, only=None):
    def change(folder):
        tensors = ck.read_tensors(folder / ck.WEIGHTS)
        ck.write_tensors(
            folder / ck.WEIGHTS,
            {name: t.to(dtype) if only in (None, name) else t for name, t in tensors.items()},
        )

    return change


def _config(**changes):
    def change(folder):
        values = json.loads((folder / ck.CONFIG).read_text())
        (folder / ck.CONFIG).write_text(json.dumps({**values, **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"model.safetensors: not a safetensors file, or truncated"),
        (_foreign, r"model.safetensors: not a safetensors file"),
        (_drop_tensor, "missing head.linear.bias"),
        (_add_tensor, "unknown surplus"),
        (_reshape, r"head.linear.bias of shape \(3,\) for \(7,\)"),
        (_retype(torch.int64, "head.linear.bias"), "head.linear.bias of int64, takes float16 to float64"),
        (_retype(torch.int8), "of int8, takes float16 to float64; .* more"),
        (_retype(torch.float8_e4m3fn), "of float8_e4m3fn, takes"),
        (_retype(torch.complex64), "of complex64, takes"),
        (lambda f: (f / ck.WEIGHTS).unlink(), "model.safetensors: no such file"),
        (lambda f: (f / ck.CONFIG).unlink(), "config.json: no such file"),
        (lambda f: (f / ck.CONFIG).write_text("{"), "config.json: not a JSON file, or truncated"),
        (lambda f: (f / ck.CONFIG).write_text("[1]"), "config.json: got a JSON list"),
        (lambda f: (f / ck.CONFIG).write_bytes(b"\xff\xfe\x00"), "config.json: not a JSON file"),
        (lambda f: (f / ck.CONFIG).write_text("[" * 100_000), "config.json: not a JSON file"),
        (lambda f: (f / ck.CONFIG).write_text('{"a":' + "9" * 5000 + "}"), "config.json: not a JSON file"),
        (lambda f: (f / ck.TOKENIZER).write_text("[" * 100_000), "tokenizer.json: not a tokenizer file"),
        (_config(vocab_size=10**12), "config.json: vocab_size: got 1000000000000, takes 1 to 16777216"),
        (_config(vocab_size=2**24), r"head.linear.bias of shape \(7,\) for \(16777216,\)"),
        (
            _config(token_dim=2**20, mlp_ratio=2**16, timesteps=2**16, max_len=2**24, blocks=100),
            "weights do not fit the config: missing blocks.",
        ),
        (_config(format=99), "config.json: got format 99"),
        (lambda f: (f / ck.TOKENIZER).write_text("{}"), "tokenizer.json: not a tokenizer file"),
        (_larger_tokenizer, "tokenizer.json: got 11 tokens, the model has 7"),
        (_config(heads=5), "config.json: heads: got 5"),
        (_config(shiny=1), "config.json: config: unknown field 'shiny'"),
        (_config(blocks=2), "missing blocks.1"),
        (_config(shiny=1, version="9.0"), r"unknown field 'shiny'.* \(written by spikedecoder 9.0, this is"),
        (_config(format=2, version="9.0"), r"format 2, takes 1 \(written by spikedecoder 9.0, this is 0"),
    ],
)
def test_damaged_checkpoints(saved, damage, message):
    _, folder = saved
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        SpikeDecoder.from_pretrained(folder)


def test_tensors_that_no_model_runs_with_are_named():
    model = SpikeDecoder(_model().config.replace(norm="power"))
    iters = next(name for name in model.state_dict() if name.endswith(".iters"))
    for name, tensor, said in (
        (iters, torch.zeros((), dtype=torch.complex64), f"{iters} of complex64, takes float16 to float64"),
        ("head.linear.weight", model.head.linear.weight.detach().to_sparse(), "of sparse_coo, takes strided"),
    ):
        with pytest.raises(CheckpointError, match=f"here: weights do not fit the config: .*{said}"):
            ck.load_state(model, {**model.state_dict(), name: tensor}, "here")
    ck.load_state(model, {**model.state_dict(), iters: torch.tensor(3, dtype=torch.int32)}, "here")
    assert model.state_dict()[iters] == 3
    assert model.dtype == torch.float32


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode")
def test_a_folder_whose_name_is_not_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"m\xff")
    model = _model()
    model.save_pretrained(folder)
    loaded = SpikeDecoder.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
    _truncate(folder)
    with pytest.raises(CheckpointError, match="not a safetensors file, or truncated"):
        SpikeDecoder.from_pretrained(folder)


def test_a_hub_that_is_not_there_is_asked_once():
    """A minute's retries, each with a line on the terminal, would else come before the error."""
    code = (
        "from spikedecoder import CheckpointError, SpikeDecoder\n"
        "try:\n    SpikeDecoder.from_pretrained('no/pe', endpoint='http://127.0.0.1:1')\n"
        "except CheckpointError as error:\n    print(error)"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "no/pe: no such folder here, and config.json could not be had from the hub" in done.stdout
    assert "refused" in done.stdout and done.stderr == ""


def test_push_to_hub_says_that_it_reached_nobody(saved, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise RuntimeError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    with pytest.raises(ConnectionError, match=r"me/small: the hub could not be reached \(Name or service"):
        saved[0].push_to_hub("me/small")


def test_a_folder_is_not_written_to(tmp_path):
    (tmp_path / "figure.png").mkdir()
    with pytest.raises(IsADirectoryError, match=r"a folder, takes a file: '.*figure\.png'"):
        ck.write_bytes(tmp_path / "figure.png", b"")
    assert [p.name for p in tmp_path.iterdir()] == ["figure.png"]


@pytest.mark.skipif(os.name != "posix", reason="there is no umask")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_get_the_mode_of_any_new_file(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        ck.write_json(tmp_path / "new" / "a.json", {})
        with atomic_writer(tmp_path / "new" / "b") as file:
            file.write(b"b")
    finally:
        os.umask(before)
    assert {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "new").iterdir()} == {
        "a.json": mode,
        "b": mode,
    }


@pytest.mark.parametrize("fails", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_no_litter(saved, monkeypatch, fails):
    model, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    if fails == "write":
        real = os.fdopen
        monkeypatch.setattr(os, "fdopen", lambda *a: _Full(real(*a)))
    else:
        monkeypatch.setattr(os, fails, full)
    with torch.no_grad():
        model.head.linear.weight.add_(1)
    with pytest.raises(OSError, match=r"cannot write \(No space left on device\): .*json"):
        ck.save_folder(model, folder)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    SpikeDecoder.from_pretrained(folder)


class _Full:
    def __init__(self, file):
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._file.close()

    def write(self, data):
        self._file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")


def test_reading_never_unpickles(saved, monkeypatch):
    _, folder = saved
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("torch.load was called"))
    real = builtins.__import__

    def guarded(name, *args, **kwargs):
        assert name != "pickle" or "spikedecoder" not in (args[0] or {}).get("__name__", "")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", guarded)
    SpikeDecoder.from_pretrained(folder)


def test_names_that_are_no_utf_8_are_kept(tmp_path):
    """Linux takes any bytes as a file's name; a run's settings hold the names of its texts."""
    value = {"texts": ["f\udcfcr.txt", "für.txt"]}
    ck.write_json(tmp_path / "a.json", value)
    assert ck.read_json(tmp_path / "a.json") == value
