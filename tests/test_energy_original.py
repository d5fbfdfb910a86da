"""The original's energy formulas, and the machine's own counters."""

from __future__ import annotations

import pytest

from spikedecoder import SpikeDecoderConfig
from spikedecoder.energy import Ledger, Row, measured_joules, original_estimate
from spikedecoder.energy.units import si

# counts of what is not zero per sequence and timestep (head: per sequence), as the original tracks them
COUNTS = {
    ("attention.q", "linear"): 55.0,
    ("attention.q", "LIF"): 101.5,
    ("attention.attention_lif", "(q k^T) v"): 37.25,
    ("attention.proj", "linear"): 44.5,
    ("mlp.fc1", "linear"): 61.25,
    ("mlp.fc2", "linear"): 303.0,
}
# what the original's program returns for them in µJ: E = 80, S = 256, V = 30, T = 4, 12 blocks, MLP ratio 16
SHOWN = {4: 31.4091756, 2: 5793.652185599999, 0: 14032.663142399999}


def ledger(degree, mode="prompt", sequences=1, **changes):
    config = SpikeDecoderConfig.preset("original-char", spike_degree=degree, **changes)
    rows = [
        Row(f"blocks.{i}.{part}", operation, "ac", "weights", events=round(count * 4) * sequences)
        for i in range(12)
        for (part, operation), count in COUNTS.items()
    ]
    rows.append(Row("head", "linear", "mac", "weights", events=77 * sequences))
    return Ledger(rows, mode, sequences, 200 * sequences, 200 * 201 // 2 * sequences, 1000, config)


@pytest.mark.parametrize("degree", SHOWN)
def test_compat_gives_what_the_original_shows(degree):
    estimate = ledger(degree).joules(compat=True)
    assert estimate.joules == pytest.approx(SHOWN[degree] * 1e-6, rel=1e-12)
    assert estimate.per_token == pytest.approx(estimate.joules / 200)
    assert "known errors included" in estimate.assumptions[0]
    # three sequences cost three times one
    assert original_estimate(ledger(degree, sequences=3)).joules == pytest.approx(3 * estimate.joules)


def test_compat_takes_the_binary_timesteps_of_integers():
    changes = {"neuron": "ilif", "levels": 15, "timesteps": 1, "v_reset": None}  # four, as above
    assert ledger(4, **changes).joules(compat=True).joules == pytest.approx(SHOWN[4] * 1e-6, rel=1e-12)


def test_compat_says_what_it_cannot_do():
    for degree in (1, 3):
        with pytest.raises(ValueError, match=f"spike_degree={degree}.*formulas for degrees 0, 2 and 4"):
            original_estimate(ledger(degree))
    with pytest.raises(ValueError, match="mode 'token', takes 'prompt'"):
        original_estimate(ledger(4, mode="token"))


def counters(folder, *domains, limit=1000):
    for name, value in domains:
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "energy_uj").write_text(f"{value}\n")
        (folder / name / "max_energy_range_uj").write_text(f"{limit}\n")


def test_measured_joules_sums_packages_and_survives_a_turn_of_the_counter(tmp_path):
    counters(tmp_path, ("intel-rapl:0", 900), ("intel-rapl:1", 5), ("intel-rapl:0:0", 7), ("intel-rapl:2", 9))
    (tmp_path / "intel-rapl:2" / "name").write_text("psys\n")
    calls = []

    def run():
        calls.append(1)
        if len(calls) == 2:  # after the warm-up run
            counters(tmp_path, ("intel-rapl:0", 50), ("intel-rapl:1", 25), ("intel-rapl:0:0", 500))

    found = measured_joules(run, seconds=0, rapl=tmp_path)
    # 900 -> 1000 -> 0 -> 50 is 151 µJ, 5 -> 25 is 20; the part intel-rapl:0:0 lies in its package
    assert found.joules == pytest.approx(171e-6) and found.runs == 1 and found.per_run == found.joules
    assert "2 CPU package(s)" in found.source


def test_measured_joules_where_there_are_none(tmp_path):
    with pytest.raises(ValueError, match="no RAPL counters"):
        measured_joules(lambda: None, rapl=tmp_path)
    (tmp_path / "intel-rapl:0").mkdir()
    with pytest.raises(ValueError, match="RAPL cannot be read here"):
        measured_joules(lambda: None, rapl=tmp_path)


@pytest.mark.parametrize(
    ("joules", "text"),
    [
        (0, "0 J"),
        (1.234e-7, "123 nJ"),
        (1e-7, "100 nJ"),
        (9.999e-7, "1.00 µJ"),
        (2.5e-13, "0.25 pJ"),
        (0.0123, "12.3 mJ"),
        (1234.0, "1,230 J"),
    ],
)
def test_joules_for_people(joules, text):
    assert si(joules) == text
