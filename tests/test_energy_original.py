"""The original's energy formulas, and the machine's own counters."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from spikedecoder import SpikeDecoderConfig, energy
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


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"memory": True}, "memory"),
        ({"memory": {"weights": "dram"}, "number_format": "int8"}, "memory, number_format"),
        ({"number_format": "int8", "activation_bits": 3}, "number_format, activation_bits"),
        ({"table": "jouppi-7nm"}, "table"),
    ],
)
def test_compat_goes_with_no_other_choice(changes, names):
    with pytest.raises(ValueError, match=f"compat: got True with {names}, takes no"):
        ledger(4).joules(compat=True, **changes)
    default = energy.EnergyTable.load(energy.DEFAULT_TABLE)
    assert ledger(4).joules(default, compat=True) == ledger(4).joules(compat=True)


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


class Nvml(ModuleType):
    """pynvml of a machine with two GPUs, of which CUDA_VISIBLE_DEVICES shows torch the second alone."""

    class NVMLError(Exception):
        pass

    def __init__(self, works=True):
        super().__init__("pynvml")
        self.works, self.opened = works, 0
        self.millijoules = {"GPU-first": 1_000_000, "GPU-second": 5_000}

    def nvmlInit(self):
        if not self.works:
            raise self.NVMLError("Driver Not Loaded")
        self.opened += 1

    def nvmlShutdown(self):
        if not self.opened:
            raise self.NVMLError("Uninitialized")
        self.opened -= 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return list(self.millijoules)[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.millijoules:
            raise self.NVMLError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.millijoules[handle] += 250
        return self.millijoules[handle]


@pytest.fixture
def gpu(monkeypatch):
    """Pretends that torch's GPU has this UUID."""

    def pretend(nvml, uuid="second"):
        def properties(device):
            if device not in ("cuda", "cuda:0"):
                raise AssertionError("Invalid device id")
            return SimpleNamespace(uuid=uuid)

        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        return nvml

    return pretend


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_measured_joules_are_those_of_torchs_gpu_and_nvml_is_closed(gpu, device):
    nvml = gpu(Nvml())
    found = measured_joules(lambda: None, seconds=0, device=device)
    assert (found.joules, found.source) == (0.25, f"NVML, {device}")
    assert nvml.millijoules == {"GPU-first": 1_000_000, "GPU-second": 5_750}
    assert nvml.opened == 0

    def fails():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measured_joules(fails, device=device)
    assert nvml.opened == 0


def test_measured_joules_of_a_gpu_say_why_there_are_none(gpu, monkeypatch):
    nvml = gpu(Nvml(), uuid="third")
    with pytest.raises(ValueError, match=r"measured joules: NVML cannot be read here \(Not Found\)"):
        measured_joules(lambda: None, device="cuda")
    assert nvml.opened == 0
    with pytest.raises(ValueError, match=r"torch has no device 'cuda:1' here \(Invalid device id\)"):
        measured_joules(lambda: None, device="cuda:1")
    gpu(Nvml(works=False))
    with pytest.raises(ValueError, match=r"NVML cannot be read here \(Driver Not Loaded\)"):
        measured_joules(lambda: None, device="cuda")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(ValueError, match="needs the package nvidia-ml-py"):
        measured_joules(lambda: None, device="cuda")


@pytest.mark.parametrize("device", ["mps", "xpu:0", "cud", ""])
def test_a_device_without_a_counter_is_not_the_cpu(device, tmp_path):
    counters(tmp_path, ("intel-rapl:0", 900))
    with pytest.raises(ValueError, match=f"device: got '{device}', takes cpu, cuda or cuda:N"):
        measured_joules(lambda: None, device=device, rapl=tmp_path)


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
