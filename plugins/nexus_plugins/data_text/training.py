"""Train a tokenizer on text."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nexus_core.errors import DataError
from nexus_plugins._shared.cache import writing
from nexus_plugins.data_text.formats import Reading, is_text, read_slice, slices_of
from nexus_plugins.data_text.load import load_tokenizer
from nexus_plugins.data_text.tokenizer import Tokenizer

__all__ = ["train_tokenizer"]

_EOS, _PAD = "<|endoftext|>", "<|pad|>"


def train_tokenizer(paths: Sequence[Path], out: Path, size: int, reading: Reading) -> Tokenizer:
    """Train byte-level BPE, lossless for any text, and write it as a tokenizer.json.

    Args:
        paths: text files.
        out: the file to write.
        size: vocabulary size, including `<|endoftext|>` and `<|pad|>`.
        reading: how documents are read from the files.

    Raises:
        DataError: a file cannot be used, or the package `tokenizers` is missing.

    Source: Sennrich, Haddow and Birch 2016, over bytes as in Radford et al. 2019.
    """
    try:
        from tokenizers import Tokenizer as Implementation
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise DataError(
            "training a tokenizer needs the package tokenizers; install it with: "
            "pip install 'nexus-trainer[tokenizers]'"
        ) from error
    tokenizer = Implementation(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[_EOS, _PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(_texts(paths, reading), trainer)
    with writing(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f"{out.name}.tmp")
        tokenizer.save(str(temporary))
        temporary.replace(out)
    return load_tokenizer(str(out))


def _texts(paths: Sequence[Path], reading: Reading) -> Iterator[list[str]]:
    for path in paths:
        if not is_text(path, reading.as_text):
            raise DataError(f"{path} has ids, not text; a tokenizer is trained on text")
        for part in slices_of(path, reading):
            for portion in read_slice(part, reading):
                yield [text.decode() for text in portion.texts]
