"""Documents of token ids as rows, batches and loaders."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nexus_core import DataError, ResumableLoader
from nexus_plugins.classic.config import TrainingConfig

__all__ = ["NEXUSCollator", "NEXUSDataset", "create_dataloader"]

IGNORED = -100  # the label that the losses ignore


class NEXUSDataset:
    """Rows of at most `max_seq_length` tokens, each with the token that follows it as label.

    A longer document is split into several rows, so that every token but the first is a label once.

    Args:
        documents: token ids of each document, at least two; bytes of text also work.
        max_seq_length: maximum tokens in a row.

    Raises:
        DataError: there is no document, or one is too short to have a label.
    """

    def __init__(self, documents: Sequence[Sequence[int]], max_seq_length: int) -> None:
        lengths = np.array([len(document) for document in documents], dtype=np.int64)
        if not len(lengths) or lengths.min() < 2:
            found = f"number {lengths.argmin()} has {lengths.min()}" if len(lengths) else "none"
            raise DataError(f"every document needs at least two tokens; found {found}")
        self.documents = documents
        self.max_seq_length = max_seq_length
        self._ends = (-(-(lengths - 1) // max_seq_length)).cumsum()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        number = int(self._ends.searchsorted(row, "right"))
        document = self.documents[number]
        first = (row - (int(self._ends[number - 1]) if number else 0)) * self.max_seq_length
        tokens = torch.tensor(list(document[first : first + self.max_seq_length + 1]))
        return {"input_ids": tokens[:-1], "labels": tokens[1:]}


class NEXUSCollator:
    """Collates rows into a batch, right-padded to the longest; no loss counts padding.

    Args:
        pad_id: the padding token; it is never an input to a prediction nor a label.
    """

    def __init__(self, pad_id: int = 0) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The batch: `input_ids` and `labels`, both `(rows, longest row)` int64."""
        return {
            "input_ids": _filled([row["input_ids"] for row in rows], self.pad_id),
            "labels": _filled([row["labels"] for row in rows], IGNORED),
        }


def create_dataloader(
    documents: Sequence[Sequence[int]] | NEXUSDataset, config: TrainingConfig, train: bool = True
) -> ResumableLoader:
    """Batches of the documents: reshuffled each epoch for training, in order for evaluation.

    Args:
        documents: token ids of each document, or a `NEXUSDataset`.
        config: provides the batch sizes, `max_seq_length`, `num_workers` and `seed`.
        train: whether the loader is for training.
    """
    if not isinstance(documents, NEXUSDataset):
        documents = NEXUSDataset(documents, config.max_seq_length)
    return ResumableLoader(
        documents,
        config.batch_size if train else config.eval_batch_size,
        config.seed,
        shuffle=train,
        collate=NEXUSCollator(),
        num_workers=config.num_workers,
    )


def _filled(rows: list[Tensor], value: int) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)
