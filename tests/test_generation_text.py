"""Text in, text out: streaming, stop strings, unknown characters, and what a text cost."""

import numpy as np
import pytest
import torch
from test_generation import TEXT, make

from spikedecoder.data import CharTokenizer, WordTokenizer
from spikedecoder.energy import Recorder
from spikedecoder.generation import (
    SamplingParams,
    TextStream,
    encode_prompt,
    generate,
    generate_result,
    generate_text,
    stream_text,
)
from spikedecoder.generation.stats import text_cost, windows
from spikedecoder.generation.window import PAST, Context
from spikedecoder.nn.linear import SpikeLinear
from spikedecoder.spike_stats import SpikeCounter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module", params=["char", "original-char", "word", "original-word"])
def written(request):
    """A tokenizer and a model of its vocabulary (and three ids more)."""
    tokenizer = {
        "char": lambda: CharTokenizer.from_text(TEXT),
        "original-char": CharTokenizer.original,
        "word": lambda: WordTokenizer.from_text(TEXT),
        "original-word": lambda: WordTokenizer.original(sorted(["cat", "sat", "the", "on", ".", "P"])),
    }[request.param]()
    model = make(vocab_size=tokenizer.vocab_size + 3, pad_id=tokenizer.pad_id)
    return model, tokenizer


def test_text_in_text_out(written):
    model, tokenizer = written
    prompts = ["the cat sat", "", "the cat sat on the cat. the cat sat on the cat."]
    texts = generate_text(model, tokenizer, prompts, max_new_tokens=25, seed=3)
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        before = tokenizer.decode(tokenizer.encode(prompt)) if prompt else ""
        assert text.startswith(before)
        streamed = list(stream_text(model, tokenizer, prompt, max_new_tokens=25, seed=3 + i))
        assert len(streamed) == 25 and before + "".join(streamed) == text
    again = generate_text(model, tokenizer, prompts, max_new_tokens=25, seed=3)
    assert again == texts != generate_text(model, tokenizer, prompts, max_new_tokens=25, seed=4)


def test_stop_strings(written):
    model, tokenizer = written
    free = generate_result(model, tokenizer, ["the", "cat sat"], 40, SamplingParams(seed=3))
    whole = free.completions[0]
    # characters out of the middle, whatever tokens they belong to
    start = len(whole) // 2
    stop = whole[start : start + 3]
    options = {"max_new_tokens": 40, "seed": 3, "stop": [stop, "no such text"]}
    texts = generate_text(model, tokenizer, ["the", "cat sat"], **options)
    for prompt, completion, text in zip(free.prompts, free.completions, texts, strict=True):
        assert text == tokenizer.decode(prompt) + completion.split(stop)[0]
    pieces = list(stream_text(model, tokenizer, "the", **options))
    assert "".join(pieces) == whole.split(stop)[0] and len(pieces) < 40
    result = generate_result(model, tokenizer, ["the"], 40, SamplingParams(seed=3), stop=stop)
    assert result.finish == ["stop"] and result.tokens == [free.tokens[0][: len(pieces)]]
    by_id = free.tokens[0][2]  # an id stops as well, and its text stays
    result = generate_result(model, tokenizer, ["the"], 40, SamplingParams(seed=3), stop=["no such", by_id])
    assert result.tokens == [free.tokens[0][: free.tokens[0].index(by_id) + 1]]
    assert (
        tokenizer.decode(result.sequences[0]) == tokenizer.decode(result.prompts[0]) + result.completions[0]
    )
    for ids in (torch.tensor([by_id]), torch.tensor(by_id), np.int64(by_id), ["no such", np.int64(by_id)]):
        again = generate_result(model, tokenizer, ["the"], 40, SamplingParams(seed=3), stop=ids)
        assert again.tokens == result.tokens
    never = generate_result(model, tokenizer, ["the"], 40, SamplingParams(seed=3), stop="no such text")
    assert never.finish == ["length"] and never.completions == [whole]


class Letters:
    """A tokenizer of whole strings, to cut text where a test wants it."""

    pad_id = 0

    def __init__(self, *tokens):
        self.tokens = ["", *tokens]

    def decode(self, ids):
        return "".join(self.tokens[i] for i in ids)


@pytest.mark.parametrize(
    "stop, text",
    [
        (["cd"], "ab"),
        (["de"], "abc"),
        (["bcdef"], "a"),
        (["abcdefgx", "h"], "abcdefg"),
        (["g", "fgh"], "abcdef"),  # complete first
        (["cd", "bcd"], "a"),  # of two complete at once the longer
        (["hi"], "abcdefgh"),
        (["a"], ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("cut", ["abcdefgh", "a bc de f gh", "a b c d e f g h", "abcde fgh"])
def test_stop_strings_wherever_tokens_end(stop, text, cut):
    tokens = cut.split()
    stream = TextStream(Letters(*tokens), [], stop)
    shown = ""
    for i in range(1, len(tokens) + 1):
        shown += stream.push(i)
        assert text.startswith(shown)  # never more than what stays
        if stream.stopped:
            break
    assert shown + stream.flush() == text and stream.stopped == (stop != ["hi"])


def test_bad_stop_strings(model):
    tokenizer = CharTokenizer.original()
    with pytest.raises(ValueError, match="stop: got an empty string"):
        generate_text(model, tokenizer, ["a"], stop=["b", ""])
    with pytest.raises(TypeError, match=r"stop: got 1.5, takes strings"):
        generate_text(model, tokenizer, ["a"], stop=[1.5])
    with pytest.raises(TypeError, match="unknown argument 'stpo'"):
        generate_text(model, tokenizer, ["a"], stpo="b")
    assert generate_text(model, tokenizer, ["a"], max_new_tokens=0, stop="b") == ["a"]


# --- what a text costs


@pytest.mark.parametrize("past", PAST)
@pytest.mark.parametrize("changes", [{}, {"reunite": "concatenate", "token_shift": 2}], ids=str)
def test_cost_is_counted_where_the_text_was_written(changes, past):
    """Equal to what counters see while generating, and to a count by hand."""
    model = make(**changes)
    prompt = [[1, 2, 3]]
    n = 40 if past == "continue" else 10
    with SpikeCounter(model) as spikes, Recorder(model, "token") as recorder:
        result = generate(model, prompt, n, SamplingParams(seed=0), past=past)
    cost = text_cost(model, prompt, result.tokens, past=past)
    assert cost.tokens == 3 + n - 1 == recorder.ledger().tokens
    assert cost.spike_rates == spikes.rates() and 0 < cost.spike_rate < 1
    assert cost.ledger.totals() == recorder.ledger().totals()
    assert cost.multiply_accumulates == (0 if changes else 30 * 16)  # a head that averages multiplies

    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, SpikeLinear):
            module.register_forward_pre_hook(lambda m, i, name=name: seen.update({name: (m, i[0])}))
        if name.endswith("attention_lif"):
            module.register_forward_pre_hook(lambda m, i, name=name: seen.update({name: (m, i)}))
    model(torch.tensor([prompt[0] + result.tokens[0][:-1]]))
    total = 0
    for module, x in seen.values():
        if isinstance(module, SpikeLinear):
            total += int(x.sum()) * module.out_features
            continue
        q, k, v = (t.unflatten(-1, (2, 8)) for t in x[:3])  # [T, B, S, H, d]
        total += int(torch.einsum("tbshi,tbshj->", k, v)) + int(q.sum()) * 8
    assert cost.accumulates * cost.tokens == pytest.approx(total)


def test_cost_of_texts_that_slide():
    """What generation read again is counted again, as counters see it."""
    model = make()
    with SpikeCounter(model) as spikes, Recorder(model, "token") as recorder:
        results = [generate(model, [p], 30, SamplingParams(seed=0)) for p in ([1] * 20, [2])]
    prompts, tokens = [r.prompts[0] for r in results], [r.tokens[0] for r in results]
    cost = text_cost(model, prompts, tokens)
    assert cost.ledger.totals() == recorder.ledger().totals() and cost.spike_rates == spikes.rates()
    # of the long prompt the last half of the context is read; and so at each slide, the new token among it
    assert cost.again == 4 * 5 + 3 * 5 and cost.tokens - cost.again == 6 + 29 + 1 + 29
    parts = list(windows([1] * 20, list(range(30)), Context.of(model, None, "slide")))
    read = [token for window, known in parts for token in window[known:]]
    assert read == [1] * 6 + list(range(29)) and all(len(window) <= 12 for window, _ in parts)
    assert [known for _, known in parts] == [0, 5, 5, 5, 5]


def test_cost_of_a_model_that_does_not_spike():
    model = make(spike_degree=0)
    result = generate(model, [[1, 2]], 4, SamplingParams(seed=0))
    cost = text_cost(model, result.prompts, result.tokens)
    assert cost.spike_rate is None and cost.accumulates == 0
    e = model.config.embed_dim
    attention = sum(2 * e * (i + 1) for i in range(5)) / 5
    assert cost.multiply_accumulates == pytest.approx(2 * (12 * e * e + attention) + 30 * e)


def test_unknown_characters_and_words():
    chars, words = CharTokenizer.from_text(TEXT), WordTokenizer.from_text(TEXT)
    original = CharTokenizer.original()
    with pytest.raises(ValueError, match=r"prompt: 2 character.s. outside .*: 'Q', 'é'"):
        encode_prompt(chars, "thQé")
    with pytest.raises(ValueError, match=r"1 word.s. outside .*: 'dog'"):
        encode_prompt(words, "the dog sat")
    with pytest.raises(ValueError, match=r"'1', 'é'"):
        encode_prompt(original, "Caf1é!")
    assert encode_prompt(original, "Cat!") == [2, 0, 19, 26, 29]  # a full stop and its space
    assert encode_prompt(chars, "tQé", errors="drop") == encode_prompt(chars, "t")
    assert encode_prompt(chars, "tQ", errors="replace")[1] == chars.unk_id
    assert encode_prompt(words, "dog cat", errors="drop") == encode_prompt(words, "cat")
    with pytest.raises(ValueError, match="errors: got 'ignore', takes one of"):
        encode_prompt(chars, "t", errors="ignore")
    with pytest.raises(ValueError, match="and 2 more"):
        encode_prompt(chars, "0123456789")


def test_text_needs_a_fitting_tokenizer(model):
    with pytest.raises(ValueError, match="tokenizer: got None"):
        generate_text(model, None, ["a"])
    with pytest.raises(ValueError, match="tokenizer: has 33 tokens, the model only 30"):
        generate_text(model, CharTokenizer.from_text("abcdefghijklmnopqrstuvwxyzABCDE"), ["a"])
    with pytest.raises(TypeError, match="tokenizer: got str, takes a Tokenizer"):
        generate_text(model, "char", ["a"])
    for wrong in ("runs/book", None):
        with pytest.raises(TypeError, match=r"model: got .*, takes a SpikeDecoder"):
            generate_text(wrong, None, ["a"])
    with pytest.raises(TypeError, match="stop: got float, takes strings or token ids"):
        generate_text(model, CharTokenizer.original(), ["a"], stop=1.5)
    with pytest.raises(TypeError, match="takes a list of str"):
        generate_text(model, CharTokenizer.original(), "abc")
    with pytest.raises(TypeError, match="prompts: got NoneType, takes a list of str"):
        generate_text(model, CharTokenizer.original(), None)
    with pytest.raises(ValueError, match="top_p"):
        stream_text(model, CharTokenizer.original(), "abc", top_p=0)
