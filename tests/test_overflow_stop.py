"""A run whose 16-bit states leave their grid in the first epoch ends, and says why."""

from __future__ import annotations

import pytest
from cases import compose
from conftest import IN_A_MOMENT, read_result

from revtrain.errors import RevtrainError
from revtrain.training.run import train

SMALL = ("arch=chunked", "width=4", "depth=2", "pooling=[]", *IN_A_MOMENT)


def test_a_run_that_loses_its_states_is_stopped(tmp_path):
    """With 14 bits after the point int16 ends at 2, which normalised images alone reach."""
    with pytest.raises(RevtrainError) as caught:
        train(compose(*SMALL, "stream=int16", "grid_bits=14"), tmp_path)
    message = str(caught.value)
    assert "% of the states of trunk" in message and "left the range of int16 within 3 steps of epoch 1" in message
    assert "stream=int32" in message and "lower lr" in message and "warmup" in message
    assert len(message.splitlines()) <= 5
    assert read_result(tmp_path)["status"] == "failed"


@pytest.mark.parametrize("keys", [("stream=int16",), ("stream=float32", "grid_bits=22"), ("stream=plain",)], ids=str)
def test_other_runs_go_on(keys, tmp_path):
    """Within the range, or in floating point, which leaves its grid with a good value in its place."""
    assert train(compose(*SMALL, *keys), tmp_path)["status"] == "completed"
