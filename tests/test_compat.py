"""The original's names: its scripts run, its windows are the same, its return values too."""

import copy
import inspect
import math
import re
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from spikedecoder import CheckpointError, SpikeDecoder
from spikedecoder.compat import model, trainer, utils
from spikedecoder.compat.convert import original_config
from spikedecoder.compat.trainer import Trainer
from spikedecoder.compat.utils import charDataset
from spikedecoder.generation import generate_text

SENTENCES = (
    "Well, Prince, so Genoa and Lucca are now just family estates! Who said so? The prince -- he alone; "
    "it isn't war.  It was in July, 1805, and the speaker was the well-known Anna.\nShe said it. . . He: "
    "'No.' And so it was, as it was before; the war was not a war (he said)."
)
SMALL = {
    "encodingType": "learned",
    "position_encoding_strategy": "static",
    "tok_embed_dim": 10,
    "pos_embed_dim": 6,
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def book(tmp_path):
    path = tmp_path / "literature" / "a book.txt"
    path.parent.mkdir()
    path.write_text((SENTENCES + "\n") * 6, encoding="utf-8")
    return str(path)


# --- the two scripts, smaller


def run_script(script, book, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = script.replace("PATH", repr(book))
    scope: dict = {}
    exec(inspect.cleandoc(script), scope)
    return types.SimpleNamespace(**scope)


def test_character_script(book, tmp_path, monkeypatch, capsys):
    scope = run_script(
        """
        import torch
        from spikedecoder.compat import model
        from spikedecoder.compat.utils import charDataset
        from spikedecoder.compat.trainer import Trainer
        torch.manual_seed(0)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = model.SDconfig(30, 16, encodingType='learned', position_encoding_strategy='static', tok_embed_dim=50, heads=5, blocks=2, timesteps=4, device=device)
        decoder = model.SpikingDecoderModel(config, dim_hid=2)
        train_dataset = charDataset(PATH, 'train', inputLength=16, fullLength=350, seed=7070)
        test_dataset = charDataset(PATH, 'test', inputLength=16, fullLength=350, seed=7070)
        trainer = Trainer(config, decoder, lr=0.01, train_dataset=train_dataset, test_dataset=test_dataset, batch_size=32, checkPointRate=3, epochs=4, save_model=True, num_workers=8)
        trainer.train()
        """,  # noqa: E501
        book,
        tmp_path,
        monkeypatch,
    )
    lines = capsys.readouterr().out.splitlines()
    losses = [
        re.fullmatch(r"epoch +(\d+) \| train loss ([\d.]+) \| val loss ([\d.]+).*", line) for line in lines
    ]
    losses = [(int(m[1]), float(m[2]), float(m[3])) for m in losses if m]
    assert [epoch for epoch, _, _ in losses] == [0, 1, 2, 3, 4]
    assert losses[0][1] > 3 and losses[-1][1] < 2.9  # ln 30 = 3.4 nats; it learns
    assert scope.decoder.training

    # saved after epoch 3 and at the end, readable by the rest of the package
    folders = sorted((tmp_path / "checkpoints" / "a book").iterdir())
    assert [f.name.split("_DS")[0] for f in folders] == ["checkpoint_epoch-3B32", "checkpoint_epoch-4B32"]
    loaded = SpikeDecoder.from_pretrained(folders[-1])
    text = scope.decoder.generate("the prince")
    assert text == generate_text(loaded, None, ["the prince"], max_new_tokens=7, temperature=0, keep=16)[0]
    assert text.startswith("the prince") and len(text) == 17
    again = utils.load_model_from_checkpoint(
        model.SpikingDecoderModel, path_to_checkpoint=str(folders[-1]), config=scope.config, dim_hid=2
    )
    assert again.generate("the prince") == text


def test_word_script(book, tmp_path, monkeypatch, capsys):
    with pytest.warns(
        UserWarning, match="test_dataset: windows of 24 tokens are cut to the model's max_len, 12"
    ):
        scope = run_script(
            """
            import torch
            from spikedecoder.compat import model
            from spikedecoder.compat.utils import wordDataset, Reader
            from spikedecoder.compat.trainer import Trainer
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            reader = Reader()
            config = model.SDconfig(30, 12, encodingType='learned', position_encoding_strategy='static', tok_embed_dim=90, heads=5, blocks=2, timesteps=4, device=device, dictionary=reader.createDictionary(PATH, prune_level=6))
            decoder = model.SpikingDecoderModel(config, dim_hid=2)
            train_dataset = wordDataset(PATH, 'train', inputLength=12, fullLength=0, seed=7070, reader=reader)
            test_dataset = wordDataset(PATH, 'test', inputLength=24,  fullLength=0, seed=7070, reader=reader)
            trainer = Trainer(config, decoder, lr=0.003, train_dataset=train_dataset, test_dataset=test_dataset, batch_size=32, checkPointRate=3, epochs=1, save_model=True, num_workers=8)
            trainer.train()
            """,  # noqa: E501
            book,
            tmp_path,
            monkeypatch,
        )
    assert "epoch     1 | train loss" in capsys.readouterr().out
    assert scope.config.vocab_size == len(scope.reader.dictionary) == scope.train_dataset.get_vocab_size()
    (folder,) = (tmp_path / "checkpoints" / "a book").iterdir()
    loaded = SpikeDecoder.from_pretrained(folder)
    assert loaded.tokenizer.tokens == scope.reader.dictionary
    text = scope.decoder.generate("The prince said", iterations=2)
    assert text.startswith("the prince said ") and len(text.split()) == 13 + 12
    assert generate_text(loaded, None, ["The prince"], max_new_tokens=3, seed=0)[0].startswith("the prince")


# --- shims


CONFIGS = [
    (model.SpikingDecoderModel, model.SDconfig, {**SMALL, "heads": 2, "blocks": 2}, (3, 2, 8, 8)),
    (
        model.PartiallySpikingDecoderModel,
        model.PSDconfig,
        {**SMALL, "spike_degree": 3, "heads": 4},
        (3, 4, 8, 4),
    ),
    (
        model.PartiallySpikingDecoderModel,
        model.PSDconfig,
        {**SMALL, "spike_degree": 1, "heads": 4},
        (3, 4, 8, 4),
    ),
    (model.NonSpikingDecoderModel, model.NSDconfig, {"embed_dim": 12, "heads": 3}, (3, 3, 8, 4)),
]


@pytest.mark.parametrize("cls, config_cls, options, shape", CONFIGS)
@pytest.mark.parametrize("words", [False, True])
def test_shim_equals_the_decoder(cls, config_cls, options, shape, words):
    torch.manual_seed(0)
    dictionary = [".", "P", "cat", "mat", "the"] if words else None
    config = config_cls(30, 8, dictionary=dictionary, **options)
    shim = cls(config, dim_hid=3)
    with torch.no_grad():
        for parameter in shim.decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    if words:
        x = [["the", "cat"] * 4, ["mat", "."] * 4, ["the", "mat", "."]]
        y = [["cat", "the"] * 4, [".", "mat"] * 4, ["mat", ".", "the"]]
    else:
        x, y = ["the cat ", "it's me.", "abc"], ["he cat s", "t's me. ", "bcd"]
    alphabet = dictionary or "abcdefghijklmnopqrstuvwxyz.'P "
    ids = [[alphabet.index(c) for c in row] + [alphabet.index("P")] * (8 - len(row)) for row in x]
    targets = [[alphabet.index(c) for c in row] + [-100] * (8 - len(row)) for row in y]

    direct = SpikeDecoder(
        original_config(config.kind, {"vocab_size": 30, "max_len": 8, "dictionary": dictionary, **options}, 3)
    )
    direct.load_state_dict(shim.decoder.state_dict())
    expected = direct(torch.tensor(ids))
    preds, attention, loss = shim(x, y)
    assert torch.equal(preds, expected)
    assert loss.item() == pytest.approx(
        F.cross_entropy(expected.flatten(0, 1), torch.tensor(targets).flatten()).item()
    )
    in_16_bits = copy.deepcopy(shim).bfloat16()
    assert in_16_bits(x, y)[2].dtype == torch.float32  # else a sum over many tokens would stop growing
    spikes = config.kind == "spiking" or config.options.get("spike_degree", 0) > 1
    assert attention.shape == ((config.timesteps, *shape) if spikes else shape)
    assert not spikes or set(attention.unique().tolist()) == {0.0, 1.0}

    # one sequence without a list around it; ids instead of text; no targets
    assert torch.allclose(shim(x[0])[0][0], expected[0], atol=1e-6) and shim(x[0])[2] is None
    assert torch.equal(shim(torch.tensor(ids), torch.tensor(targets), raw=False)[0], expected)
    assert shim(np.array(x[:2]) if not words else [np.array(r) for r in x[:2]], y[:2])[2].isfinite()


def test_attention_is_the_last_blocks_v():
    torch.manual_seed(0)
    shim = model.SpikingDecoderModel(
        model.SDconfig(30, 8, **SMALL, heads=2, blocks=2, timesteps=3), dim_hid=2
    )
    seen = []
    shim.decoder.blocks[1].attention.v.register_forward_hook(lambda m, a, out: seen.append(out))
    attention = shim("the cat ")[1]
    for head in (0, 1):
        assert torch.equal(attention[:, :, head], seen[0][..., head * 8 : head * 8 + 8])
    assert len(shim.decoder.blocks[1].attention.v._forward_hooks) == 1  # the shim's own is gone


def test_configs_take_the_originals_arguments_in_its_order():
    config = model.SDconfig(
        30, 256, "learned", "static", 50, 30, 0.1, 0.2, 5, 12, 1, False, 4, torch.device("cpu"), 0.25
    )
    ours = config.decoder_config(16)
    assert (ours.embed_dim, ours.heads, ours.blocks, ours.timesteps) == (80, 5, 12, 4)
    assert (ours.attention_dropout, ours.mlp_dropout, ours.spiking_residuals) == (0.1, 0.2, 1)
    assert (ours.attention_scale, ours.head_spikes, ours.hidden_dim) == (0.25, False, 80 * 16)
    assert (config.num_heads, config.num_blocks, config.embed_dim, config.timesteps) == (5, 12, 80, 4)
    assert "heads=5" in str(config)
    config = model.PSDconfig(
        30, 16, 2, 20, 12, 0.0, 0.0, 4, 3, torch.device("cpu"), "learned", "static", track_frequency=True
    )
    assert config.decoder_config().spike_degree == 2 and not config.decoder_config().head_spikes
    config = model.NSDconfig(30, 16, 12, 0.1, 3, 2, learned_embedding=True)
    assert config.decoder_config().position_encoding == "learned" and config.embed_dim == 12
    shim = model.NonSpikingDecoderModel(config, dim_hid=2, dropout=0.3)
    assert (shim.decoder.config.mlp_dropout, shim.decoder.config.attention_dropout) == (0.3, 0.1)
    assert model.SpikingDecoderModel(vocab_size=30, max_len=8, heads=2).config.max_len == 8


def test_optimizer_groups():
    shim = model.SpikingDecoderModel(model.SDconfig(30, 8, **SMALL, learning_MSLIF=True), dim_hid=2)
    optimizer = shim.configure_optimizer(weight_decay=0.1, learning_rate=0.002, betas=(0.9, 0.95))
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"], decayed["lr"], decayed["betas"]) == (
        0.1,
        0,
        0.002,
        (0.9, 0.95),
    )
    names = {id(p): n for n, p in shim.named_parameters()}
    linear = {names[id(p)] for p in decayed["params"]}
    assert all("linear.weight" in n or n.endswith("v_threshold") for n in linear) and len(linear) > 10
    assert len(decayed["params"]) + len(others["params"]) == len(names)


def test_generate_follows_the_original():
    """Greedy from the last max_len tokens, window sliding by one; see the docstring for what comes back."""
    torch.manual_seed(3)
    config = model.SDconfig(30, 8, **SMALL, heads=2, timesteps=4, learning_MSLIF=True)
    shim = model.SpikingDecoderModel(config, dim_hid=2).eval()
    with torch.no_grad():
        for name, parameter in shim.decoder.named_parameters():
            if name.startswith("embedding."):
                parameter.normal_()
            elif name.endswith("v_threshold"):  # an input of 1 never reaches 1, and the embedding is 0 or 1
                parameter.fill_(0.4)
            elif name.endswith(("proj.norm.weight", "fc2.norm.weight")):
                parameter.fill_(3.0)
        shim.decoder.head.linear.weight.normal_()

    def by_hand(text, n):
        for _ in range(n):
            window = text[-8:]
            text += shim.embedder.alphabet[int(shim(window)[0][0, len(window) - 1].argmax())]
        return text

    assert shim.generate("the") == by_hand("the", 6)
    assert shim.generate("the", iterations=3) == by_hand("the", 6 + 16)
    long = "the cat sat"
    assert shim.generate(long) == by_hand(long, 8)[len(long) :]
    assert len(set(by_hand("the", 22)[3:])) > 2  # else the test would see nothing
    for bad, why in ((3, "takes a string"), (["a"], "takes a string")):
        with pytest.raises(TypeError, match=why):
            shim.generate(bad)
    with pytest.raises(ValueError, match="iterations: got 0"):
        shim.generate("a", iterations=0)


def test_bad_input_of_shims():
    shim = model.SpikingDecoderModel(model.SDconfig(30, 8, **SMALL), dim_hid=2)
    for x, error, why in (
        ("Hello", ValueError, "x: characters outside the alphabet: 'H'"),
        (["abc", "dé1"], ValueError, "'é', '1'"),
        ("abcdefghi", ValueError, "got a sequence of 9 tokens, takes 1 to max_len = 8"),
        ([], ValueError, "empty list"),
        ("", ValueError, "sequence of 0 tokens"),
        ([["a", "b"]], TypeError, "takes a string"),
    ):
        with pytest.raises(error, match=why):
            shim(x)
    with pytest.raises(ValueError, match="targets: got shape"):
        shim(["abc"], ["abc", "bcd"])
    with pytest.raises(TypeError, match="where raw=False"):
        shim("abc", raw=False)
    words = model.SpikingDecoderModel(model.SDconfig(30, 8, **SMALL, dictionary=[".", "P", "a"]), dim_hid=2)
    with pytest.raises(ValueError, match="words outside the alphabet: 'dog'"):
        words(["a", "dog"])
    with pytest.raises(TypeError, match="takes lists of words"):
        words("a dog")
    with pytest.raises(ValueError, match="without the padding token"):
        model.SpikingDecoderModel(model.SDconfig(30, 8, **SMALL, dictionary=["a", "b"]))
    with pytest.raises(ValueError, match="SDconfig: unknown option 'head'; did you mean heads"):
        model.SDconfig(30, 8, head=2)
    with pytest.raises(TypeError, match="got vocab_size twice"):
        model.SDconfig(30, 8, vocab_size=30)
    with pytest.raises(ValueError, match="max_len: missing"):
        model.SDconfig(30)
    with pytest.raises(ValueError, match="heads: got 7, takes a divisor"):
        model.SDconfig(30, 8, heads=7)
    with pytest.raises(ValueError, match="vocab_size: got 20"):
        model.SpikingDecoderModel(model.SDconfig(20, 8, **SMALL))
    with pytest.raises(TypeError, match="config: got PSDconfig, takes SDconfig"):
        model.SpikingDecoderModel(model.PSDconfig(30, 8))
    assert model.SpikingDecoderModel(model.SDconfig(32, 8, **SMALL)).embedder.alphabet[28:31] == "SEP"[0:3]


# --- checkpoints and the trainer


def test_checkpoints_round_trip(tmp_path):
    config = model.SDconfig(30, 8, **SMALL)
    shim = model.SpikingDecoderModel(config, dim_hid=2)
    first = utils.save_model_to_checkpoint(shim, 4, 100, tmp_path, epoch=7)
    second = utils.save_model_to_checkpoint(shim, 4, 100, tmp_path, epoch=7)  # within the same second
    assert first != second and first.name.startswith("checkpoint_epoch-7B4_DS100_")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in second.iterdir()}
    loaded = utils.load_model_from_checkpoint(model.SpikingDecoderModel, first, config=config, dim_hid=2)
    for name, tensor in shim.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    with pytest.raises(CheckpointError, match=r"timesteps is 2 there, 3 in the given config"):
        other = model.SDconfig(30, 8, **SMALL, timesteps=3)
        utils.load_model_from_checkpoint(model.SpikingDecoderModel, first, config=other, dim_hid=2)
    with pytest.raises(CheckpointError, match="neither a folder with config"):
        utils.load_model_from_checkpoint(model.SpikingDecoderModel, tmp_path / "no", config=config)


def test_the_originals_checkpoint_loads(tmp_path, request):
    """By path or by the path without its ending, as the original's function took it."""
    import json

    golden = request.path.parent / "golden" / "char_learned_static"
    case = json.loads(golden.with_suffix(".json").read_text())
    tensors = load_file(golden.with_suffix(".safetensors"))
    state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
    torch.save(state, tmp_path / "checkpoint_epoch-1state_dict.pt")
    config = model.SDconfig(**case["config"])
    for name in ("checkpoint_epoch-1", "checkpoint_epoch-1state_dict.pt"):
        shim = utils.load_model_from_checkpoint(
            model.SpikingDecoderModel, str(tmp_path / name), config=config, dim_hid=case["dim_hid"]
        )
        shim = shim.double()
        shim.decoder.load_state_dict(shim.decoder.state_dict())
        preds, _, loss = shim.train()(case["inputs"], case["targets"])
        assert torch.allclose(preds, tensors["out.train_logits"], atol=1e-5)
        assert loss.item() == pytest.approx(tensors["out.train_loss"].item(), abs=1e-6)


def small_trainer(book, **changes):
    torch.manual_seed(0)
    config = model.PSDconfig(30, 8, spike_degree=4, **SMALL)
    shim = model.PartiallySpikingDecoderModel(config, dim_hid=2)
    train, test = (charDataset(book, split, 8, 100) for split in ("train", "test"))
    options = {"epochs": 1, "batch_size": 20, "checkPointRate": 10, "lr": 0.001, **changes}
    return Trainer(config, shim, train_dataset=train, test_dataset=test, **options)


def test_training_follows_the_recipe(book, tmp_path, monkeypatch, capsys):
    """Two epochs by hand, from the recipe as documented, end in the same weights."""
    monkeypatch.chdir(tmp_path)
    run = small_trainer(book, epochs=2, save_model=False)
    twin = small_trainer(book).model
    run.train()
    torch.manual_seed(0)
    small_trainer(book)  # as many draws as before `train`
    optimizer = torch.optim.AdamW(twin.decoder.parameter_groups(0.1), lr=0.001, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200, eta_min=5e-5)
    data = run.train_dataset
    torch.randperm(len(data)), torch.randperm(len(run.test_dataset))
    twin.train()
    for _ in range(2):
        for rows in torch.randperm(len(data)).split(20):
            loss = twin([data[i][0] for i in rows.tolist()], [data[i][1] for i in rows.tolist()])[2]
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            optimizer.step()
        schedule.step()
        torch.randperm(len(data)), torch.randperm(len(run.test_dataset))
    for (name, one), other in zip(run.model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("before", [0, 5])
def test_a_continued_run_anneals_from_lr_as_the_originals_does(before, book, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, rates = small_trainer(book, epochs=2, prevEpochs=before, save_model=False), []
    real = run._epoch

    def epoch(number, optimizer, *more):
        rates.append(optimizer.param_groups[0]["lr"])
        return real(number, optimizer, *more)

    monkeypatch.setattr(run, "_epoch", epoch)
    run.train()
    annealed = 5e-5 + (0.001 - 5e-5) * (1 + math.cos(math.pi / 200)) / 2
    assert rates == pytest.approx([0.001, annealed])


def test_trainer_files(book, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = small_trainer(book, prevEpochs=5, save_dataset=True, documentation=True, profiling=True)
    run.train()
    folder = tmp_path / "checkpoints" / "spike_degree_4" / "a book"
    assert any(f.name.startswith("checkpoint_epoch-6B20_DS90_") for f in folder.iterdir())
    assert (folder / "dataset_train.txt").read_text().splitlines() == list(run.train_dataset.fdata)
    assert list((tmp_path / "runs").rglob("events*"))
    out = capsys.readouterr().out
    assert "epoch     5 |" in out and "epoch     6 |" in out and "Self CPU" in out


def test_trainer_says_what_is_wrong(book, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for changes, why in (
        ({"epochs": -1}, "epochs: got -1"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"lr": 0.0}, "lr: got 0.0"),
        ({"checkPointRate": 0}, "checkPointRate: got 0"),
    ):
        with pytest.raises(ValueError, match=why):
            small_trainer(book, **changes)
    run = small_trainer(book)
    with pytest.raises(TypeError, match="model: got SpikeDecoder"):
        Trainer(run.config, run.model.decoder, run.train_dataset, run.test_dataset, epochs=1)
    with pytest.raises(ValueError, match="config: got another one"):
        Trainer(model.PSDconfig(30, 8), run.model, run.train_dataset, run.test_dataset, epochs=1)
    with torch.no_grad():
        run.model.decoder.head.linear.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="epoch 1: the loss became nan; try a smaller lr"):
        run.train()
    assert trainer.Trainer is Trainer
