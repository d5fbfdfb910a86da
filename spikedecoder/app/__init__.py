"""The app: text, spikes and energy of trained models in a browser. Needs Gradio (the extra "app").

from spikedecoder.app import launch
launch(["runs"], port=7860)
"""

from spikedecoder.app.server import launch

__all__ = ["launch"]
