"""`revtrain-report`: one picture of any set of run directories.

command -> (page -> svg, tables) -> group -> read. Neither torch nor Hydra is imported.
"""

from revtrain.reporting.command import main
from revtrain.reporting.group import Group, group_runs
from revtrain.reporting.read import Problem, Run, gather

__all__ = ["Group", "Problem", "Run", "gather", "group_runs", "main"]
