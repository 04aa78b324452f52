"""Share a model's buffers between ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_core.errors import ConfigError

__all__ = ["share_buffers"]


def share_buffers(model: nn.Module) -> None:
    """Broadcast the model's buffers from rank 0, whatever their dtype.

    Raises:
        ConfigError: a buffer is sparse, so it cannot be sent.
    """
    sent = []
    for name, buffer in model.named_buffers():
        _check_dense(name, buffer)
        values = buffer.detach().contiguous().as_strided((buffer.numel(),), (1,))
        sent.append((dist.broadcast(values.view(torch.uint8), 0, async_op=True), buffer, values))
    for work, buffer, values in sent:
        work.wait()
        if values.data_ptr() != buffer.data_ptr():
            once = tuple(slice(0, 1) if step == 0 else slice(None) for step in buffer.stride())
            buffer.detach()[once].copy_(values.view_as(buffer)[once])


def _check_dense(name: str, buffer: Tensor) -> None:
    kind = str(buffer.layout).removeprefix("torch.")
    kind = "quantized" if buffer.is_quantized else "nested" if buffer.is_nested else kind
    if kind != "strided":
        raise ConfigError(
            f"the model's buffer '{name}' is {kind}, which cannot be broadcast; register it as "
            "a dense tensor, create it where it is used, or train in one process"
        )
