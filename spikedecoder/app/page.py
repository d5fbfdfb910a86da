"""The page: what is on it, and which control does what."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import gradio as gr

from spikedecoder.app import training
from spikedecoder.app.handlers import MOST_COMPARED, Handlers, Session, told, told_with_progress
from spikedecoder.app.models import TOKENS, Library
from spikedecoder.app.writing import MOST_TOKENS, VIEWS
from spikedecoder.kinds import KINDS

CSS = """
.gradio-container {max-width: 1240px !important; width: 100%; margin: auto}
.cards {display: grid; grid-template-columns: repeat(auto-fit, minmax(250px, 1fr)); gap: 12px}
.card {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 14px}
.card h4 {margin: 0 0 6px; overflow-wrap: anywhere}
.card .written {white-space: pre-wrap; overflow-wrap: anywhere; margin: 0 0 8px}
.card .figures {font-size: 85%; opacity: 0.8; margin: 0}
.figures-table {overflow-x: auto; margin-top: 12px; contain: inline-size}
.figures-table table {border-collapse: collapse; width: 100%}
.figures-table th, .figures-table td {text-align: left; padding: 4px 12px 4px 0}
.figures-table tr {border-bottom: 1px solid var(--border-color-primary)}
/* as wide as there is room, whatever the picture's own width; it begins below the label and the buttons */
.picture {contain: inline-size; width: 100%}
.picture .image-container {padding-top: 38px}
.picture img {max-height: 760px; object-fit: contain}
@media (max-width: 640px) {
  [role="tab"] {padding-left: 8px !important; padding-right: 8px !important}
  .picture {overflow-x: auto !important}
  .picture .image-container {min-width: 600px}
}
"""


def build(roots: list[Path]) -> Any:
    """The page for the models in `roots`; those it trains go into the first of them."""
    do = Handlers(Library(roots))
    with gr.Blocks(title="spikedecoder", analytics_enabled=False, **_style(gr.Blocks)) as page:
        session = gr.State(Session())
        gr.Markdown(
            "# spikedecoder\nText from spiking language models, what their neurons did meanwhile, and what "
            "it would cost."
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                tokens = gr.Radio(TOKENS, value=TOKENS[0], label="Reads and writes", elem_id="tokens")
                kind = gr.Radio(list(KINDS), value=next(iter(KINDS)), label="Kind of model", elem_id="kind")
                checkpoint = gr.Dropdown(
                    [],
                    label="Checkpoint",
                    info="From the list, or type the path of any other model's folder.",
                    allow_custom_value=True,
                    elem_id="checkpoint",
                )
                about = gr.Markdown(elem_id="about")
                with gr.Accordion("Train one", open=False) as offer:
                    offered = gr.Markdown(elem_id="offer")
                    steps = gr.Slider(10, 2000, value=300, step=10, label="Steps", elem_id="steps")
                    with gr.Row():
                        train = gr.Button("Train", elem_id="train")
                        stop_training = gr.Button("Stop training", elem_id="stop-training")
                    trained = gr.Markdown(elem_id="trained", min_height=40)
                prompt = gr.Textbox(value="the ", label="Prompt", lines=3, elem_id="prompt")
                with gr.Row():
                    start = gr.Button("Write", variant="primary", elem_id="write")
                    stop = gr.Button("Stop", elem_id="stop")
                count = gr.Slider(1, MOST_TOKENS, value=120, step=1, label="Tokens to write", elem_id="count")
                heat = gr.Slider(0, 2, value=0.8, step=0.05, label="Temperature", elem_id="temperature")
                with gr.Accordion("More", open=False):
                    top_k = gr.Number(label="Top k", info="Only the k most probable; empty: all", precision=0)
                    seed = gr.Number(
                        label="Seed",
                        info="Same seed, same text; empty: a fresh one",
                        precision=0,
                        elem_id="seed",
                    )
                    drop = gr.Checkbox(
                        label="Leave out characters and words that the model does not know", elem_id="drop"
                    )
                memory = gr.Checkbox(label="Energy: bill moving data through memory too", elem_id="memory")
            with gr.Column(scale=3, min_width=320):
                text = gr.Textbox(label="Text", lines=7, max_lines=16, interactive=False, elem_id="text")
                figures = gr.Markdown(elem_id="figures")
                with gr.Tabs():
                    with gr.Tab("Predictions"):
                        heatmap = _image("Probabilities of the next token", "heatmap")
                    with gr.Tab("Spikes"):
                        silent = gr.Markdown(elem_id="silent")
                        layer = gr.Dropdown([], label="Layer", visible=False, elem_id="layer")
                        view = gr.Radio(VIEWS, value=VIEWS[0], label="Picture", elem_id="view")
                        raster = _image("Of this layer, or of its block", "raster")
                        rates = _image("How often each layer fires", "rates")
                    with gr.Tab("Energy"):
                        bars = _image("Estimated energy per token", "energy")
                        note = gr.Markdown(elem_id="energy-note")
                    with gr.Tab("Loss"):
                        unknown = gr.Markdown(elem_id="no-curves")
                        curves = _image("Loss while it was trained", "curves")
        with gr.Accordion("Compare models on this prompt", open=False, elem_id="compare-panel"):
            several = gr.Dropdown(
                [],
                label=f"Models, up to {MOST_COMPARED}",
                multiselect=True,
                max_choices=MOST_COMPARED,
                elem_id="models",
            )
            side_by_side = gr.Button("Write with each", elem_id="compare")
            texts = gr.HTML(elem_id="texts")
            together = _image("Estimated energy per token", "compare-energy")

        how = [count, heat, top_k, seed, drop]
        lists = [checkpoint, offer, offered]
        page.load(told(do.begin), None, [tokens, kind, *lists, several], show_progress="hidden")
        for control in (tokens, kind):
            control.input(told(do.choices), [tokens, kind, checkpoint], lists, show_progress="hidden")
        checkpoint.change(told(do.about), checkpoint, about, show_progress="hidden")
        checkpoint.change(told(do.curves), checkpoint, [curves, unknown], show_progress="hidden")
        gr.on(
            [start.click, prompt.submit],
            told(do.write),
            [session, checkpoint, prompt, memory, view, *how],
            [session, text, figures, heatmap, layer, raster, rates, silent, bars, note],
            show_progress="minimal",
        )
        stop.click(do.stop, session, session, show_progress="hidden", queue=False)
        chosen = [session, view, layer]  # a choice made while the last one is being drawn must not be lost
        gr.on([view.input, layer.input], told(do.layer), chosen, raster, trigger_mode="always_last")
        memory.input(told(do.energy), [session, memory], bars)
        memory.input(told(do.energy_note), [session, memory], note, show_progress="hidden")
        train.click(
            told_with_progress(do.train),
            [tokens, kind, steps],
            [*lists, several, trained],
            show_progress_on=[trained],
        )
        stop_training.click(training.stop_training, None, None, show_progress="hidden", queue=False)
        several.focus(told(do.comparable), None, several, show_progress="hidden")
        side_by_side.click(
            told(do.compare),
            [session, several, prompt, memory, *how],
            [session, texts, together],
            show_progress="minimal",
        )
    return page


def _image(label: str, name: str) -> Any:
    return gr.Image(label=label, interactive=False, elem_id=name, elem_classes="picture", type="pil")


def look() -> dict[str, Any]:
    """Theme and style; no font is fetched from elsewhere."""
    fonts = ["system-ui", "sans-serif"]
    return {"css": CSS, "theme": gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"])}


def _style(where: Any) -> dict[str, Any]:
    """The part of `look` that `where` takes: Blocks takes it in Gradio 5, launch in Gradio 6."""
    names = inspect.signature(where).parameters
    return {name: value for name, value in look().items() if name in names}


def launch_style(page: Any) -> dict[str, Any]:
    return _style(page.launch)
