"""The configuration: every key stated once (schema.py), read and checked once (door.py).

keys -> schema -> registry -> door -> help. Neither torch nor Hydra is imported.
"""

from revtrain.config.door import (
    all_keys,
    check_micro_batches,
    check_parts,
    expected,
    flat,
    flatten,
    own_keys,
    read,
    schema,
    sections,
)
from revtrain.config.image_size import ImageSize
from revtrain.config.keys import Key, absolute, did_you_mean, key, keys_of, typed, word
from revtrain.config.memory_size import parse_memory
from revtrain.config.schema import (
    IGNORED,
    AugmentConfig,
    Config,
    CouplingSettings,
    DataConfig,
    InvertibleSettings,
    Machine,
    Network,
    ProbeConfig,
    StreamSettings,
    Training,
)

__all__ = [
    "IGNORED",
    "AugmentConfig",
    "Config",
    "CouplingSettings",
    "DataConfig",
    "ImageSize",
    "InvertibleSettings",
    "Key",
    "Machine",
    "Network",
    "ProbeConfig",
    "StreamSettings",
    "Training",
    "absolute",
    "all_keys",
    "check_micro_batches",
    "check_parts",
    "did_you_mean",
    "expected",
    "flat",
    "flatten",
    "key",
    "keys_of",
    "own_keys",
    "parse_memory",
    "read",
    "schema",
    "sections",
    "typed",
    "word",
]
