"""Documents in Parquet files: one per row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nexus_core.errors import DataError
from nexus_plugins._shared.paths import printable
from nexus_plugins.data_text.formats import Portion, Reading, Slice, package

__all__ = ["parquet_slices", "read_parquet"]

_ROWS, _BYTES = 4096, 32 << 20  # read at a time, at most
_METADATA = "metadata"
_TEXT = {"string", "large_string", "string_view", "binary", "large_binary", "binary_view"}


def parquet_slices(path: Path) -> list[Slice]:
    """The row groups of a file."""
    with _opened(str(path)) as file:
        groups = file.metadata.num_row_groups
    size = path.stat().st_size // max(1, groups)
    return [Slice(str(path), group, group + 1, size) for group in range(groups)]


def read_parquet(part: Slice, reading: Reading) -> Iterator[Portion]:
    """The documents of some row groups.

    Raises:
        DataError: the file is damaged, or does not have the text column.
    """
    with _opened(part.path) as file:
        columns = _columns(file.schema_arrow, part.path, reading.text_key)
        before = sum(file.metadata.row_group(group).num_rows for group in range(part.first))
        groups, number = list(range(part.first, part.last)), 0
        for rows in file.iter_batches(_rows_at_once(file, groups), groups, columns):
            yield _take_rows(rows, reading, number, before, part.path)
            number += rows.num_rows


def _rows_at_once(file: Any, groups: list[int]) -> int:
    """Rows per batch, so that a batch takes some megabytes even if each row is a book."""
    about = [file.metadata.row_group(group) for group in groups]
    size = max(1, sum(int(group.total_byte_size) for group in about))
    return max(1, min(_ROWS, _BYTES * sum(int(group.num_rows) for group in about) // size))


@contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Open the file; any error of the package about its content means a damaged file."""
    arrow = package("pyarrow", path, "parquet")
    parquet = package("pyarrow.parquet", path, "parquet")
    try:
        file = parquet.ParquetFile(path)
    except _faults(arrow) as error:
        raise DataError(
            f"{path} is not a readable .parquet file: {_short(error)}; write it again"
        ) from error
    with file:
        try:
            yield file
        except _faults(arrow) as error:
            raise DataError(f"{path} is damaged: {_short(error)}; write it again") from error


def _faults(arrow: Any) -> tuple[type[BaseException], ...]:
    return (arrow.ArrowException, OSError, ValueError, OverflowError, IndexError, MemoryError)


def _short(error: BaseException) -> str:
    return printable(str(error).strip().partition("\n")[0]) or type(error).__name__


def _columns(schema: Any, path: str, key: str) -> list[str]:
    names = list(schema.names)
    if key not in names:
        raise DataError(
            f"{path} has no column '{key}', only {', '.join(map(repr, names)) or 'none'}; set "
            "data_text.text_key (--text-key) to the column of the text"
        )
    wanted = [key, _METADATA] if _METADATA in names and key != _METADATA else [key]
    twice = next((name for name in wanted if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(
            f"{path} has {names.count(twice)} columns called '{twice}', which is "
            "ambiguous; rename them when you write the file"
        )
    kind = schema.field(key).type
    stored = str(getattr(kind, "value_type", kind)) if str(kind).startswith("dictionary") else kind
    if str(stored) not in _TEXT:
        raise DataError(f"{path}: column '{key}' has type {kind}; expected strings")
    return wanted


def _take_rows(rows: Any, reading: Reading, number: int, before: int, path: str) -> Portion:
    portion = Portion()
    texts = _bytes_of(rows.column(reading.text_key))
    metadata: list[Any] = [None] * len(texts)
    if _METADATA in rows.schema.names and reading.text_key != _METADATA:
        metadata = _metadata_of(rows.column(_METADATA), path)
    for offset, (raw, extra) in enumerate(zip(texts, metadata, strict=True)):
        where = f"{path}, row {before + number + offset + 1}"
        if raw is None:
            raise DataError(f"{where}: '{reading.text_key}' is null; expected a string")
        portion.add(number + offset, raw, reading.invalid_utf8, lambda at=where: at, extra)  # type: ignore[misc]
    return portion


def _bytes_of(column: Any) -> list[bytes | None]:
    plain = column.dictionary_decode() if hasattr(column, "dictionary_decode") else column
    if str(plain.type).endswith("_view"):
        plain = plain.cast("large_string" if "string" in str(plain.type) else "large_binary")
    found: list[bytes | None] = plain.cast("large_binary").to_pylist()
    return found


def _metadata_of(column: Any, path: str) -> list[Any]:
    """As Python values; times that Python cannot represent, such as nanoseconds, as text."""
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):
        pass
    arrow = package("pyarrow", path, "parquet")
    try:
        return list(column.cast(_without_times(arrow, column.type)).to_pylist())
    except (arrow.ArrowException, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: column '{_METADATA}' of type {column.type} cannot be read "
            f"({_short(error)}); write the file without it, or with strings"
        ) from error


def _without_times(arrow: Any, kind: Any) -> Any:
    types = arrow.types
    if types.is_temporal(kind):
        return arrow.string()
    if types.is_struct(kind):
        fields = [kind.field(number) for number in range(kind.num_fields)]
        return arrow.struct([(one.name, _without_times(arrow, one.type)) for one in fields])
    if types.is_list(kind) or types.is_large_list(kind):
        return arrow.list_(_without_times(arrow, kind.value_type))
    return kind
