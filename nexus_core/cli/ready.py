"""Modules that every run imports: imported once, before forking."""

import torch._dynamo  # noqa: F401  the first optimizer imports it: takes a second

import nexus_core.cli.launch  # noqa: F401
