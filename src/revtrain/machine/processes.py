"""One network trained by several processes, each on its share of every batch (torchrun, DistributedDataParallel).

All processes draw the same order and the same augmentation and take their slice, batch norms use the statistics of the
whole batch, and gradients are averaged: each step is that of one process with the whole batch, but for rounding.

The first process, rank 0, leads: it alone prints and writes. What goes wrong in one process ends all of them, and the
leader says what it was.
"""

from __future__ import annotations

import json
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from revtrain.config import Config
from revtrain.errors import RevtrainError
from revtrain.layers import synchronise_batch_norms
from revtrain.machine import sigterm, torchrun

# Lost processes are noticed otherwise: this bounds how long the others wait for one that downloads or decodes images.
TIMEOUT = timedelta(hours=1)
PATIENCE_SECONDS = 10.0  # that the leader gets to write what went wrong in another process
SAY_WHY_SECONDS = 0.5  # that a process may take between its end and its word on why
LEAST_SHARE = 2  # images a process: the memory of a step is told from two sizes


class Processes:
    """The processes that train together, as one of them sees it. One alone does everything itself.

    Args:
        rank: 0 to size - 1.
        size: how many processes there are.
        local_rank: the place on this machine, and the index of the GPU.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store: dist.Store | None = None

    @classmethod
    def of_environment(cls) -> Processes:
        """As torchrun started this process; alone without torchrun."""
        return cls(torchrun.rank(), torchrun.size(), torchrun.local_rank())

    @property
    def leads(self) -> bool:
        return self.rank == 0

    # ---- the start -------------------------------------------------------------------------------

    def device_name(self, name: str) -> str:
        """Of `device=name`, what this process takes: the CPU, or the GPU of its local rank.

        Raises:
            RevtrainError: one GPU by name for all processes, fewer GPUs than processes, or mps.
        """
        if self.size == 1:
            return name
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return "cpu"
        if name not in ("auto", "cuda"):
            raise RevtrainError(
                f"device={name} was given to each of {self.size} processes; expected auto, cuda or cpu.\n"
                "With cuda each process takes a GPU of its own."
            )
        gpus = torch.cuda.device_count()
        if self.local_rank >= gpus:
            raise RevtrainError(
                f"device={name}: process {self.local_rank + 1} of this machine has no GPU; there are {gpus}.\n"
                f"Start torchrun with --nproc-per-node={max(1, gpus)}, or use device=cpu."
            )
        return f"cuda:{self.local_rank}"

    def connect(self, device: torch.device) -> None:
        """Meet the others: gloo on the CPU, NCCL on GPUs."""
        if self.size == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        self._store, _, _ = next(dist.rendezvous("env://", self.rank, self.size, timeout=TIMEOUT))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("group", self._store),
            rank=self.rank,
            world_size=self.size,
            timeout=TIMEOUT,
        )

    @contextmanager
    def first_of_machine_first(self) -> Iterator[None]:
        """Run the block in the first process of each machine, then in the others: what one downloads, all read."""
        if self.size > 1 and self.local_rank > 0:
            dist.barrier()
        yield
        if self.size > 1 and self.local_rank == 0:
            dist.barrier()

    # ---- the work --------------------------------------------------------------------------------

    def share(self, batch: int) -> int:
        """How many images of a batch each process takes.

        Raises:
            RevtrainError: the processes cannot share the batch equally, or one would have fewer than two images.
        """
        if batch % self.size == 0 and (batch >= LEAST_SHARE * self.size or self.size == 1):
            return batch // self.size
        low = max(LEAST_SHARE, batch // self.size) * self.size
        raise RevtrainError(
            f"batch={batch} was given to {self.size} processes, which share each batch equally; expected a multiple of "
            f"{self.size}, at least {LEAST_SHARE * self.size}.\n"
            f"Use batch={low} or batch={low + self.size}."
        )

    def of_one(self, config: Config) -> Config:
        """`config` with the batch of one process, on which its memory depends. `batch=auto` stays."""
        batch = config.training.batch
        if not isinstance(batch, int):
            return config
        return replace(config, training=replace(config.training, batch=self.share(batch)))

    def of_one_process(self, error: RevtrainError) -> RevtrainError:
        """An error that speaks of the batch of one process."""
        if self.size == 1:
            return error
        return RevtrainError(f"{error}\nBatches here are those of one of {self.size} processes: batch= counts all.")

    def own(self, batch: int) -> slice:
        """The images of a batch that this process takes."""
        share = self.share(batch)
        return slice(self.rank * share, (self.rank + 1) * share)

    def wrap(self, model: nn.Module) -> nn.Module:
        """What to call in a training step in the place of `model`, whose batch norms are synchronised."""
        if self.size == 1:
            return model
        synchronise_batch_norms(model, dist.group.WORLD)
        network = DistributedDataParallel(model, gradient_as_bucket_view=True)  # gradients live in what is sent
        # Running statistics are equal everywhere already. As an attribute: the argument's name depends on the version.
        network.broadcast_buffers = False
        return network

    @contextmanager
    def averaging(self, network: nn.Module, now: bool) -> Iterator[None]:
        """A backward pass of what `wrap` returned, whose gradients are averaged `now`, or only added up here."""
        with nullcontext() if now or self.size == 1 else network.no_sync():  # type: ignore[operator]
            yield

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the processes; the values stay as they are."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes; the values stay as they are."""
        return self.sum(values) / self.size if self.size > 1 else values

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether one of the processes says so; all must ask at the same place. Waits for a GPU."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=device)).item())

    def of_leader(self, value: Any) -> Any:
        """What the first process gives."""
        return self._gather(value)[0]

    def least(self, value: int) -> int:
        """The smallest of what the processes give."""
        return min(self._gather(value))

    def add_up(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Numbers by name, summed over the processes."""
        total: dict[str, float] = {}
        for each in self._gather(counts):
            for name, count in each.items():
                total[name] = total.get(name, 0) + count
        return total

    def _gather(self, value: Any) -> list[Any]:
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    # ---- the end ---------------------------------------------------------------------------------

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raise in every process what ended the first of them; a lost connection says little about its cause.

        A process that does not lead waits until the leader has said so (see `close`): torchrun ends the others as soon
        as one has ended with an error.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if self._store is None:
                raise
            with _uninterrupted():
                cause = self._cause(error, self._store)
                if dist.get_backend() == "gloo":  # the others notice at once; NCCL would wait for them
                    with suppress(Exception):
                        dist.destroy_process_group()
                if not self.leads:
                    _wait_for_the_leader(self._store)
            if cause is error:
                raise
            raise cause from error

    def close(self) -> None:
        """The last call of a process: it has written what it had to write."""
        if self._store is None:
            return
        if self.leads:
            with suppress(Exception):
                self._store.set("leader ended", "")
        if dist.is_initialized() and dist.get_backend() == "gloo":
            with suppress(Exception):
                dist.destroy_process_group()

    def _cause(self, error: BaseException, store: dist.Store) -> BaseException:
        """The first failure of all: the processes ask the store, which takes the first one's."""
        lost = isinstance(error, RuntimeError) and any(word in str(error) for word in ("onnection", "gloo", "NCCL"))
        own = {"rank": self.rank, "kind": _kind(error), "text": _text(error)}
        if lost:
            own |= {"kind": "RevtrainError", "text": f"Another of the {self.size} processes ended without a word."}
        try:
            until = time.monotonic() + SAY_WHY_SECONDS
            while lost and time.monotonic() < until and not store.check(["failure"]):
                time.sleep(0.05)
            first = json.loads(store.compare_set("failure", "", json.dumps(own)))
        except Exception:  # the store went with the process that held it
            first = own
        if (first["rank"] == self.rank and not lost) or isinstance(error, sigterm.Terminated):
            return error
        if first["kind"] == "KeyboardInterrupt":
            return KeyboardInterrupt()
        if first["kind"] == "RevtrainError":
            return RevtrainError(first["text"])
        return RuntimeError(f"process {first['rank']} of {self.size} failed: {first['text']}")


ALONE = Processes()


def _wait_for_the_leader(store: dist.Store) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    with suppress(Exception):
        while time.monotonic() < until and not store.check(["leader ended"]):
            time.sleep(0.1)


def _kind(error: BaseException) -> str:
    return next(
        (kind.__name__ for kind in (RevtrainError, KeyboardInterrupt) if isinstance(error, kind)), type(error).__name__
    )


def _text(error: BaseException) -> str:
    if isinstance(error, RevtrainError):
        return str(error)
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}\n{''.join(traceback.format_exception(error))}"


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C from here on: torchrun passes on what the terminal has sent to every process already."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
