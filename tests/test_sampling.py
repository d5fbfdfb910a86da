"""From logits to the next token."""

import math
from collections import Counter

import pytest
import torch

from spikedecoder.generation import (
    Prediction,
    SamplingParams,
    sample,
    top_predictions,
)
from spikedecoder.generation.sampling import generators


def test_greedy_takes_the_lowest_of_equal_ids():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    ids, probabilities = sample(logits, SamplingParams(temperature=0))
    assert ids.tolist() == [1, 0]
    assert probabilities.tolist() == [[0, 1, 0, 0], [1, 0, 0, 0]]
    # a filter of one token is greedy as well, whatever the seed
    for seed in range(20):
        assert sample(logits, SamplingParams(top_k=1, seed=seed))[0].tolist() == [1, 0]


@pytest.mark.parametrize("n", [2, 3, 5, 10, 31])
def test_distribution_of_what_is_drawn(n):
    """10 000 draws agree with softmax(logits / temperature), filtered by hand, to four deviations."""
    torch.manual_seed(n)
    logits, temperature, k, p = torch.randn(n) * 2, 0.7, max(1, n - 1), 0.8
    expected = (logits.double() / temperature).softmax(0)
    order = sorted(range(n), key=lambda i: -expected[i].item())[:k]
    mass, kept = 0.0, []
    total = sum(expected[i].item() for i in order)
    for i in order:
        if mass >= p:
            break
        kept.append(i)
        mass += expected[i].item() / total
    total = sum(expected[i].item() for i in kept)

    draws = 10_000
    rng = generators(5, 1) * draws  # one stream
    ids, probabilities = sample(logits.expand(draws, n), SamplingParams(temperature, k, p), rng)
    counts = Counter(ids.tolist())
    assert set(counts) <= set(kept)
    for i in kept:
        share = expected[i].item() / total
        assert probabilities[0, i].item() == pytest.approx(share)
        assert abs(counts[i] / draws - share) <= 4 * math.sqrt(share * (1 - share) / draws) + 1e-12


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for top_p, kept in ((0.4, 1), (0.5, 1), (0.51, 2), (0.79, 2), (0.81, 3), (1.0, 3)):
        probabilities = sample(logits.double(), SamplingParams(top_p=top_p, seed=0))[1]
        assert int((probabilities > 0).sum()) == kept, top_p
        assert probabilities.sum().item() == pytest.approx(1)


def test_min_p_is_a_share_of_the_most_probable():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).double().log()
    for min_p, kept in ((None, 4), (0, 4), (0.09, 4), (0.11, 3), (0.31, 2), (0.61, 1), (1, 1)):
        probabilities = sample(logits, SamplingParams(min_p=min_p, seed=0))[1]
        assert int((probabilities > 0).sum()) == kept, min_p
        assert probabilities.sum().item() == pytest.approx(1)
    # at the temperature: at 0.5 the shares are squared
    assert int((sample(logits, SamplingParams(0.5, min_p=0.31, seed=0))[1] > 0).sum()) == 2
    assert int((sample(logits, SamplingParams(0.5, min_p=0.37, seed=0))[1] > 0).sum()) == 1
    # a token survives only where every filter keeps it
    probabilities = sample(logits, SamplingParams(top_k=3, top_p=0.8, min_p=0.2, seed=0))[1]
    assert probabilities[0].tolist() == pytest.approx([0.625, 0.375, 0, 0])


def test_repetition_penalty_divides_and_multiplies():
    logits = torch.tensor([[2.0, 1.0, -1.0, 0.5], [2.0, 1.0, -1.0, 0.5]])
    seen = torch.tensor([[True, False, True, False], [False, False, False, False]])
    probabilities = sample(logits, SamplingParams(repetition_penalty=4, seed=0), seen=seen)[1]
    expected = torch.tensor([[0.5, 1.0, -4.0, 0.5], [2.0, 1.0, -1.0, 0.5]]).double().softmax(1)
    torch.testing.assert_close(probabilities, expected)
    greedy = SamplingParams(0, repetition_penalty=4)
    assert sample(logits, greedy, seen=seen)[0].tolist() == [1, 0]
    assert sample(logits, greedy)[0].tolist() == [0, 0]


@pytest.mark.parametrize("params", [{"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.6}], ids=str)
def test_of_equal_tokens_the_lowest_ids_are_kept(params):
    probabilities = sample(torch.zeros(2, 6), SamplingParams(**params, seed=0))[1]
    kept = {"top_k": 3, "top_p": 5}.get(next(iter(params)), 0) if len(params) == 1 else 3
    assert (probabilities > 0).tolist() == [[i < kept for i in range(6)]] * 2


def test_extreme_logits_and_temperatures():
    logits = torch.tensor([[0.0, 1.0, -math.inf, 1e30]])
    for temperature in (1e-300, 1e-3, 1e300):
        ids, probabilities = sample(logits, SamplingParams(temperature, seed=1))
        assert probabilities[0, 2] == 0 and torch.isfinite(probabilities).all()
        assert temperature > 1 or ids.item() == 3
    half = torch.tensor([[0.0, 4.0]], dtype=torch.float16)
    assert sample(half, SamplingParams(seed=0))[1].dtype == torch.float64
    for bad, why in ((math.nan, "diverged"), (math.inf, "diverged")):
        with pytest.raises(ValueError, match=why):
            sample(torch.tensor([[0.0, bad]]), SamplingParams())
    with pytest.raises(ValueError, match="no token is left"):
        sample(torch.zeros(1, 2), SamplingParams(), suppress=torch.tensor([0, 1]))


def test_a_draw_at_the_very_end_takes_a_token_that_has_a_probability(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *a, **k: torch.ones(1, dtype=torch.float64))
    ids, _ = sample(torch.tensor([[1.0, 1.0, -math.inf]]), SamplingParams(seed=0))
    assert ids.item() == 1


def test_draws_do_not_depend_on_neighbours():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    together = sample(logits, SamplingParams(seed=3))[0]
    for i in range(4):
        assert sample(logits[i : i + 1], SamplingParams(seed=3 + i))[0] == together[i]


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("temperature", "hot"),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 1e-309),
        ("repetition_penalty", 1e7),
        ("repetition_penalty", math.nan),
        ("repetition_penalty", "a lot"),
        ("seed", -1),
        ("seed", 2**63),
        ("seed", 1.5),
    ],
)
def test_bad_sampling_params(field, value):
    with pytest.raises(ValueError, match=f"{field}: got .*takes"):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("changes", "error", "why"),
    [
        ({"logits": None}, TypeError, "logits: got NoneType, takes Tensor"),
        ({"logits": torch.zeros(())}, ValueError, r"logits: got shape \(\), takes \[B, V\]"),
        ({"params": {}}, TypeError, "params: got dict, takes SamplingParams"),
        ({"generator": 3}, TypeError, "generator: got int, takes Sequence"),
        ({"generator": [3, 4]}, TypeError, "generator: got int, takes Generator"),
        ({"suppress": 3}, TypeError, "suppress: got int, takes integers"),
        ({"suppress": [0.5]}, TypeError, "suppress: got 0.5, takes integers"),
        ({"suppress": [4]}, ValueError, "suppress: got token 4, takes 0 to 3"),
        ({"seen": [True]}, TypeError, "seen: got list, takes Tensor"),
        ({"seen": torch.ones(2, 3)}, ValueError, r"seen: got shape \(2, 3\), takes that of logits"),
    ],
)
def test_bad_arguments(changes, error, why):
    with pytest.raises(error, match=why):
        sample(**{"logits": torch.zeros(2, 4), "params": SamplingParams(), **changes})
    if set(changes) <= {"logits", "suppress"}:
        with pytest.raises(error, match=why):
            top_predictions(**{"logits": torch.zeros(2, 4), "k": 2, **changes})


@pytest.mark.parametrize("k", [-1, 1.5, None, True])
def test_a_number_of_predictions_that_is_none(k):
    with pytest.raises(ValueError, match=f"k: got {k}, takes an integer >= 0"):
        top_predictions(torch.zeros(2, 4), k)


def test_top_predictions():
    logits = torch.tensor([[0.1, 0.4, 0.4, 0.1]]).double().log()
    (best,) = top_predictions(logits, 3)
    assert [p.token for p in best] == [1, 2, 0]
    assert [p.probability for p in best] == pytest.approx([0.4, 0.4, 0.1])
    (best,) = top_predictions(logits, 9, torch.tensor([1]))
    assert best[0] == Prediction(2, pytest.approx(0.4)) and len(best) == 3  # the model's own, without token 1
