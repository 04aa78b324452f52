"""prepare.json: the record that `nexus-data prepare` writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_core.errors import DataError
from nexus_plugins._shared.paths import reason

__all__ = ["RECORD", "Record"]

RECORD = "prepare.json"
_COUNTS = {"train.bin": "train_tokens", "val.bin": "valid_tokens"}

_LOSS = ("compared", "altered", "lost_bytes")


@dataclass(frozen=True)
class Record:
    """What a folder of prepared data was made from, and the outcome.

    Args:
        fingerprint: hash of the input and settings.
        files: `(path, documents)` of each input file.
        summary: see `Summary`.
        checksums: CRC-32 of each id file.
    """

    fingerprint: str
    files: tuple[tuple[str, int], ...]
    summary: dict[str, Any]
    checksums: dict[str, int]

    @classmethod
    def beside(cls, folder: Path) -> Record | None:
        """The record in a folder, or None if it has no record.

        Raises:
            DataError: it cannot be read.
        """
        path = folder / RECORD
        try:
            found = json.loads(path.read_bytes())
            files = tuple((str(name), int(count)) for name, count in found["files"])
            checksums = {str(name): int(crc) for name, crc in found.get("checksums", {}).items()}
            return cls(str(found["fingerprint"]), files, dict(found["summary"]), checksums)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DataError(f"cannot read {path}: {reason(error)}") from error
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            OverflowError,
        ) as error:
            raise DataError(
                f"{path} is damaged ({error!r:.100}); remove it, or rebuild the data with: "
                "nexus-data prepare"
            ) from error

    @property
    def loss(self) -> dict[str, int]:
        """What the tokenizer lost of the text: see `Summary`."""
        counts = ((name, self.summary.get(name, 0)) for name in _LOSS)
        return {name: count if isinstance(count, int) else 0 for name, count in counts}

    def tokens(self, name: str) -> int | None:
        """The token count of a file next to it; None if not recorded."""
        count = self.summary.get(_COUNTS.get(name, ""))
        return count if isinstance(count, int) and count > 0 else None
