"""Text and images, as stored in JSON and as shown by wandb."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

import PIL.Image
import wandb

from nexus_core.images import Image

__all__ = ["as_image", "as_text", "shown", "title_of"]

TEXT, IMAGE = "/text", "/image"  # suffixes, since a title may equal a metric's name
_PAGE = '<pre style="white-space: pre-wrap; font-family: inherit">{}</pre>'


def as_text(title: str, text: str) -> dict[str, Any]:
    """Text, by its name in wandb."""
    return {title + TEXT: {"text": text}}


def as_image(title: str, image: Image) -> dict[str, Any]:
    """An image, by its name in wandb."""
    png = base64.b64encode(image.png).decode()
    return {title + IMAGE: {"png": png, "caption": image.caption}}


def title_of(name: str) -> str:
    """The title of a note, given its name in wandb."""
    return name.removesuffix(TEXT).removesuffix(IMAGE)


def shown(value: Any) -> Any:
    """A metric unchanged, and text and images as wandb's panel types."""
    if not isinstance(value, dict):
        return value
    if "text" in value:
        return wandb.Html(_PAGE.format(html.escape(value["text"])), data_is_not_path=True)
    png = io.BytesIO(base64.b64decode(value["png"]))
    return wandb.Image(PIL.Image.open(png), caption=value["caption"] or None)
