"""Figures of what a model does. Each plotting function returns a matplotlib Figure; `save` writes it.

    activity = viz.record(model, tokens, potentials=True, scores=True)
    viz.save(viz.raster(activity, labels=list("the cat")), "raster.png")

matplotlib is imported for the first figure; if it is missing, that raises a ValueError that says how to
install it.
"""

from spikedecoder.activity import Activity, record
from spikedecoder.viz._figure import check_picture, render, save
from spikedecoder.viz.reports import energy_bars, loss_curves, predictions, read_metrics
from spikedecoder.viz.spikes import attention_map, potentials, raster, spike_rates
from spikedecoder.viz.sweeps import sweep_history, sweep_slices

__all__ = [
    "Activity",
    "attention_map",
    "check_picture",
    "energy_bars",
    "loss_curves",
    "potentials",
    "predictions",
    "raster",
    "read_metrics",
    "record",
    "render",
    "save",
    "spike_rates",
    "sweep_history",
    "sweep_slices",
]
