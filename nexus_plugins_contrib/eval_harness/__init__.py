"""Tasks of lm-evaluation-harness on the model of a run, at its evaluations."""

from nexus_plugins_contrib.eval_harness.plugin import EvalHarnessConfig, EvalHarnessPlugin

__all__ = ["EvalHarnessConfig", "EvalHarnessPlugin"]
