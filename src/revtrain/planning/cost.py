"""What a training step costs on a GPU: its operations and the bytes that they read and write, counted without one.

The step is run on fake tensors, inside `planning_for("cuda")`: every operator of the engine's is then one operation, as
its kernel is one launch. Views and allocations are not counted. A matrix or convolution counts as one; its library may
launch more than one kernel for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from revtrain.config import Config, ImageSize
from revtrain.kernels.operator import LAUNCHES, planning_for
from revtrain.machine import device as devices
from revtrain.memory.macs import CountMacs
from revtrain.models import Images, build
from revtrain.objective import loss_and_hits, no_labels

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
QUESTIONS = {"device", "promote_types", "_local_scalar_dense", "_unsafe_view", "lift_fresh"}  # launch nothing


@dataclass
class StepCost:
    """Of one training step, forward, loss and backward; the optimizer's step apart."""

    operations: Counter[str] = field(default_factory=Counter)  # by name, launches
    bytes_moved: Counter[str] = field(default_factory=Counter)  # by name, read and written
    multiplications: int = 0  # of convolutions and matrices: a multiplication and an addition each

    @property
    def launches(self) -> int:
        """All operations."""
        return sum(self.operations.values())

    @property
    def total_bytes(self) -> int:
        """All bytes read and written."""
        return sum(self.bytes_moved.values())

    def seconds(self, card: Ceilings, narrow: bool) -> float:
        """An estimate of the GPU's time: every operation takes the time of its launch, or of its bytes if that is more;
        convolutions and matrices take that of their arithmetic on top.

        Args:
            card: what it can do.
            narrow: in 16 bit.
        """
        moved = sum(
            max(count * card.launch_seconds, self.bytes_moved[name] / card.bytes_per_second)
            for name, count in self.operations.items()
        )
        return moved + self.multiplications / (card.narrow_per_second if narrow else card.wide_per_second)


@dataclass(frozen=True)
class Ceilings:
    """What a card reaches in practice: not its data sheet, but large operations of a real step."""

    name: str
    launch_seconds: float  # of a small kernel within a CUDA graph
    bytes_per_second: float
    wide_per_second: float  # multiplications with additions, float32
    narrow_per_second: float  # in 16 bit


# Fitted to steps of the engine before its passes were fused, replayed as CUDA graphs, and of ResNet-18, on an H100:
# docs/performance.md has the figures. Good to a third.
CARDS = (Ceilings("an H100", 3e-6, 2.2e12, 50e12, 120e12),)


class Operations(TorchDispatchMode):
    """Counts all operations inside its `with` block into `cost`."""

    def __init__(self) -> None:
        super().__init__()
        self.cost = StepCost()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.split("::")[1]
        if is_view(function) or name in ALLOCATIONS or name in QUESTIONS:
            return result
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        self.cost.operations[name] += LAUNCHES.get(name, 1)
        self.cost.bytes_moved[name] += sum(each.numel() * each.element_size() for each in (*given, *made))
        return result


def is_view(function: Any) -> bool:
    """Whether an operation returns another view of what it is given."""
    return any(each.alias_info is not None and not each.alias_info.is_write for each in function._schema.returns)


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, tensors are fake, and the engine takes the way that it takes on CUDA."""
    with FakeTensorMode(), planning_for("cuda"):
        yield


def step_cost(config: Config, batch: int, classes: int = 10, image_size: int | Sequence[int] = 32) -> StepCost:
    """The cost of one training step of `batch` images, without the optimizer's step."""
    precision = config.network.precision
    device = torch.device("cpu")
    with torch.random.fork_rng([]), fake_gpu():
        model = devices.weights_channels_last(build(config.network, Images(classes, image_size)).train())
        images = torch.empty(batch, 3, *ImageSize.of(image_size), dtype=devices.DTYPES[precision])
        labels = no_labels(config.network.task, tuple(images.shape))
        with Operations() as counting, CountMacs() as products:
            with devices.autocast(device, precision):
                loss, _ = loss_and_hits(model, images, labels)
            loss.backward()
    counting.cost.multiplications = products.macs
    return counting.cost
