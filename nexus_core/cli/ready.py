"""What the process of a run imports sooner or later: imported once, before it is forked."""

import torch._dynamo  # noqa: F401  by the first optimizer: a second of work

import nexus_core.cli.launch  # noqa: F401
