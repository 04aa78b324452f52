"""Schedules any number of a run: `plugin` finds and sets it, `course` computes its value."""

from nexus_plugins.schedule.plugin import RuleConfig, ScheduleConfig, SchedulePlugin

__all__ = ["RuleConfig", "ScheduleConfig", "SchedulePlugin"]
