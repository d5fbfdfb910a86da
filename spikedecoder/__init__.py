"""Train and run GPT-style language models whose every activation is a spike."""

__version__ = "0.1.0"
