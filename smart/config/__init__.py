"""Configuration: turn a TOML file into a frozen dataclass; errors name the wrong key.

Only programs read the configuration; other modules take plain arguments. There are two schemas: ``Config`` for tuning
and ``PretrainConfig`` for a base model. Nothing in a configuration file is ever executed.
"""

from smart.config.reading import SHIPPED, completed, find, load, shipped
from smart.config.schema import (
    NO_REWARD,
    TRACKERS,
    Architecture,
    Config,
    Data,
    Grpo,
    Guard,
    Model,
    Optimisation,
    PretrainConfig,
    PretrainTrack,
    Prompts,
    Render,
    RewardConfig,
    Run,
    Sampling,
    Track,
    TrainedReward,
)
from smart.config.toml import dumps, to_dict

__all__ = [
    "NO_REWARD",
    "SHIPPED",
    "TRACKERS",
    "Architecture",
    "Config",
    "Data",
    "Grpo",
    "Guard",
    "Model",
    "Optimisation",
    "PretrainConfig",
    "PretrainTrack",
    "Prompts",
    "Render",
    "RewardConfig",
    "Run",
    "Sampling",
    "Track",
    "TrainedReward",
    "completed",
    "dumps",
    "find",
    "load",
    "shipped",
    "to_dict",
]
