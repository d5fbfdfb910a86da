"""The operations of a layer as ledger rows: one function per kind of operation, for hooks and baselines.

Operations are counted as the model computes them; only constants are folded: a norm with fixed statistics is
one scale and one shift per channel, and 1 / tau is a number. `reads` is how often a layer's weights are
fetched: once per sequence if a prompt is processed as a whole, once per token in generation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from spikedecoder.params import ILIFParams, LIFParams, binary_timesteps

Kind = Literal["mac", "ac", "lif", "norm", "lookup", "other"]
KINDS: tuple[Kind, ...] = ("mac", "ac", "lif", "norm", "lookup", "other")
# What numbers an operation works on, which decides the format that it is billed in:
#   weights: a weight and an activation; activations: two activations; both in the chosen format
#   counts: sums of spikes, which are integers, always int32; values: everything else, always fp32
Arithmetic = Literal["weights", "activations", "counts", "values"]


@dataclass
class Row:
    """One operation of one layer, summed over all that was measured.

    count: operations of this kind (MACs, accumulates, LIF updates, normalised values, look-ups, ...).
    add, mul, compare, logic, special: the elementary operations that they consist of. `compare` includes
        choices between two values; `logic` is 1-bit ANDs; `special` is exp, tanh, 1/x and 1/sqrt(x).
    events, slots: how many values are not zero, and of how many: inputs of a Linear, outputs of a LIF. The
        binary digits of an I-LIF neuron's integer count as timesteps, the ones among them as spikes.
    fan_out: of a Linear, accumulates per input spike.
    weight_words, activation_words, state_words: numbers moved. activation_bits: spikes moved.
    held: numbers of state that must be kept at the same time.
    cache_words, cache_held: as state_words and held, for cached keys and values, in the activations' format.
    """

    layer: str
    operation: str
    kind: Kind
    arithmetic: Arithmetic
    count: int = 0
    add: int = 0
    mul: int = 0
    compare: int = 0
    logic: int = 0
    special: int = 0
    events: int = 0
    slots: int = 0
    fan_out: int = 0
    weight_words: int = 0
    activation_words: int = 0
    activation_bits: int = 0
    state_words: int = 0
    held: int = 0
    cache_words: int = 0
    cache_held: int = 0
    note: str = ""

    @property
    def rate(self) -> float | None:
        """events / slots; None if there are no slots."""
        return self.events / self.slots if self.slots else None

    def merge(self, other: Row) -> None:
        """Add the counts of another pass. What is held is the maximum of the two."""
        for field in dataclasses.fields(self):
            mine = getattr(self, field.name)
            if field.name in ("held", "cache_held"):
                setattr(self, field.name, max(mine, getattr(other, field.name)))
            elif isinstance(mine, int) and field.name != "fan_out":
                setattr(self, field.name, mine + getattr(other, field.name))


def linear(
    layer: str,
    *,
    n_in: int,
    n_out: int,
    rows: int,
    events: int,
    spikes: bool,
    bias: bool,
    weight_words: int,
    reads: int,
    output_kept: bool,
    levels: int = 1,
) -> list[Row]:
    """y = W x + b for `rows` inputs, `events` of whose values are not zero.

    With spikes, each row takes as many binary timesteps as `levels` has digits; each input spike adds a
    column of W (n_out accumulates), and the sums are shifted between timesteps. With anything else, a row
    takes n_in * n_out MACs, zeros included. `output_kept`: y stays in the chip's registers, because its
    neurons follow directly.
    """
    main = Row(layer, "linear", "ac" if spikes else "mac", "weights", events=events)
    timesteps = binary_timesteps(levels)
    main.slots = rows * n_in * timesteps
    main.fan_out = n_out
    main.count = events * n_out if spikes else rows * n_in * n_out
    main.add, main.mul = main.count, 0 if spikes else main.count
    main.weight_words = weight_words
    if spikes:
        main.activation_bits, main.note = rows * n_in * timesteps, "one accumulate per input spike and output"
    else:
        main.activation_words, main.note = rows * n_in, "input is not spikes: dense multiply-accumulates"
    main.activation_words += 0 if output_kept else rows * n_out
    parts = [main, *shifts(layer, rows * n_out, levels)]
    if not bias:
        return parts
    added = Row(layer, "bias", "other", "weights", count=rows * n_out, add=rows * n_out)
    added.weight_words, added.note = reads * n_out, "one addition per output"
    return [*parts, added]


def shifts(layer: str, outputs: int, levels: int) -> list[Row]:
    """The shifts between the binary timesteps of I-LIF neurons: a spike is worth half as much at each next
    one."""
    count = (binary_timesteps(levels) - 1) * outputs
    if not count:
        return []
    row = Row(layer, "shift", "other", "counts", count=count, add=count)
    row.note = "one shift, billed as an int32 addition, per output and timestep but the first"
    return [row]


def lif(layer: str, p: LIFParams, *, updates: int, spikes: int, channels: int, input_words: int) -> list[Row]:
    """LIF neurons, `updates` = neurons * timesteps: leak and input, comparison with the threshold, reset.

    h = v + (x - (v - r)) / tau: a multiplication by 1 / tau and two additions (three where r is not 0);
    one comparison; hard reset: one choice between h and r; soft reset: one subtraction per spike.
    """
    row = Row(layer, "LIF", "lif", "values", count=updates, events=spikes, slots=updates)
    row.mul = updates
    row.add = updates * (3 if p.v_reset else 2)
    row.compare = updates
    if p.v_reset is None:
        row.add += spikes
    else:
        row.compare += updates
    row.state_words, row.held = 2 * updates, channels
    row.activation_bits, row.activation_words = updates, input_words
    reset = "subtraction per spike" if p.v_reset is None else "choice"
    row.note = (
        f"leak 1 mul + {3 if p.v_reset else 2} add, 1 compare, reset 1 {reset}; potential read and written"
    )
    return [row]


def ilif(
    layer: str, p: ILIFParams, *, updates: int, spikes: int, channels: int, input_words: int
) -> list[Row]:
    """I-LIF neurons, `updates` = neurons, each an integrate-and-fire neuron without leak in binary timesteps.

    The current is added once; each timestep compares with its own threshold; each spike subtracts it.
    """
    steps = binary_timesteps(p.levels)
    timesteps = updates * steps
    row = Row(layer, "LIF", "lif", "values", count=timesteps, events=spikes, slots=timesteps)
    row.add, row.compare = updates + spikes, timesteps
    row.state_words, row.held = 2 * timesteps, channels
    row.activation_bits, row.activation_words = timesteps, input_words
    row.note = (
        f"I-LIF in {steps} binary timesteps: 1 add a neuron, 1 compare a timestep, 1 subtraction a spike; "
        "potential read and written"
    )
    return [row]


def norm(layer: str, kind: str, *, rows: int, channels: int, reads: int) -> list[Row]:
    """LayerNorm: mean, centring, variance, 1 / sqrt, scale, then weight and bias. Other norms: a x + b."""
    values = rows * channels
    row = Row(layer, "norm", "norm", "values", count=values)
    if kind == "layer":
        row.add, row.mul, row.special = 4 * values + rows, 3 * values + 2 * rows, rows
        row.note = "statistics of each row: 4 add + 3 mul a value, 1 add + 2 mul + 1/sqrt a row"
    else:
        row.add = row.mul = values
        row.note = "fixed statistics folded: 1 mul + 1 add a value"
    row.weight_words = reads * 2 * channels
    return [row]


def spiking_attention(
    layer: str,
    *,
    values: int,
    spikes: int,
    coincidences: int = 0,
    tests: int = 0,
    scored: int = 0,
    pairs: int = 0,
    weighted: int = 0,
    written: int = 0,
    read: int = 0,
    state: int = 0,
    decayed: int = 0,
    recurrent: bool,
    levels: int = 1,
) -> list[Row]:
    """scale * causal(q k^T) v. values: elements of the output [T, B, S, E]. spikes: those of q.

    levels: of I-LIF neurons; the binary digits of their integers are timesteps, the ones among them spikes.

    Quadratic: `tests` ANDs, of each q spike with the same channel of each key that it sees; `coincidences` of
    them accumulate. `scored` of `pairs` scores are not zero; each is added once per v spike (`weighted`).
    Recurrent: k^T v takes one accumulate per pair of a k spike and a v spike (`written`); each q spike reads
    and accumulates one row of it, d numbers (`read`). `state`: the numbers in k^T v, T H d d.

    A decay takes `decayed` products: one per score that is not 0, or one per token and number of the state,
    which is read and written for it. The products are real numbers, and so are sums of them.
    """
    sums: Arithmetic = "values" if decayed else "counts"
    bits = values * binary_timesteps(levels)
    if recurrent:
        first = Row(layer, "state += k^T v", "ac", sums, count=written, add=written)
        first.state_words = 0 if decayed else 2 * written  # on its way to and from the decay
        first.held, first.activation_bits = state, 2 * bits
        first.note = "one accumulate per pair of a k spike and a v spike"
        second = Row(layer, "q state", "ac", sums, count=read, add=read, events=spikes, slots=bits)
        second.state_words, second.activation_bits = read, bits
        second.note = "one accumulate per q spike and column of the state"
    else:
        first = Row(layer, "q k^T", "ac", "counts", count=coincidences, add=coincidences, logic=tests)
        first.events, first.slots, first.activation_bits = spikes, bits, 2 * bits
        first.note = "causal; one accumulate where q and k both spike, one AND per q spike and key"
        second = Row(layer, "(q k^T) v", "ac", sums, count=weighted, add=weighted)
        second.events, second.slots, second.activation_bits = scored, pairs, bits
        second.note = "causal; one accumulate per v spike and score that is not 0; rate: scores not 0"
    scale = Row(layer, "scale", "other", "values", count=values, mul=values)
    scale.note = "one multiplication per output"
    rows = [first, second, *shifts(layer, values, levels), scale]
    if decayed:
        forgets = Row(layer, "decay", "other", "values", count=decayed, mul=decayed)
        what = "number of the state and token, read and written" if recurrent else "score that is not 0"
        forgets.state_words = 2 * decayed if recurrent else 0
        forgets.note = f"one multiplication per {what}"
        rows.append(forgets)
    return rows


def softmax_attention(
    layer: str, *, tokens: int, width: int, heads: int, pairs: int, longest: int, recurrent: bool
) -> list[Row]:
    """softmax(causal(q k^T / sqrt(d))) v. pairs: of a query and a key that it sees, over all sequences, the
    longest of which has `longest` tokens."""
    scores = pairs * heads
    first = Row(layer, "q k^T", "mac", "activations", count=pairs * width, add=pairs * width)
    first.mul, first.note = first.count, "causal"
    soft = Row(layer, "softmax", "other", "values", count=scores)
    soft.compare, soft.add, soft.mul = scores, 2 * scores, scores
    soft.special = scores + tokens * heads
    soft.note = "per score: maximum, subtraction, exp, sum, product; one reciprocal a row"
    second = Row(layer, "softmax v", "mac", "activations", count=pairs * width, add=pairs * width)
    second.mul, second.note = second.count, "causal"
    scale = Row(layer, "scale", "other", "values", count=tokens * width, mul=tokens * width)
    scale.note = "q / sqrt(d)"
    for row in (first, second):
        if recurrent:  # each token reads the cached keys (or values) and adds its own
            row.activation_words, row.cache_words = tokens * width, (pairs + tokens) * width
            row.cache_held = longest * width
        else:
            row.activation_words = 2 * tokens * width
    return [scale, first, soft, second]


def gelu(layer: str, *, values: int) -> list[Row]:
    """0.5 x (1 + tanh(c (x + 0.044715 x^3)))."""
    row = Row(layer, "GELU", "other", "values", count=values, add=2 * values, mul=6 * values, special=values)
    row.note = "tanh form: 6 mul + 2 add + tanh a value"
    return [row]


def residual(layer: str, *, values: int, sums: int = 2) -> list[Row]:
    """x = x + f(x), `sums` times."""
    row = Row(layer, "residual", "other", "values", count=sums * values, add=sums * values)
    row.activation_words, row.note = 3 * sums * values, "one addition per value and sum"
    return [row]


def join(layer: str, *, how: str, timesteps: int, outputs: int, spikes: bool) -> list[Row]:
    """The head's join of T timesteps into `outputs` values."""
    if timesteps == 1 or how in ("final", "concatenate"):
        return []
    sums = (timesteps - 1) * outputs
    row = Row(layer, "join", "other", "counts" if spikes else "values", count=sums, add=sums)
    row.note = "T - 1 additions a value"
    if how == "accumulate":
        return [row]
    mean = Row(
        layer, "mean", "other", "values", count=outputs, mul=outputs, note="one multiplication a value"
    )
    return [row, mean]


def embedding(
    layer: str, *, tokens: int, words: int, add: int, compare: int, mul: int, channels: int, spikes: bool
) -> list[Row]:
    """Table look-ups of `words` numbers per token, then `add`, `compare` and `mul` operations per token."""
    row = Row(layer, "look-up", "lookup", "values", count=tokens, add=tokens * add, mul=tokens * mul)
    row.compare, row.weight_words = tokens * compare, tokens * words
    if spikes:
        row.activation_bits = tokens * channels
    else:
        row.activation_words = tokens * channels
    row.note = f"{words} numbers a token; positions come from a table" + (
        ", one comparison each to binarise" if compare else ""
    )
    return [row]
