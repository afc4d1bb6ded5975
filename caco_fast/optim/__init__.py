"""Optimisers and schedules."""

from caco_fast.optim.lars import LARS
from caco_fast.optim.optimizer import OptimizerConfig, build_optimizer, peak_lr
from caco_fast.optim.schedule import Schedule, ScheduleConfig

__all__ = ["LARS", "OptimizerConfig", "Schedule", "ScheduleConfig", "build_optimizer", "peak_lr"]
