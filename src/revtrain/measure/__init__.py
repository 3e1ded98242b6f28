"""Measurements from outside: the layers know nothing of them.

probe_snr             SNR in dB of every reconstructed activation (Eq. 15)
probe_gradients       cosine and relative error of every parameter's gradient, `invert` against `store`
measure_step_memory   peak live bytes of one training step, without allocating anything
stream_overflows      how many values left the range of the streams' grids
LiveStorages          the counter behind it, for any code
"""

from revtrain.measure.gradients import GradientFidelity, probe_gradients
from revtrain.measure.memory import LiveStorages, StepMemory, measure_step_memory, training_step_memory
from revtrain.measure.snr import SNR_CEILING_DB, SnrObserver, probe_snr, snr_db, stream_overflows

__all__ = [
    "SNR_CEILING_DB",
    "GradientFidelity",
    "LiveStorages",
    "SnrObserver",
    "StepMemory",
    "measure_step_memory",
    "probe_gradients",
    "probe_snr",
    "snr_db",
    "stream_overflows",
    "training_step_memory",
]
