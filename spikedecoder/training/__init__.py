"""Training: from a corpus to checkpoints."""

from spikedecoder.presets import TRAIN_PRESETS
from spikedecoder.training.config import TrainConfig
from spikedecoder.training.evaluate import Evaluation, evaluate, health
from spikedecoder.training.loop import train
from spikedecoder.training.report import Reporter, ScreenReporter
from spikedecoder.training.result import SavingError, TrainingError, TrainResult
from spikedecoder.training.run_folder import RunInfo, free_folder

__all__ = [
    "TRAIN_PRESETS",
    "Evaluation",
    "Reporter",
    "RunInfo",
    "SavingError",
    "ScreenReporter",
    "TrainConfig",
    "TrainResult",
    "TrainingError",
    "evaluate",
    "free_folder",
    "health",
    "train",
]
