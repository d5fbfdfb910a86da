"""From text to token ids: cleaning, tokenizers, corpora, datasets, and n-gram models as baselines."""

from __future__ import annotations

from ._files import default_cache_dir
from .corpora import (
    CORPORA,
    CorpusSource,
    DownloadError,
    builtin_text,
    download_corpus,
    read_text_files,
    strip_gutenberg_frame,
)
from .dataset import (
    BUILTIN,
    IGNORED,
    TOKENIZER_KINDS,
    Corpus,
    WindowSampler,
    check_context,
    held_out_batches,
    prepare_corpus,
)
from .ngram import NGramModel, ngram_bits
from .text import clean_characters, clean_words, original_dictionary
from .tokenizers import (
    ORIGINAL_ALPHABET,
    CharTokenizer,
    Tokenizer,
    WordTokenizer,
    load_tokenizer,
    tokenizer_from_dict,
)

__all__ = [
    "BUILTIN",
    "CORPORA",
    "IGNORED",
    "ORIGINAL_ALPHABET",
    "TOKENIZER_KINDS",
    "CharTokenizer",
    "Corpus",
    "CorpusSource",
    "DownloadError",
    "NGramModel",
    "Tokenizer",
    "WindowSampler",
    "WordTokenizer",
    "builtin_text",
    "check_context",
    "clean_characters",
    "clean_words",
    "default_cache_dir",
    "download_corpus",
    "held_out_batches",
    "load_tokenizer",
    "ngram_bits",
    "original_dictionary",
    "prepare_corpus",
    "read_text_files",
    "strip_gutenberg_frame",
    "tokenizer_from_dict",
]
