from nexus_core.bases.loader import ResumableLoader as ResumableLoader
from nexus_core.bases.logger import Logger as Logger
from nexus_core.bases.logger import LoggerConfig as LoggerConfig
from nexus_core.bases.loss import Loss as Loss
from nexus_core.bases.loss import LossConfig as LossConfig
from nexus_core.data import Batch as Batch
from nexus_core.data import RunData as RunData
from nexus_core.engine import Engine as Engine
from nexus_core.engine import Result as Result
from nexus_core.errors import CheckpointError as CheckpointError
from nexus_core.errors import ConfigError as ConfigError
from nexus_core.errors import DataError as DataError
from nexus_core.errors import NexusError as NexusError
from nexus_core.errors import PluginError as PluginError
from nexus_core.errors import RunError as RunError
from nexus_core.intervals import Every as Every
from nexus_core.intervals import Interval as Interval
from nexus_core.intervals import IntervalField as IntervalField
from nexus_core.plugin import Plugin as Plugin
from nexus_core.plugin import PluginConfig as PluginConfig
from nexus_core.plugin import hookimpl as hookimpl
from nexus_core.state import Snapshot as Snapshot
from nexus_core.state import StateDict as StateDict
from nexus_core.state import TrainState as TrainState

__all__: list[str]
