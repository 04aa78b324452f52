"""Run lm-evaluation-harness tasks at each evaluation."""

from nexus_plugins_contrib.eval_harness.plugin import EvalHarnessConfig, EvalHarnessPlugin

__all__ = ["EvalHarnessConfig", "EvalHarnessPlugin"]
