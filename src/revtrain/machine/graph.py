"""Work of the device that is captured once and replayed as a whole, without Python in between: a CUDA graph.

Captured work takes no arguments and returns nothing: it reads and writes tensors that stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

Work = Callable[[], None]


class Graph(Protocol):
    """What `training.step` asks of a graph. Tests put others in the place of CUDA's."""

    def warm_up(self, work: Work) -> None:
        """Do the work as it is, as it is going to be captured."""

    def capture(self, work: Work) -> None:
        """Record the work without doing it; what was captured before is released."""

    def replay(self) -> None:
        """Do the work that was captured."""

    def release(self) -> None:
        """Give back the memory of what was captured."""


class CudaGraph:
    """`torch.cuda.CUDAGraph`, with a stream of its own to warm up and to capture on."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def warm_up(self, work: Work) -> None:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            work()
        current.wait_stream(self.stream)

    def capture(self, work: Work) -> None:
        self.release()
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                work()
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own stream behind
        self._graph = graph

    def replay(self) -> None:
        if self._graph is None:
            raise RuntimeError("nothing was captured")
        self._graph.replay()

    def release(self) -> None:
        if self._graph is not None:
            torch.cuda.synchronize(self.device)
            self._graph.reset()
            self._graph = None
            torch.cuda.empty_cache()


# by type of device
GRAPHS: dict[str, Callable[[torch.device], Graph]] = {"cuda": CudaGraph}
