"""Mixed precision on the accelerator, with CUDA's lists of operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["register_autocast"]

LOW = (
    *("matmul", "mm", "bmm", "mv", "addmm", "addmv", "addbmm", "baddbmm", "addr", "linear"),
    *("chain_matmul", "linalg_multi_dot", "linalg_vecdot", "prelu", "scaled_dot_product_attention"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "_convolution", "convolution"),
)
"""Operations in the low precision."""
FULL = (
    *("acos", "asin", "cosh", "sinh", "tan", "erfinv", "exp", "expm1", "log", "log10", "log1p"),
    *("log2", "reciprocal", "rsqrt", "softplus", "layer_norm", "native_layer_norm", "group_norm"),
    *("cosine_similarity", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "cross_entropy_loss"),
    *("l1_loss", "mse_loss", "smooth_l1_loss", "huber_loss", "kl_div", "margin_ranking_loss"),
    *("hinge_embedding_loss", "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss"),
    *("poisson_nll_loss", "binary_cross_entropy_with_logits", "dist", "cdist", "pdist", "renorm"),
    *("logsumexp", "rms_norm", "bernoulli"),
)
"""Operations in float32, whatever the dtypes of their inputs."""
FULL_OUT = ("softmax.int", "log_softmax.int", "cumprod", "cumsum", "prod", "prod.dim_int", "sum",
            "sum.dim_IntList", "norm.Scalar", "norm.ScalarOpt_dim", "pow.Tensor_Scalar",
            "pow.Tensor_Tensor", "pow.Scalar", "logcumsumexp")  # fmt: skip
"""Also in float32; CUDA does this through the dtype of the output."""
WIDEST = ("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler",
          "index_put", "scatter_add", "tensordot", "cat", "stack")  # fmt: skip
"""Operations in the widest dtype among their inputs."""

Library: Any = torch.library.Library
_KEYS: Any = torch._C.DispatchKey
_KEY = torch._C.DispatchKeySet(_KEYS.AutocastPrivateUse1)


def register_autocast(name: str) -> Any:
    """Make `torch.autocast(name)` act on the operations above while the result is referenced."""
    library: Any = Library("aten", "IMPL")
    for names, dtype in (
        (LOW, lambda _: torch.get_autocast_dtype(name)),
        (FULL + FULL_OUT, lambda _: torch.float32),
        (WIDEST, _widest),
    ):
        for op in names:
            packet, _, overload = op.partition(".")
            call = getattr(getattr(torch.ops.aten, packet), overload or "default")
            library.impl(op, _casting(call, name, dtype), "AutocastPrivateUse1")
    return library


def _casting(
    call: Callable[..., Any], name: str, dtype: Callable[[Any], torch.dtype]
) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_KEY):
            wanted = dtype(args)
            return call(*_cast(args, wanted, name), **_cast(kwargs, wanted, name))

    return kernel


def _cast(value: Any, dtype: torch.dtype, name: str) -> Any:
    if isinstance(value, Tensor):
        wide = value.dtype == torch.float64
        moves = value.is_floating_point() and value.device.type == name and not wide
        return value.to(dtype) if moves else value
    if isinstance(value, list | tuple):
        return type(value)(_cast(part, dtype, name) for part in value)
    if isinstance(value, dict):
        return {key: _cast(part, dtype, name) for key, part in value.items()}
    return value


def _widest(args: Any) -> torch.dtype:
    flat = [t for a in args for t in (a if isinstance(a, list | tuple) else [a])]
    kinds = {t.dtype for t in flat if isinstance(t, Tensor) and t.is_floating_point()}
    return torch.float32 if torch.float32 in kinds else next(iter(kinds), torch.float32)
