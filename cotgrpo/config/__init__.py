"""Every setting that a user can write, declared once, and its way from files and options and back."""

from cotgrpo.config.files import differences, flat, load_config, parse_config, parse_settings, save_config
from cotgrpo.config.generate import GenerateConfig, PromptConfig, TeacherConfig, VerifyConfig
from cotgrpo.config.ghosts import (
    Cached,
    Ghosts,
    LiveGhosts,
    PrivilegedSelf,
    SelfReply,
    TeacherForced,
    TeacherModel,
    TeacherServer,
    VerifiedReward,
)
from cotgrpo.config.sections import ConfigError, tree_of
from cotgrpo.config.settings import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    GrpoConfig,
    LoraConfig,
    MeshConfig,
    OptimizerConfig,
    StageConfig,
    StudentConfig,
    TokenizerConfig,
)

__all__ = [
    "Cached",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "GenerateConfig",
    "Ghosts",
    "GrpoConfig",
    "LiveGhosts",
    "LoraConfig",
    "MeshConfig",
    "OptimizerConfig",
    "PrivilegedSelf",
    "PromptConfig",
    "SelfReply",
    "StageConfig",
    "StudentConfig",
    "TeacherConfig",
    "TeacherForced",
    "TeacherModel",
    "TeacherServer",
    "TokenizerConfig",
    "VerifiedReward",
    "VerifyConfig",
    "differences",
    "flat",
    "load_config",
    "parse_config",
    "parse_settings",
    "save_config",
    "tree_of",
]
