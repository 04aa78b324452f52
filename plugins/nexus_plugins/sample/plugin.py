"""Generates text samples at each evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import Field

from nexus_core.errors import ConfigError, hint_set
from nexus_core.plugin import Plugin, PluginConfig, hookimpl
from nexus_core.processes import gather
from nexus_core.signatures import Several
from nexus_plugins._shared.sampling import Sampling
from nexus_plugins.sample.writing import logits_at

if TYPE_CHECKING:
    from nexus_core.batches import Batch
    from nexus_core.engine import Engine

__all__ = ["SampleConfig", "SamplePlugin"]

NOTE = "sample"  # prefix of the note's title, before the name of the set


class SampleConfig(PluginConfig):
    """What the model continues, and how."""

    prompts: Several[str] = Field(
        default=(), description="prompts to continue; none: starts of rows of the evaluation data"
    )
    chat: bool = Field(
        default=False,
        description="send the prompts as user messages, through the data's chat template",
    )
    rows: int = Field(
        default=2, ge=1, description="number of evaluation rows, if there are no prompts"
    )
    prompt_tokens: int = Field(
        default=32, ge=1, description="tokens of each of these rows to use as prompt"
    )
    tokens: int = Field(default=64, ge=1, description="maximum tokens to generate per prompt")
    temperature: float = Field(
        default=0.8, ge=0, description="sampling temperature; 0: always the most likely token"
    )
    top_k: int | None = Field(
        default=None, ge=1, description="sample among this many most likely tokens; null: all"
    )


class SamplePlugin(Plugin[SampleConfig]):
    """Lets the model continue a few texts at each evaluation, for every logger with text support.

    It uses the run's own forward pass and evaluation weights, so it works with any causal token
    model. The same seed each time makes samples of a run comparable. Training is not affected. Each
    token recomputes all positions, so keep `tokens` small.
    """

    config_class = SampleConfig
    api_version: ClassVar[str] = "1.2"
    _done_at: int = -1

    @hookimpl
    def measure(self, engine: Engine, split: str, data: Iterable[Batch]) -> dict[str, float]:
        """Generate once per evaluation, with its first set; ids if the data has no tokenizer.

        Raises:
            ConfigError: there are prompts but no tokenizer, or no chat template.
        """
        if self._done_at == engine.state.step:
            return {}
        self._done_at = engine.state.step
        codec = engine.data.codec if engine.data is not None else None
        # Prompts of rank 0, since a pass with sharded weights involves all ranks.
        prompts = gather(engine.ranks, self._prompts(codec, data))[0]
        stop = getattr(codec, "eos", None)
        written = self._written(engine, prompts, stop)
        texts = [
            f"{_text(codec, prompt)}\n-> {_text(codec, ids)}"
            for prompt, ids in zip(prompts, written, strict=True)
        ]
        engine.hook.on_note(engine=engine, title=f"{NOTE}/{split}", text="\n\n".join(texts))
        return {}

    def _prompts(self, codec: Any, data: Iterable[Batch]) -> list[list[int]]:
        config = self.config
        if config.chat and not config.prompts:
            raise ConfigError(
                "sample.chat needs prompts: ", hint_set("sample.prompts", "[Who are you?]")
            )
        encode = getattr(codec, "encode_question" if config.chat else "encode", None)
        if config.chat and not getattr(codec, "has_chat_template", True):
            encode = None
        if config.prompts and encode is None:
            what = "chat template" if config.chat else "tokenizer"
            raise ConfigError(
                f"sample has prompts, but the data has no {what} for them; remove "
                f"sample.{'chat' if config.chat else 'prompts'}"
            )
        if encode is not None and config.prompts:
            return [encode(prompt) or [0] for prompt in config.prompts]
        batch = next(iter(data))
        side = "" if "input_ids" in batch else "chosen_"
        ids = batch[f"{side}input_ids"][: config.rows, : config.prompt_tokens]
        mask = batch.get(f"{side}attention_mask", torch.ones_like(batch[f"{side}input_ids"]))
        lengths = mask[: config.rows, : config.prompt_tokens].sum(1).clamp_min(1).tolist()
        return [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]

    def _written(
        self, engine: Engine, prompts: Sequence[Sequence[int]], stop: int | None
    ) -> list[list[int]]:
        """The continuation of each prompt, up to a stop token.

        The rows have their final width from the start, so that a compiled model is compiled once; a
        causal model does not see what is ahead of a position.
        """
        ends = [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(ends) + self.config.tokens, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, : ends[row]] = torch.tensor(prompt)
        ids = ids.to(engine.device)
        generator = torch.Generator().manual_seed(engine.seed)
        sampling = Sampling(self.config.temperature, self.config.top_k)
        written: list[list[int]] = [[] for _ in prompts]
        for _ in range(self.config.tokens):
            open_ = [row for row, some in enumerate(written) if not some or some[-1] != stop]
            if not open_:
                break
            output = engine.hook.forward(engine=engine, batch={"input_ids": ids}, step=None)
            last = torch.tensor([end - 1 for end in ends], device=ids.device)
            chosen = sampling.choose(logits_at(output, last).cpu(), generator).tolist()
            for row in open_:
                ids[row, ends[row]] = chosen[row]
                written[row].append(chosen[row])
                ends[row] += 1
        return [some[:-1] if some and some[-1] == stop else some for some in written]


def _text(codec: Any, ids: Sequence[int]) -> str:
    return " ".join(map(str, ids)) if codec is None else str(codec.decode(ids))
