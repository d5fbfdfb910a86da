"""Search for settings: trials over any fields of the model or the training, kept in one SQLite study.

search = Search.from_dict(tomllib.loads(text))
result = sweep(search, out="runs/sweep", texts=["book.txt"], jobs=2)
result.best["bits"], result.best_file

Optuna is imported when a sweep starts; if it is missing, a ValueError says how to install it.
"""

from spikedecoder.sweep.run import SweepResult, sweep
from spikedecoder.sweep.space import Dimension, Search

__all__ = ["Dimension", "Search", "SweepResult", "sweep"]
