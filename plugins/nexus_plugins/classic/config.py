"""One config object with every setting of a run, translated to plugins."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from nexus_core import Plugin, PluginConfig
from nexus_core.plan import load

__all__ = ["TrainingConfig"]

TERMS = ("lm", "world", "reason", "energy", "causal")
OF_TWO_KINDS = ("world", "reason", "energy", "causal")
"""Terms with a classic formula as an alternative to the default one."""


class TrainingConfig(PluginConfig):
    """All settings for training a NEXUS model; a weight of 0 disables its loss."""

    vocab_size: int = Field(default=32_000, ge=1, description="vocabulary size")
    d_model: int = Field(default=256, ge=1, description="width of the model")
    ssm_n_layers: int = Field(default=6, ge=1, description="state-space layers of the model")
    classic: bool = Field(default=True, description="use the classic modules and their losses")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout after each layer")
    learning_rate: float = Field(default=1e-4, gt=0, description="peak learning rate")
    min_learning_rate: float = Field(default=1e-5, ge=0, description="learning rate at the end")
    lr_decay: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="decay shape"
    )
    warmup_steps: int = Field(default=1000, ge=0, description="warmup steps")
    max_steps: int = Field(default=100_000, ge=1, description="total optimizer steps")
    weight_decay: float = Field(
        default=0.01, ge=0, description="decoupled weight decay of matrices"
    )
    betas: tuple[float, float] = Field(
        default=(0.9, 0.95), description="decay rates of AdamW's running means"
    )
    eps: float = Field(default=1e-8, gt=0, description="AdamW: term added to the denominator")
    batch_size: int = Field(default=32, ge=1, description="rows per micro-batch")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="micro-batches per step")
    max_seq_length: int = Field(default=2048, ge=1, description="maximum tokens per row")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="maximum gradient norm (L2); 0: no clipping"
    )
    label_smoothing: float = Field(
        default=0.1, ge=0, lt=1, description="label smoothing of the cross-entropy, in training"
    )
    lm_loss_weight: float = Field(default=1.0, ge=0, description="weight of the cross-entropy")
    world_loss_weight: float = Field(
        default=0.1, ge=0, description="weight of the world model's loss"
    )
    reason_loss_weight: float = Field(
        default=0.05, ge=0, description="weight of the reasoner's loss"
    )
    energy_loss_weight: float = Field(default=0.05, ge=0, description="weight of the energy loss")
    causal_loss_weight: float = Field(default=0.05, ge=0, description="weight of the causal loss")
    save_steps: int = Field(default=1000, ge=1, description="steps between checkpoints")
    save_total_limit: int = Field(
        default=5, ge=1, description="number of newest checkpoints to keep"
    )
    output_dir: str = Field(default="runs/classic", description="folder of checkpoints and metrics")
    eval_steps: int = Field(default=1000, ge=1, description="steps between evaluations")
    eval_batch_size: int = Field(default=32, ge=1, description="rows per evaluation batch")
    log_steps: int = Field(default=10, ge=1, description="steps between logs")
    wandb_project: str | None = Field(
        default=None, description="Weights & Biases project; None: no logging"
    )
    device: str = Field(
        default="auto", description='"cpu", "cuda:0", ...; "auto": the best available'
    )
    fp16: bool = Field(default=False, description="train in fp16 with loss scaling")
    compile: bool = Field(default=False, description="compile the model")
    num_workers: int = Field(default=0, ge=0, description="worker processes that prefetch")
    seed: int = Field(default=0, description="seed of weights, data order and noise")

    def model_settings(self) -> dict[str, Any]:
        """The sizes of the model and the kind of its modules, by their names in `NEXUSConfig`."""
        named = {"vocab_size", "d_model", "ssm_n_layers", "dropout", "classic"}
        return self.model_dump(include=named)

    def plugins(self) -> list[Plugin[Any]]:
        """The plugins that implement the settings.

        Raises:
            PluginError: one of them is not installed.
        """
        floor = {} if self.lr_decay == "constant" else {"min_lr": self.min_learning_rate}
        chosen: dict[str, dict[str, Any]] = {
            "model_nexus": self.model_settings(),
            "optim_adamw": {
                "lr": self.learning_rate,
                "betas": self.betas,
                "eps": self.eps,
                "weight_decay": self.weight_decay,
            },
            f"lr_{self.lr_decay}": {"warmup": f"{self.warmup_steps} steps", **floor},
            "checkpoint": {"every": self.save_steps, "keep_last": self.save_total_limit},
            "console": {},
            "jsonl": {},
            "throughput": {},
        }
        for term in TERMS:
            if weight := getattr(self, f"{term}_loss_weight"):
                chosen[f"loss_{term}"] = {"weight": weight}
        for term in OF_TWO_KINDS:
            if f"loss_{term}" in chosen:
                chosen[f"loss_{term}"]["classic"] = self.classic
        if "loss_lm" in chosen:
            chosen["loss_lm"]["label_smoothing"] = self.label_smoothing
        if self.max_grad_norm:
            chosen["clip"] = {"max_norm": self.max_grad_norm}
        if self.wandb_project is not None:
            chosen["wandb"] = {"project": self.wandb_project}
        if self.fp16:
            chosen["amp"] = {"dtype": "fp16"}
        if self.compile:
            chosen["compile"] = {}
        return [load(name)(**settings) for name, settings in chosen.items()]
