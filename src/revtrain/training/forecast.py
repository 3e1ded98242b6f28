"""How long a run will take, said once, as soon as its first few steps are measured."""

from __future__ import annotations

import logging

from tqdm import tqdm

log = logging.getLogger(__name__)

STEPS_TIMED = 4  # so many at least, after those up to the first mark, which warm up


class Forecast:
    """About how long a run will take: measured steps, measured or estimated probes, and an estimate of evaluation.

    Args:
        steps: of the optimizer, all that are ahead.
        evaluation_steps: the work of all evaluations ahead, in training steps.
        probes: that are ahead.
        probe_steps: the work of one, in training steps; for a run that has not measured one.
        probe_seconds: measured; None: not.
        what: the run, in words.
        silent: nothing is said.
    """

    def __init__(
        self,
        steps: int,
        evaluation_steps: float,
        probes: int,
        probe_steps: float,
        probe_seconds: float | None,
        what: str,
        silent: bool = False,
    ):
        self.steps, self.evaluation_steps = steps, evaluation_steps
        self.probes, self.probe_steps, self.probe_seconds = probes, probe_steps, probe_seconds
        self.what, self.told = what, silent
        self.marks: list[tuple[int, float]] = []  # (steps done, seconds so far) of the epoch under way

    def begin(self, step: int, seconds: float) -> None:
        """An epoch begins, or goes on after so many steps, which took so long."""
        self.marks = [(step, seconds)]

    def mark(self, step: int, seconds: float, last: bool = False) -> None:
        """So many steps of the epoch are done after so long; with enough of them, or the `last`, say what is ahead."""
        if self.told:
            return
        begin, *later = self.marks
        since = next((each for each in later if each[0] < step), begin)
        self.marks.append((step, seconds))
        timed = step - since[0]
        if timed > 0 and (last or (since is not begin and timed >= STEPS_TIMED)):
            self.told = True
            ahead = self.seconds(max(0.0, seconds - since[1]) / timed)
            with tqdm.external_write_mode():  # not in the middle of the bar
                log.info("time       about %s for %s, evaluation and probes included", in_words(ahead), self.what)

    def seconds(self, step_seconds: float) -> float:
        """Of all that is ahead, where a training step takes `step_seconds`."""
        probe_seconds = self.probe_steps * step_seconds if self.probe_seconds is None else self.probe_seconds
        return (self.steps + self.evaluation_steps) * step_seconds + self.probes * probe_seconds


def in_words(seconds: float) -> str:
    """A duration as people say it: "12 s", "3 min 40 s", "2 h 5 min"; at least a second."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
