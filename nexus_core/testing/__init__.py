"""A test kit for plugin authors: a contract of checks, and a tiny model and data to run them on.

    class TestSparkle(PluginContract):
        plugin = "sparkle"
        configs = ({}, {"strength": 2.0})

See docs/testing.md. pytest collects the checks of such a class; the kit works without pytest too.
"""

from nexus_core.testing.accelerator import HostAccelerator, Wait, host_accelerator
from nexus_core.testing.contract import PluginContract
from nexus_core.testing.distribution import fake_distribution
from nexus_core.testing.probes import example_config
from nexus_core.testing.report import Outcome, run_contract
from nexus_core.testing.tiny import (
    Parts,
    TinyModel,
    tiny_data,
    tiny_engine,
    tiny_losses,
    tiny_model,
    tiny_optimizer,
)

__all__ = [
    "HostAccelerator",
    "Outcome",
    "Parts",
    "PluginContract",
    "TinyModel",
    "Wait",
    "example_config",
    "fake_distribution",
    "host_accelerator",
    "run_contract",
    "tiny_data",
    "tiny_engine",
    "tiny_losses",
    "tiny_model",
    "tiny_optimizer",
]
