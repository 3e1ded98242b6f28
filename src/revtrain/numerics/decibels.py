"""Decibels in words. Without torch: the report and the list of a sweep are printed without it."""

from __future__ import annotations

# An exact reconstruction has no error; its SNR is recorded as this many dB, beyond float64's own. Its negative stands
# for the opposite: nothing of the signal is left.
EXACT_DB = 320.0


def snr_text(db: float) -> str:
    """An SNR as people read it: "61.3 dB", or "exact" where not a bit was lost."""
    return "exact" if db >= EXACT_DB else "nothing left" if db <= -EXACT_DB else f"{db:.1f} dB"
