"""Generation of ids: batches, windows, streaming, what lies past the context."""

import functools
import math
import statistics
import time

import numpy as np
import pytest
import torch

from spikedecoder import SpikeDecoder, SpikeDecoderConfig
from spikedecoder.data import CharTokenizer
from spikedecoder.generation import (
    Batch,
    Continuation,
    SamplingParams,
    Window,
    generate,
    open_source,
    start_token,
    stream,
    suppressed_ids,
)
from spikedecoder.generation.recurrent import Recurrent
from spikedecoder.generation.window import PAST

TEXT = "the cat sat on the mat. it was a fat cat, and that was that."
SMALL = {
    "vocab_size": 30,
    "max_len": 12,
    "token_dim": 10,
    "position_dim": 6,
    "heads": 2,
    "blocks": 2,
    "timesteps": 2,
}


def make(**changes):
    """A small model whose logits differ enough between tokens and places for a test to see."""
    torch.manual_seed(0)
    model = SpikeDecoder(SpikeDecoderConfig(**{**SMALL, "embedding_gain": 2.0, **changes})).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("embedding."):
                parameter.normal_()
            elif parameter.dim() == 1:
                parameter.add_(torch.rand_like(parameter))
        model.head.linear.weight.mul_(8)
    return model.eval()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return make()


def by_hand(model, prompt, n, keep, suppress=()):
    """Greedy, one token at a time, with the documented window."""
    ids = list(prompt)
    window = list(prompt)
    for _ in range(n):
        if len(window) > model.config.max_len:
            window = window[-keep:]
        logits = model(torch.tensor([window]))[0, -1].detach()
        logits[list(suppress)] = -math.inf
        ids.append(int(logits.argmax()))
        window.append(ids[-1])
    return ids[len(prompt) :]


@pytest.mark.parametrize("length, keep", [(1, None), (3, 1), (12, None), (13, 12), (40, None), (40, 5)])
def test_greedy_is_the_argmax_of_the_forward_past_the_context_too(model, length, keep):
    prompt = torch.randint(0, 30, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    result = generate(model, [prompt], 30, SamplingParams(temperature=0), keep=keep)
    assert result.tokens[0] == by_hand(model, prompt, 30, keep or 6)
    assert len(set(result.tokens[0])) > 1  # else the test would see nothing
    assert result.finish == ["length"] and result.sequences == [prompt + result.tokens[0]]


VARIANTS = [
    {"token_shift": 3, "mlp_token_shift": 2},
    {"position_encoding": "learned"},
    {"position_encoding": "linear", "heads": 2, "token_dim": 8},
    {"token_encoding": "one-hot", "max_len": 10, "vocab_size": 8},
    {"norm": "batch", "spiking_residuals": 2},
    {"norm": "power", "spiking_residuals": 1, "reunite": "concatenate"},
    {"spike_degree": 0},
    {"spike_degree": 2, "position_encoding": "binary", "token_encoding": "binary", "heads": 1},
]


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unequal_prompts_give_what_they_give_alone(changes, temperature):
    model = make(**changes)
    torch.manual_seed(1)
    prompts = [torch.randint(0, model.config.vocab_size, (n,)).tolist() for n in (4, 1, 0, 23, 9)]
    together = generate(model, prompts, 20, SamplingParams(temperature, seed=7), top=2)
    for i, prompt in enumerate(prompts):
        alone = generate(model, [prompt], 20, SamplingParams(temperature, seed=7 + i), top=2)
        assert alone.tokens[0] == together.tokens[i]
        for one, other in zip(alone.predictions[0], together.predictions[i], strict=True):
            assert [p.token for p in one] == [p.token for p in other]
            assert [p.probability for p in one] == pytest.approx([p.probability for p in other])


def test_seed_repeats_and_none_is_fresh_but_known(model):
    first = generate(model, [[1, 2]], 20, SamplingParams(seed=4)).tokens
    assert generate(model, [[1, 2]], 20, SamplingParams(seed=4)).tokens == first
    assert generate(model, [[1, 2]], 20, SamplingParams(seed=5)).tokens != first
    state = torch.random.get_rng_state()
    fresh = generate(model, [[1, 2]], 20)
    assert torch.equal(torch.random.get_rng_state(), state)  # a training run is not disturbed
    assert generate(model, [[1, 2]], 20, SamplingParams(seed=fresh.seed)).tokens == fresh.tokens


def test_equal_prompts_in_a_batch_differ(model):
    a, b = generate(model, [[3], [3]], 20, SamplingParams(seed=0)).tokens
    assert a != b


def test_predictions_are_the_models_probabilities(model):
    result = generate(model, [[5, 6, 7]], 3, SamplingParams(temperature=0), top=4)
    ids = [5, 6, 7]
    for token, best in zip(result.tokens[0], result.predictions[0], strict=True):
        p, i = model(torch.tensor([ids]))[0, -1].softmax(-1).topk(4)
        assert [b.token for b in best] == i.tolist()
        assert [b.probability for b in best] == pytest.approx(p.tolist())
        assert best[0].token == token
        ids.append(token)


def test_repetition_penalty_covers_prompt_and_text_however_long_ago(model):
    """By hand, past the context, for a batch whose sequences are penalised each for its own tokens."""
    prompts = [[1, 2, 3], [7] * 14, []]
    sampling = SamplingParams(0, repetition_penalty=1.7)
    result = generate(model, prompts, 30, sampling)
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        window, seen, expected = prompt or [0], set(prompt or [0]), []
        for _ in range(30):
            window = window[-6:] if len(window) > 12 else window
            logits = model(torch.tensor([window]))[0, -1].detach()
            for token in seen:
                logits[token] = logits[token] / 1.7 if logits[token] > 0 else logits[token] * 1.7
            expected.append(int(logits.argmax()))
            seen.add(expected[-1])
            window = [*window, expected[-1]]
        assert tokens == expected
    assert result.tokens != generate(model, prompts, 30, SamplingParams(0)).tokens


def test_sequences_join_and_leave_a_batch(model):
    """Different parameters side by side; each gets what it gets alone."""
    params = [SamplingParams(seed=3), SamplingParams(0), SamplingParams(0.7, 5, min_p=0.1, seed=9)]
    params += [SamplingParams(repetition_penalty=1.5, seed=1), SamplingParams(seed=4)]
    lengths, prompts = [30, 9, 14, 20, 1], [[1], [2, 3], [4] * 20, [5], [6]]
    batch, got = Batch(open_source(model)), {i: [] for i in range(5)}
    removed = Continuation(9, [8], 50, SamplingParams(), 0)
    for step in range(60):
        if step % 3 == 0 and step < 15:
            i = step // 3
            batch.add([Continuation(i, prompts[i], lengths[i], params[i], params[i].seed or 0)])
        if step == 4:
            batch.add([removed])
        if step == 7:
            batch.remove([9, 1000])
        for new in batch.step():
            got.setdefault(new.sequence, []).append(new.token)
    assert len(batch) == 0 and len(got.pop(9)) == 3
    for i in range(5):
        assert got[i] == generate(model, [prompts[i]], lengths[i], params[i]).tokens[0]


def test_stop_ends_each_sequence_by_itself(model):
    prompts = [[1, 2, 3], [4], [5, 6], [9, 9]]
    free = generate(model, prompts, 30, SamplingParams(temperature=0)).tokens
    stop = free[0][3]
    stopped = generate(model, prompts, 30, SamplingParams(temperature=0), stop=stop)
    for whole, cut, finish in zip(free, stopped.tokens, stopped.finish, strict=True):
        at = whole.index(stop) + 1 if stop in whole else 30
        assert cut == whole[:at]
        assert finish == ("stop" if stop in whole else "length")
    assert len(stopped.tokens[0]) <= 4 and len({len(t) for t in stopped.tokens}) > 1


def test_stream_is_generate_as_it_comes(model):
    calls = []
    handle = model.head.register_forward_hook(lambda *_: calls.append(1))
    events = stream(model, [[1], [2, 3]], 5, SamplingParams(seed=1), top=1)
    assert not calls
    next(events)
    assert len(calls) == 2  # the two prompts are read; the second token is not computed yet
    events.close()
    handle.remove()

    result = generate(model, [[1], [2, 3]], 5, SamplingParams(seed=1), top=1)
    events = list(stream(model, [[1], [2, 3]], 5, SamplingParams(seed=1), top=1))
    assert [e.sequence for e in events] == [0, 1] * 5
    assert [[e.token for e in events if e.sequence == i] for i in (0, 1)] == result.tokens
    assert [e.finish for e in events] == [None] * 8 + ["length"] * 2


def test_pad_and_unknown_are_never_generated():
    model = make(pad_id=28)
    with torch.no_grad():
        model.head.linear.bias[[28, 5]] = 100.0
    result = generate(model, [[1]], 10, SamplingParams(seed=0), top=3)
    assert set(result.tokens[0]) == {5}
    assert all(p.token != 28 for at in result.predictions[0] for p in at)
    assert 28 in generate(model, [[1]], 30, SamplingParams(seed=0), suppress=()).tokens[0]
    tokenizer = CharTokenizer.from_text(TEXT)
    assert suppressed_ids(model, tokenizer) == [0, 1, *range(tokenizer.vocab_size, 30)]


def test_empty_prompt_starts_from_pad_or_token_0(model):
    assert start_token(model) == 0
    assert start_token(make(pad_id=28)) == 28
    greedy = SamplingParams(temperature=0)
    assert generate(model, [[]], 5, greedy).tokens == generate(model, [[0]], 5, greedy).tokens
    assert model.generate(torch.zeros(2, 0, dtype=torch.int64), 3, seed=0).shape == (2, 3)


def test_model_generate(model):
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = model.generate(tokens, 17, top_k=5, top_p=0.9, seed=2)
    result = generate(model, tokens, 17, SamplingParams(1.0, 5, 0.9, 2))
    assert out.dtype == torch.int64 and out.tolist() == result.sequences
    assert model.generate(tokens, 0).tolist() == tokens.tolist()
    greedy = model.generate(tokens, 30, temperature=0)[:, 3:]
    stop = next(t for t in greedy[0].tolist() if greedy[1].tolist()[0] != t)
    out = model.generate(tokens, 30, temperature=0, stop=[stop])
    end = greedy[0].tolist().index(stop)
    assert out[0, 3 + end :].unique().tolist() == [stop]


def test_mode_is_kept_and_dropout_is_off():
    model = make(mlp_dropout=0.5, attention_dropout=0.5, norm="batch")
    expected = generate(model, [[1, 2]], 10, SamplingParams(temperature=0)).tokens
    model.train()
    model.blocks[0].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert generate(model, [[1, 2]], 10, SamplingParams(temperature=0)).tokens == expected
    assert model.training and model.blocks[1].training and not model.blocks[0].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "options", [{}, {"spike_degree": 0}, {"token_shift": 3, "position_encoding": "learned"}], ids=str
)
def test_recurrent_source_equals_the_window(options):
    model = make(**options).double()
    generator = torch.Generator().manual_seed(0)
    window, recurrent = Window(model, keep=3), Recurrent(model, keep=3)
    prompts = [[1, 2], [3], [4] * (model.config.max_len + 2), [5] * (model.config.max_len - 1)]
    torch.testing.assert_close(recurrent.add(prompts), window.add(prompts))
    for i in range(model.config.max_len + 4):
        tokens = torch.randint(0, 30, (len(recurrent.windows),), generator=generator).tolist()
        torch.testing.assert_close(recurrent.step(tokens), window.step(tokens))
        assert recurrent.windows == window.windows
        if i == 5:
            for source in (window, recurrent):
                source.select([3, 0])


def test_continue_is_the_forward_over_everything():
    """No cut, no window: positions go on."""
    model = make(token_shift=3)
    prompts = [[1, 2], [4] * 40, [1, 2]]
    window, recurrent = Window(model, past="continue"), Recurrent(model, past="continue")
    torch.testing.assert_close(recurrent.add(prompts[:2]), window.add(prompts[:2]))
    torch.testing.assert_close(recurrent.add(prompts[2:]), window.add(prompts[2:]))
    generator = torch.Generator().manual_seed(0)
    for i in range(20):
        tokens = torch.randint(0, 30, (len(recurrent.windows),), generator=generator).tolist()
        torch.testing.assert_close(recurrent.step(tokens), window.step(tokens))
        assert not any(recurrent.windows)  # it remembers no token
        if i == 5:
            for source in (window, recurrent):
                source.select([2, 1])
    slid, on = (generate(model, [[1]], 40, SamplingParams(0), past=past).tokens[0] for past in PAST)
    assert slid[:12] == on[:12] and slid != on


def test_prompts_longer_than_a_part_are_read_in_parts():
    model = make(max_len=4)
    source, prompt = Recurrent(model, past="continue"), [i % 30 for i in range(600)]
    parts = []
    prefill = model.prefill
    model.prefill = lambda tokens, state: (parts.append(tokens.shape[1]), prefill(tokens, state))[1]
    logits = source.add([prompt, [3], prompt])
    assert parts == [256, 256, 88, 1]  # the same prompt is read once
    torch.testing.assert_close(logits[0], model(torch.tensor([prompt]))[0, -1].detach())
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize(
    "changes",
    [
        {"position_encoding": "learned"},
        {"position_encoding": "linear"},
        {"position_encoding": "binary"},
        {"token_encoding": "one-hot", "max_len": 10, "vocab_size": 8},
        {"spike_degree": 0},
        {"spike_degree": 1},
    ],
    ids=str,
)
def test_who_cannot_continue_slides(changes):
    model = make(**changes)
    with pytest.raises(ValueError, match="past: got 'continue', takes 'slide' with this model"):
        generate(model, [[1]], 3, past="continue")
    assert len(generate(model, [[1]], 40, SamplingParams(0)).tokens[0]) == 40


def test_a_token_costs_the_same_after_1_000_and_after_10_000():
    """State, resident memory and time; bench_generate.py walks on to 100 000."""
    psutil = pytest.importorskip("psutil", reason="needs psutil to read resident memory")
    model = make(blocks=1, heads=1, token_dim=4, position_dim=4, timesteps=1, max_len=64).float()
    source, process, at = Recurrent(model, past="continue"), psutil.Process(), {}
    source.add([[1] * 256])
    tokens = torch.randint(0, 30, (1, 256), generator=torch.Generator().manual_seed(0))
    for length in (1000, 10_000):
        while source.state.longest < length:
            _, source.state = model.prefill(tokens, source.state)
        for i in range(50):
            source.step([i % 30])
        at[length] = source.state, process.memory_info().rss
    times = {length: [] for length in at}
    for i in range(150):  # in turns, so that both meet the machine in every mood
        for length, (state, _) in at.items():
            source.state = state
            begin = time.perf_counter()
            source.step([i % 30])
            times[length].append(time.perf_counter() - begin)
    assert at[1000][0].nbytes == at[10_000][0].nbytes == 4 * 8 * 8 + 8
    assert at[10_000][1] - at[1000][1] < 2**20
    assert statistics.median(times[10_000]) < 2 * statistics.median(times[1000])


def test_sliding_remembers_at_most_a_context():
    model = make(blocks=1, heads=1, token_dim=4, position_dim=4, timesteps=1)
    source = Recurrent(model)
    batch = Batch(source)
    batch.add([Continuation(0, [1], 10**9, SamplingParams(), 0)])
    sizes, lengths = set(), []
    for _ in range(300):
        batch.step()
        sizes.add(source.state.nbytes)
        lengths.append(len(source.windows[0]))
    assert len(sizes) == 1 and max(lengths) == 12 and min(lengths[12:]) == 6


def test_window_as_logit_source(model):
    source = Window(model)
    first = source.add([[1, 2], [3]])
    assert torch.allclose(first[1], model(torch.tensor([[3]]))[0, -1])
    source.select([1])
    assert torch.allclose(source.step([4])[0], model(torch.tensor([[3, 4]]))[0, -1])
    assert not first.requires_grad


def test_what_wraps_a_model_is_no_model(model):
    average = torch.optim.swa_utils.AveragedModel(model)
    with pytest.raises(
        TypeError, match=r"model: got AveragedModel, takes a SpikeDecoder \(its .module is one\)"
    ):
        generate(average, [[1]], 2)
    compiled = torch.compile(model, backend="eager")
    greedy = SamplingParams(temperature=0)
    assert generate(compiled, [[1]], 20, greedy).tokens == generate(model, [[1]], 20, greedy).tokens


@pytest.mark.parametrize(
    "arguments, error, why",
    [
        (([[1]], -1), ValueError, "max_new_tokens: got -1"),
        (([[1]], 2.0), ValueError, "max_new_tokens"),
        (([], 3), ValueError, "prompts: got none"),
        (([[1, 30]], 3), ValueError, r"prompts\[0\]: got token 30, takes 0 to 29"),
        (([[1], [-1]], 3), ValueError, r"prompts\[1\]"),
        (([[1.5]], 3), TypeError, "takes integers"),
        ((None, 3), TypeError, "prompts: got NoneType, takes lists of token ids"),
        ((3, 3), TypeError, "prompts: got int, takes lists"),
        (([1.5], 3), TypeError, "prompts: got float, takes lists"),
        (("abc", 3), TypeError, "generate_text"),
        ((["abc"], 3), TypeError, "generate_text"),
        (([1, 2], 3), TypeError, "one list per prompt"),
        ((torch.zeros(1, 3), 3), TypeError, "prompts: got a tensor of torch.float32"),
        (([[1]], 3, {"temperature": 1}), TypeError, "sampling: got dict"),
    ],
)
def test_bad_arguments(model, arguments, error, why):
    for function in (generate, stream):
        with pytest.raises(error, match=why):
            function(model, *arguments)


@pytest.mark.parametrize(
    "options, why",
    [
        ({"stop": 30}, "stop: got token 30"),
        ({"suppress": [99]}, "suppress: got token 99"),
        ({"suppress": range(30)}, "none would be left"),
        ({"keep": 0}, "keep: got 0"),
        ({"keep": 13}, "takes an integer from 1 to max_len = 12"),
        ({"top": -1}, "top: got -1"),
        ({"past": "forget"}, "past: got 'forget', takes one of slide, continue"),
        ({"past": "continue", "keep": 3}, "keep: got 3, takes None where past is 'continue'"),
    ],
)
def test_bad_options(model, options, why):
    with pytest.raises(ValueError, match=why):
        generate(model, [[1]], 3, **options)
    with pytest.raises(TypeError, match="unknown argument 'stpo'"):
        stream(model, [[1]], 3, stpo=1)


@pytest.mark.parametrize("name", ["stop", "suppress"])
@pytest.mark.parametrize("value", [1.5, [1.5], "a", True, torch.tensor(1.5)], ids=repr)
def test_ids_of_another_kind(model, name, value):
    with pytest.raises(TypeError, match=f"{name}: got .*, takes integers"):
        generate(model, [[1]], 3, **{name: value})


def test_ids_of_tensors_and_arrays(model):
    ids = list(range(1, 29))
    for given in (ids, tuple(ids), torch.tensor(ids), np.array(ids)):
        result = generate(model, [[1]], 9, SamplingParams(seed=0), suppress=given, stop=torch.tensor([29]))
        assert set(result.tokens[0]) <= {0, 29} and result.tokens[0].count(29) <= 1
    with pytest.raises(TypeError, match="suppress: got int, takes integers"):
        generate(model, [[1]], 3, suppress=3)


def test_integers_of_numpy_and_tensors(model):
    draw = functools.partial(generate, model, [[1]], sampling=SamplingParams(seed=0))
    free = draw(30, keep=3, top=2)
    new = free.tokens[0]
    assert draw(np.int64(30), keep=np.uint8(3), top=np.int32(2)) == free  # -3 in uint8 would be 253
    end = next(t for t in new if t != new[0])
    stopped = draw(30, keep=3, stop=end)
    assert stopped.tokens[0] == new[: new.index(end) + 1]
    for stop in (np.int64(end), np.array(end), torch.tensor(end), [np.int64(end)]):
        assert draw(30, keep=3, stop=stop) == stopped
    for name in ("keep", "top"):
        for value in (True, np.True_, 2.0, np.float64(2)):
            with pytest.raises(ValueError, match=f"{name}: got .*, takes an integer"):
                draw(3, **{name: value})


@pytest.mark.parametrize(
    "tokens", [None, [[1]], torch.ones(1, 2), torch.ones(1, 2) > 0, torch.ones(0, 2).long()]
)
def test_bad_tokens_of_the_model_itself(model, tokens):
    with pytest.raises(TypeError, match=r"tokens: got .*, takes an int64 tensor"):
        model.generate(tokens, 3)
