"""Option types that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["PATH"]


class _Path(click.ParamType):  # type: ignore[type-arg]
    """A path, with `~` and variables expanded; a shell leaves them in `--out=~/runs`."""

    name = "path"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path:
        from nexus_core.paths import expanded  # needs pydantic, which is slow to import

        try:
            return Path(expanded(str(value)))
        except ValueError as error:
            self.fail(str(error), param, ctx)


PATH = _Path()
