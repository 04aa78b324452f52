"""The NEXUS model as the model of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field
from torch import nn

from nexus_core.plugin import Plugin, hookimpl
from nexus_plugins.model_nexus.nexus import NEXUSConfig, NEXUSCore, NEXUSOutput

if TYPE_CHECKING:
    from nexus_core.engine import Engine
    from nexus_core.loader import Batch

__all__ = ["ModelNexusConfig", "ModelNexusPlugin"]


class ModelNexusConfig(NEXUSConfig):
    """The sizes of the model, with the vocabulary left to the data unless it is given."""

    vocab_size: int | None = Field(  # type: ignore[assignment]
        None, ge=1, description="tokens that the model knows; null: as many as the data has"
    )


class ModelNexusPlugin(Plugin[ModelNexusConfig]):
    """Trains a `NEXUSCore`, and hands the losses hidden states instead of full logits."""

    slot: ClassVar[str | None] = "model"

    @hookimpl
    def make_model(self, engine: Engine) -> nn.Module:
        """Build the model, with the data's vocabulary where the config names none."""
        settings = self.config.model_dump(exclude_none=True)
        if self.config.vocab_size is None:
            settings["vocab_size"] = engine.data.codec.size
        return NEXUSCore(NEXUSConfig(**settings))

    @hookimpl
    def forward(self, engine: Engine, batch: Batch) -> NEXUSOutput:
        """Run the backbone over `input_ids`, isolated by `segment_ids` where there are any."""
        output: NEXUSOutput = engine.model.hidden(batch["input_ids"], batch.get("segment_ids"))
        return output
