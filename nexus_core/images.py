"""Images from tensors, arrays, figures and files, and the notes that contain them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nexus_core.errors import ConfigError

if TYPE_CHECKING:
    import PIL.Image

__all__ = ["Image", "Listeners", "packed", "tell", "unpacked"]

CHANNELS = (1, 3, 4)
_EXPECTED = (
    "a tensor or array (height, width), (channels, height, width) or (height, width, channels) "
    "with 1, 3 or 4 channels, an image of Pillow, or the path of a PNG file"
)


@dataclass(frozen=True)
class Image:
    """An image as loggers receive it.

    Args:
        png: content of a PNG file.
        width: width in pixels.
        height: height in pixels.
        caption: a short caption; may be empty.
    """

    png: bytes = field(repr=False)
    width: int
    height: int
    caption: str = ""

    @classmethod
    def of(cls, given: object, caption: str = "") -> Image:
        """Convert an object to an image.

        Args:
            given: a matplotlib figure, or any object with a method `savefig`; a Pillow image; the
                path of a PNG file; a tensor or array of bytes, booleans, or floats from 0 to 1.
                With three dimensions, the channels are first or last, of size 1, 3 or 4; if both
                fit, they are first in a tensor and last in an array.
            caption: a short caption.

        Raises:
            ConfigError: the object is not an image.
        """
        if hasattr(given, "savefig"):
            buffer = io.BytesIO()
            given.savefig(buffer, format="png")
            return cls(buffer.getvalue(), *_opened(buffer, "what savefig wrote").size, caption)
        if isinstance(given, str | Path):
            return cls._written(_opened(Path(given).expanduser(), str(given)), caption)
        if isinstance(given, Tensor | np.ndarray):
            return cls._written(_drawn(given), caption)
        if callable(getattr(given, "convert", None)) and hasattr(given, "mode"):
            return cls._written(cast("PIL.Image.Image", given), caption)
        raise ConfigError(f"no image: {given!r:.80}; expected {_EXPECTED}")

    @classmethod
    def _written(cls, image: PIL.Image.Image, caption: str) -> Image:
        if image.mode[0] in "IF":
            raise ConfigError(
                f"no image: numbers of the mode {image.mode}; expected bytes (0 to 255) for each "
                "channel; scale a 16-bit image, and convert it"
            )
        kept = image if image.mode in ("1", "L", "LA", "RGB", "RGBA") else image.convert("RGBA")
        buffer = io.BytesIO()
        kept.save(buffer, "PNG")
        return cls(buffer.getvalue(), kept.width, kept.height, caption)

    def opened(self) -> PIL.Image.Image:
        """The image as a Pillow image."""
        return _opened(io.BytesIO(self.png), "the image")


def _opened(file: Path | io.BytesIO, name: str) -> PIL.Image.Image:
    import PIL.Image

    try:
        with PIL.Image.open(file, formats=["PNG"]) as image:
            image.load()
            return image
    except FileNotFoundError:
        raise ConfigError(f"no image: there is no file '{name}'") from None
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise ConfigError(f"no image: '{name}' is not a readable PNG file ({error})") from error


def _drawn(given: Tensor | NDArray[Any]) -> PIL.Image.Image:
    import PIL.Image

    is_tensor, values = isinstance(given, Tensor), given
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    places = [place for place in (0, -1) if values.ndim == 3 and values.shape[place] in CHANNELS]
    shape = f"{'x'.join(map(str, values.shape)) or 'no'} numbers of {given.dtype}"
    if not values.size or not (values.ndim == 2 or places):
        raise ConfigError(f"no image: {shape}; expected {_EXPECTED}")
    if values.ndim == 3 and places[0 if is_tensor else -1] == 0:
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    return PIL.Image.fromarray(np.ascontiguousarray(_bytes_of(values, shape)))


def _bytes_of(values: NDArray[Any], what: str) -> NDArray[np.uint8]:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if not np.issubdtype(values.dtype, np.floating):
        raise ConfigError(
            f"no image: {what}; expected bytes (0 to 255, .to(torch.uint8)) or floats from 0 to 1"
        )
    low, high = values.min(), values.max()
    if not (low >= -0.01 and high <= 1.01):  # tolerates overshoot of interpolation
        warnings.warn(
            f"floats of an image must be from 0 to 1, and these are from {low:.4g} to {high:.4g}: "
            "they are clipped, and NaN becomes 0; scale them first",
            RuntimeWarning,
            stacklevel=2,
        )
    whole = np.nan_to_num(values.astype(np.float32), nan=0.0)
    return (whole.clip(0, 1) * 255).round().astype(np.uint8)


class Listeners(Protocol):
    """The hooks that receive notes."""

    def on_note(self, *, engine: Any, title: str, text: str) -> object: ...
    def on_image(self, *, engine: Any, title: str, image: Image) -> object: ...


def tell(
    hook: Listeners, engine: object, title: str, text: str, image: object, figure: object
) -> None:
    """Send a note to the plugins: text, or an image or figure with the text as its caption.

    Raises:
        ConfigError: the note is empty or invalid.
    """
    if not isinstance(title, str) or not title.strip() or "\n" in title:
        raise ConfigError(f"the title of a note is {title!r:.80}; expected a name, as metrics have")
    if not isinstance(text, str):
        raise ConfigError(
            f"the text of the note '{title}' is a {type(text).__name__}; expected a string, or "
            "image=... or figure=..."
        )
    if image is not None and figure is not None:
        raise ConfigError(f"the note '{title}' has an image and a figure; make two notes of them")
    shown = figure if image is None else image
    if shown is None and not text:
        raise ConfigError(f"the note '{title}' is empty; give it a text, image=... or figure=...")
    if shown is None:
        hook.on_note(engine=engine, title=title, text=text)
    else:
        hook.on_image(engine=engine, title=title, image=Image.of(shown, text))


def packed(line: Mapping[str, float | str | Image]) -> dict[str, Any]:
    """Metrics, text and images by name, in a form that a state dict can hold."""
    return {name: _of_image(one) if isinstance(one, Image) else one for name, one in line.items()}


def unpacked(line: Mapping[str, Any]) -> dict[str, float | str | Image]:
    """The inverse of `packed`."""
    return {name: _image_of(one) if isinstance(one, list) else one for name, one in line.items()}


def _of_image(image: Image) -> list[Any]:
    png = torch.frombuffer(bytearray(image.png), dtype=torch.uint8)
    return [png, image.width, image.height, image.caption]


def _image_of(parts: list[Any]) -> Image:
    return Image(parts[0].cpu().numpy().tobytes(), *parts[1:])
