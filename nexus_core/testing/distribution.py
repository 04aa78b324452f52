"""A fake installed distribution, for tests of what is found through package metadata."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["fake_distribution"]


@contextmanager
def fake_distribution(
    name: str,
    plugins: Mapping[str, str] | None = None,
    *,
    modules: Mapping[str, str] | None = None,
    version: str = "1.0",
    entry_points: Mapping[str, Mapping[str, str]] | None = None,
) -> Iterator[Path]:
    """Make a distribution look installed within a `with` block.

    A temporary folder on `sys.path` contains the modules and a real `.dist-info`, so
    `importlib.metadata` finds it, and so does `nexus-plugins list` in this process.

    Args:
        name: name of the distribution.
        plugins: plugin name to `module:Class`, the group `nexus.plugins`.
        modules: module name to source text.
        version: version of the distribution.
        entry_points: further groups, each entry-point name to `module:attribute`.

    Yields:
        The folder. It and its modules are removed after the block.
    """
    groups = {"nexus.plugins": plugins or {}, **(entry_points or {})}
    sources = modules or {}
    with tempfile.TemporaryDirectory(prefix=f"{name}-") as created:
        folder = Path(created)
        for module, source in sources.items():
            (folder / f"{module}.py").write_text(source, encoding="utf-8")
        _write_metadata(folder, name, version, groups, sources)
        hidden = {module: sys.modules.pop(module) for module in sources if module in sys.modules}
        sys.path.insert(0, created)
        importlib.invalidate_caches()
        try:
            yield folder
        finally:
            sys.path.remove(created)
            for module in sources:
                sys.modules.pop(module, None)
            sys.modules.update(hidden)
            importlib.invalidate_caches()


def _write_metadata(
    folder: Path,
    name: str,
    version: str,
    groups: Mapping[str, Mapping[str, str]],
    modules: Mapping[str, str],
) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    lines = [
        line
        for group, entries in groups.items()
        for line in (f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()), "")
    ]
    texts = {"METADATA": metadata, "INSTALLER": "pip\n", "entry_points.txt": "\n".join(lines)}
    for file, text in texts.items():
        (info / file).write_text(text, encoding="utf-8")
    files = [*(f"{module}.py" for module in modules), *(f"{info.name}/{file}" for file in texts)]
    record = "".join(f"{file},,\n" for file in [*files, f"{info.name}/RECORD"])
    (info / "RECORD").write_text(record, encoding="utf-8")
