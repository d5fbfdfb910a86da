"""The choice of ways for `spike_linear`: costs of each CPU, what they choose, and their calibration."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from spikedecoder import ext

if not ext.is_built():
    pytest.skip(ext.NOT_BUILT, allow_module_level=True)

from spikedecoder.ext.cpu import _cost, calibrate, native


def fastest(m, k, n, count, weight_grad=False, dtype=torch.float32):
    return _cost.crossover(_cost.native.variant(), m, k, n, weight_grad, False, dtype).method(count)


def test_the_cost_model_chooses_by_rate():
    native.use_variant(native.variants()[0])
    shape = (8192, 1280, 80)
    sparse, full = (fastest(*shape, int(rate * 8192 * 1280)) for rate in (0.01, 1.0))
    assert sparse == "gather"
    assert full != "gather"


def test_few_rows_are_not_worth_a_transposition():
    def way(m, transposed, dtype=torch.float32):
        return _cost.crossover("avx512", m, 2048, 2048, False, transposed, dtype)

    assert way(1, True).by_torch(200) and way(64, True).by_torch(64 * 600)
    assert not way(1, False).torch_dense and not way(64, False).torch_dense
    assert not way(1000, True).torch_dense and not way(1, True, torch.bfloat16).torch_dense


@pytest.fixture
def cpu_of(monkeypatch):
    """Pretends that the costs are asked for on another CPU of COSTS."""

    def pretend(cpu, variant="avx512", pairs=False, tiles=False):
        vendor, family = {"zen 5": ("amd", 26), "zen 1": ("amd", 23)}.get(cpu, (cpu, 25))
        build = {"vendor": vendor, "family": family, "bfloat16_products": pairs}
        build["halves_vectors"] = cpu == "zen 1"
        fake = SimpleNamespace(build=lambda: build, variant=lambda: variant)
        monkeypatch.setattr(_cost, "native", fake)
        monkeypatch.setattr(_cost, "has_tiles", lambda: tiles)
        forget_costs()

    forget_costs()
    yield pretend
    monkeypatch.undo()
    forget_costs()


def forget_costs():
    for cached in (_cost.costs, _cost.costs_of, _cost.crossover):
        cached.cache_clear()


@pytest.mark.parametrize("variant", ["avx512", "avx2", "baseline"])
def test_few_rows_are_not_worth_the_transposition_of_a_weight_gradient(cpu_of, variant):
    """All ways but the dense one sum by channels."""
    for cpu in ("zen 5", "zen 1", "amd", "intel"):
        cpu_of(cpu, variant)
        for m in (1, 4, 16):
            assert fastest(m, 2048, 2048, m * 200, True) == "dense"
        assert fastest(4096, 2048, 2048, 4096 * 100, True) == "gather"
        way = _cost.crossover(variant, 1, 2048, 2048, True, False, torch.float32)
        assert way.by_torch(200)


def test_costs_are_those_of_the_cpu(cpu_of):
    for maker in _cost.OTHERS:
        assert set(_cost.COSTS[maker]) - {"amx"} == {"avx512", "avx2", "baseline"}
    for cpu, variants in _cost.COSTS.items():
        for variant, (product, gradient) in variants.items():
            cpu_of(cpu, variant)
            assert _cost.costs(variant) is product and _cost.costs(variant, True) is gradient
    cpu_of("zen 5")
    assert _cost.costs("avx2") is _cost.COSTS["amd"]["avx2"][0]  # not measured there
    cpu_of("zen 1")
    assert _cost.costs("baseline") is _cost.COSTS["amd"]["baseline"][0]
    cpu_of("other")
    assert _cost.costs("avx2") is _cost.COSTS["amd"]["avx2"][0]
    assert _cost.costs("amx") is _cost.COSTS["intel"]["amx"][0]  # whoever makes one


# (shape, rate, of the weight's gradient, what was measured to be the fastest by a tenth at least)
MEASURED = {
    ("zen 5", "avx512"): [
        ((8192, 80, 1280), 0.2, False, "gather"),
        ((8192, 80, 1280), 0.2, True, "subset_sums"),
        ((2048, 80, 80), 0.2, True, "subset_sums"),
        ((2048, 512, 1024), 0.08, True, "gather"),
        ((2048, 512, 1024), 0.2, False, "subset_sums"),
        ((1024, 1024, 512), 0.2, False, "subset_sums"),
        ((8192, 1280, 80), 0.5, False, "subset_sums"),
    ],
    ("zen 1", "avx2"): [
        ((8192, 80, 1280), 0.2, False, "gather"),
        ((8192, 80, 1280), 0.2, True, "subset_sums"),
        ((8192, 1280, 80), 0.1, False, "gather"),
        ((8192, 1280, 80), 0.2, False, "subset_sums"),
        ((2048, 512, 1024), 0.08, True, "gather"),
        ((1024, 1024, 512), 0.2, True, "subset_sums"),
    ],
    ("amd", "avx512"): [
        ((8192, 80, 80), 0.05, False, "gather"),
        ((8192, 80, 1280), 0.1, True, "gather"),
        ((4096, 2048, 512), 0.5, False, "subset_sums"),
    ],
    ("amd", "avx2"): [
        ((8192, 80, 80), 0.05, False, "gather"),
        ((8192, 80, 1280), 0.1, False, "gather"),
        ((8192, 80, 1280), 0.5, False, "subset_sums"),
        ((8192, 80, 1280), 0.5, True, "subset_sums"),
        ((8192, 1280, 80), 0.05, False, "gather"),
        ((8192, 1280, 80), 0.5, True, "subset_sums"),
        ((4096, 2048, 512), 0.05, False, "gather"),
        ((4096, 2048, 512), 0.5, False, "subset_sums"),
    ],
    ("amd", "baseline"): [
        ((8192, 80, 80), 0.05, False, "gather"),
        ((8192, 1280, 80), 0.5, False, "subset_sums"),
        ((8192, 1280, 80), 0.5, True, "subset_sums"),
    ],
    ("intel", "avx512"): [
        ((8192, 80, 80), 0.05, False, "gather"),
        ((8192, 80, 80), 0.05, True, "gather"),
        ((8192, 80, 1280), 0.1, True, "gather"),
        ((8192, 80, 80), 0.5, True, "subset_sums"),
        ((8192, 80, 1280), 0.5, True, "subset_sums"),
        ((4096, 2048, 512), 0.1, False, "gather"),
        ((4096, 2048, 512), 0.5, False, "subset_sums"),
        ((4096, 2048, 512), 0.1, True, "gather"),
    ],
    ("intel", "amx"): [
        ((8192, 80, 80), 0.05, True, "gather"),
        ((8192, 80, 80), 0.5, True, "tiles"),
        ((8192, 80, 1280), 0.1, False, "gather"),
        ((8192, 80, 1280), 0.5, True, "tiles"),
        ((8192, 1280, 80), 0.05, True, "gather"),
        ((4096, 2048, 512), 0.05, False, "gather"),
        ((4096, 2048, 512), 0.5, False, "tiles"),
    ],
}


@pytest.mark.parametrize(
    ("cpu", "shape", "rate", "weight_grad", "best"),
    [(cpu, *case) for cpu, cases in MEASURED.items() for case in cases],
)
def test_the_choice_is_what_was_measured(cpu_of, cpu, shape, rate, weight_grad, best):
    cpu_of(*cpu)
    assert fastest(*shape, int(rate * shape[0] * shape[1]), weight_grad) == best


@pytest.mark.parametrize("cpu", [cpu for cpu in MEASURED if _cost.COSTS[cpu[0]][cpu[1]][0].far])
def test_sums_over_many_rows_of_a_panel_are_sooner_looked_up(cpu_of, cpu, monkeypatch):
    """They come from farther away than the first-level cache, unlike those of a shape as large of few."""
    cpu_of(*cpu)
    product, gradient = _cost.COSTS[cpu[0]][cpu[1]]
    count = 8192 * 80
    near, far = (
        [c.of("gather", 8192, rows, 1280, count, False) for rows in (_cost.NEAR_ROWS, _cost.NEAR_ROWS + 1)]
        for c in (replace(product, far=0.0, word=0.0, fetch=0.0), replace(product, word=0.0, fetch=0.0))
    )
    assert near[0] == near[1] == far[0]
    assert far[1] - far[0] == pytest.approx(count * 1280 * product.far)

    def crossing():
        forget_costs()
        return next(r for r in range(1000) if fastest(8192, 1280, 80, r * 8192 * 1280 // 1000) != "gather")

    assert fastest(8192, 1280, 80, 0) == "gather"
    measured = crossing()
    cheaper = {**_cost.COSTS[cpu[0]], cpu[1]: (replace(product, far=0.0), gradient)}
    monkeypatch.setitem(_cost.COSTS, cpu[0], cheaper)
    assert crossing() > measured


def test_bfloat16_is_dense_sooner_where_tiles_multiply_it(cpu_of):
    case = (8192, 80, 1280, int(0.5 * 8192 * 80))
    cpu_of("intel", pairs=True, tiles=True)
    assert fastest(*case, dtype=torch.bfloat16) == "dense"
    assert fastest(*case) != "dense"


@pytest.mark.parametrize(
    ("shape", "best"),
    [((2048, 512, 1024), "subset_sums"), ((8192, 80, 1280), "gather"), ((8192, 1280, 80), "subset_sums")],
)
@pytest.mark.parametrize("cpu", ["amd", "zen 5"])
def test_pairs_of_bfloat16_gain_less_than_subset_sums(cpu_of, cpu, shape, best):
    """As measured on Zen 4 ("amd") and Zen 5, where a dense product takes half of the time of floats."""
    cpu_of(cpu, pairs=True)
    assert fastest(*shape, int(0.2 * shape[0] * shape[1]), dtype=torch.bfloat16) == best
    each = _cost.costs_of("avx512", torch.bfloat16, False).multiply_add
    assert 0.4 < each / _cost.costs("avx512").multiply_add < 0.6


def test_bfloat16_is_left_to_torch_only_where_torch_is_fast(cpu_of):
    """Of a CPU with AVX2 alone, torch's product of bfloat16 takes a hundred times as long as of float32."""
    for vendor in ("amd", "intel"):
        cpu_of(vendor, "avx2")
        assert _cost.own_products("avx2", torch.bfloat16)
        assert not _cost.only("dense", torch.bfloat16).torch_dense
    assert not _cost.own_products("avx2", torch.float32)  # Intel's, for which torch's BLAS was written
    cpu_of("intel", "amx", tiles=True)
    assert not _cost.own_products("amx", torch.bfloat16)


def test_a_broken_cost_file_is_named(monkeypatch, tmp_path):
    path = tmp_path / "costs.json"
    path.write_text("{}")
    monkeypatch.setenv("SPIKEDECODER_SPIKE_LINEAR_COST", str(path))
    forget_costs()
    try:
        with pytest.raises(ValueError, match=r"SPIKEDECODER_SPIKE_LINEAR_COST.*costs\.json"):
            _cost.costs(native.variant())
    finally:
        monkeypatch.undo()
        forget_costs()


def test_calibration_finds_the_constants_again():
    """Points made from known constants give these constants back, and choices without regret."""
    true = _cost.Costs(
        *(0.05, 0.3, 0.1, 0.2, 0.01, 0.7, 0.4, 0.03, 0.05, 0.1, 0.3, 0.2, 0.004, 0.3, 0.2, 0.1),
        *(0.003, 9.0, 0.02, 0.02),
    )
    points = []
    for m, k, n in calibrate.SHAPES:
        for rate in calibrate.RATES:
            for weight_grad in (False, True):
                case = (m, k, n, int(rate * m * k), weight_grad)
                points += [calibrate.Point(w, *case, true.of(w, *case)) for w in _cost.METHODS]
    found = calibrate.fit(points)
    for point in points:
        assert found.of(point.method, *point.case) == pytest.approx(point.nanoseconds, rel=0.05)
    regrets = calibrate.regrets(points, found, "amx").values()
    assert max(ratio for _, best, ratio in regrets if best != "tiles") < 1.05
    assert max(ratio for _, best, ratio in regrets if best == "tiles") < 1.05 * _cost.TILES_MARGIN


@pytest.mark.parametrize(("share", "chosen"), [(1.1, "gather"), (1.4, "tiles")])
@pytest.mark.parametrize("weight_grad", [False, True])
def test_regrets_are_those_of_the_choice_that_is_made(share, chosen, weight_grad):
    """Tiles have to win by a margin, of all that they cost."""
    shape = (2048, 512, 1024)
    tiles = _cost.Costs(*[0.0] * 9, tile=0.004, byte=0.004).of("tiles", *shape, 0, weight_grad)
    count = 2048 * 512 // 5
    table = _cost.Costs(
        *(share * tiles / count / 1024, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0), tile=0.004, byte=0.004
    )
    times = {w: table.of(w, *shape, count, weight_grad) for w in _cost.METHODS}
    points = [calibrate.Point(w, *shape, count, weight_grad, times[w]) for w in times]
    ((found, best, ratio),) = calibrate.regrets(points, table, "amx").values()
    assert (found, best) == (chosen, "tiles")
    assert ratio == pytest.approx(times[chosen] / times["tiles"])


@pytest.mark.parametrize(
    ("arguments", "status"), [(["--help"], 0), (["a.json", "b.json"], 2), (["--cost"], 2)]
)
def test_calibration_asked_for_help_or_wrongly_measures_nothing(arguments, status, monkeypatch):
    monkeypatch.delattr(calibrate, "measure")
    with pytest.raises(SystemExit) as left:
        calibrate.main(arguments)
    assert left.value.code == status


def test_calibration_into_no_file_measures_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.delattr(calibrate, "measure")
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "costs.json"):
        with pytest.raises(SystemExit) as left:
            calibrate.main([str(path)])
        said = capsys.readouterr().err
        assert left.value.code == 2 and f"'{path}'" in said and "Traceback" not in said
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_calibration_writes_what_the_model_reads(monkeypatch, tmp_path, capsys):
    real = calibrate.measure
    monkeypatch.setattr(calibrate, "SHAPES", ((64, 80, 80), (128, 80, 160)))
    monkeypatch.setattr(calibrate, "measure", lambda: real(budget=0.002))
    path = tmp_path / "new" / "costs.json"
    assert calibrate.main([str(path)]) == 0
    assert "its time" in capsys.readouterr().out
    monkeypatch.setenv("SPIKEDECODER_SPIKE_LINEAR_COST", str(path))
    forget_costs()
    try:
        for weight_grad in (False, True):
            assert isinstance(_cost.costs(native.variant(), weight_grad), _cost.Costs)
    finally:
        monkeypatch.undo()
        forget_costs()
