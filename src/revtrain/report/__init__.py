"""The picture of any set of run directories: page -> (svg, tables) -> group. Neither torch nor Hydra is imported."""
