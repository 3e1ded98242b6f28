"""Training, from top to bottom: `train` is the door, `Session` what comes before and after, `Run` the training itself.

The configuration is read once, at the door. B images of a batch, H x W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from tqdm import tqdm

from revtrain import data, models
from revtrain.config import Config, ProbeConfig, check_micro_batches, flat, read
from revtrain.data import Dataset, Split, StreamedSplit
from revtrain.errors import ImageError
from revtrain.machine import device as devices
from revtrain.machine import sigterm
from revtrain.machine.processes import Processes
from revtrain.models import Images
from revtrain.numerics.decibels import snr_text
from revtrain.numerics.fidelity import FidelityWatch
from revtrain.numerics.halves import HalvesWatch
from revtrain.objective import accuracy, iou_of_classes, mean_iou, no_hits
from revtrain.optim import learning_rate
from revtrain.planning import plan as planning
from revtrain.planning import predict
from revtrain.planning.predict import StepPredictor, StepTimeline
from revtrain.runs import checkpoint
from revtrain.runs.schema import Line, Result, Status
from revtrain.runs.writer import LINE_KEYS, RunWriter, SilentWriter, holds_run
from revtrain.training import errors
from revtrain.training.evaluate import MirrorAveraged, batches_at_once, evaluate
from revtrain.training.forecast import Forecast
from revtrain.training.overflows import OverflowWatch
from revtrain.training.probe import Probe, at_most, probe_within
from revtrain.training.progress import Clock, Progress
from revtrain.training.step import Step

log = logging.getLogger(__name__)

CHECK_EVERY = 20  # steps between two looks at the losses: each look waits for the GPU


# ---- the door --------------------------------------------------------------------------------------------


def train(cfg: DictConfig | dict[str, Any] | Config, run_dir: str | Path, overrides: list[str] | None = None) -> Result:
    """Train the network that `cfg` describes and write everything into `run_dir`.

    Args:
        cfg: the composed configuration, from `revtrain.conf.compose` or Hydra.
        run_dir: a folder for this run alone, made if it does not exist. The command line locks it
            (`machine.files.claim`); who calls this sees to that himself. Of the processes that torchrun starts the
            first alone writes.
        overrides: the command line, for the messages that tell how to continue.

    Returns:
        The contents of result.json (see `revtrain.runs.writer.new_result`); with `plan=true` nothing is trained.

    Raises:
        RevtrainError: the configuration, the data or the checkpoint cannot be used, the disk or the memory is
            full, or the loss is no longer finite; or `run_dir` holds a run already, and not the one to resume.
        KeyboardInterrupt: Ctrl-C.
        In both cases result.json says so and last.pt holds the last completed epoch, epoch 0 being the start.
        revtrain.machine.sigterm.Terminated: SIGTERM or its like; last.pt holds the last completed step.
    """
    with sigterm.watching():
        return Session(read(cfg), Path(run_dir).absolute(), list(overrides or ())).to_its_end()


class Session:
    """One call of `train`: the configuration that was read, and who takes part. From here on it is not handed around.

    Args:
        config: of the run.
        run_dir: absolute.
        overrides: the command line.
    """

    def __init__(self, config: Config, run_dir: Path, overrides: list[str]):
        self.config, self.run_dir, self.overrides = config, run_dir, overrides
        self.processes = Processes.of_environment()
        if self.processes.leads and holds_run(run_dir) and not self.in_place:
            raise errors.folder_taken(run_dir)
        kind = RunWriter if self.processes.leads else SilentWriter
        self.writer = kind(run_dir, flat(config), overrides)

    @property
    def in_place(self) -> bool:
        """Whether the run to resume is the one of this folder."""
        resume = self.config.machine.resume
        return resume is not None and checkpoint.folder_of(resume) == self.run_dir.resolve()

    def to_its_end(self) -> Result:
        """Do what the configuration asks for; however that ends, result.json says so."""
        writer, processes = self.writer, self.processes
        try:
            with processes.failing_together():
                if processes.leads:
                    self.run_dir.mkdir(parents=True, exist_ok=True)
                writer.finish(self.carry_out())
        except KeyboardInterrupt:
            with suppress(OSError):
                writer.finish("interrupted")
            raise
        except Exception as error:
            mendable = errors.explain(error, self.run_dir)
            with suppress(OSError):  # a full disk may not take result.json either; the error itself matters more
                writer.finish("failed", mendable or error)
            if mendable is None or mendable is error:
                raise
            raise mendable from error
        finally:
            processes.close()
        if writer.result["status"] == "completed":
            log.info("%s", writer.table())
        return writer.result

    def carry_out(self) -> Status:
        """Plan, or load the data and train; the status."""
        machine, processes, writer = self.config.machine, self.processes, self.writer
        own_share = processes.of_one(self.config)  # or the batch is refused
        check_micro_batches(self.config.training.batch, self.config.training.accumulate, processes.size)
        device = devices.choose_device(processes.device_name(machine.device))
        devices.make_current(device)
        devices.check_precision(device, self.config.network.precision)
        if machine.plan:
            plan = planning.with_cost(planning.make_plan(own_share, device), own_share)
            writer.planned(plan)
            writer.result["device"] = devices.describe(device)
            log.info("%s", plan.table())
            return "planned"
        processes.connect(device)
        resumed = checkpoint.load(machine.resume) if machine.resume is not None else None
        with processes.first_of_machine_first():
            dataset = data.load_data(self.config.data, models.divisor(self.config.network), machine.seed)
        images, available = Images(len(dataset.classes), dataset.image_size), len(dataset.train)
        if not dataset.train.is_uniform and self.config.training.batch == "auto":  # one for each micro-batch
            self.take_batch(self.config.training.accumulate * processes.size)
        batch = self.settle_batch(images, available, resumed, device)
        planning.cap_memory(machine.memory_limit, device)
        if resumed is not None:
            self.check_resumed(resumed, images, available)
        errors.check_sizes(dataset.train, processes.share(batch), self.config.training.accumulate)
        log.info("data       %s: %s, %s%s, %d classes", self.config.data.name, _numbers(dataset),
                 "" if dataset.train.is_uniform else "up to ", images.size, images.classes)  # fmt: skip
        try:
            with sigterm.deferred():
                run = Run(self, batch, dataset, device)
                with closing(run.trainer.feed):
                    run.train(resumed)
        except (RuntimeError, MemoryError) as error:
            if not errors.is_out_of_memory(error):
                raise
            raise errors.out_of_memory(self.config, processes.share(batch), images, device, processes) from error
        return "completed"

    def settle_batch(self, images: Images, available: int, resumed: dict[str, Any] | None, device: torch.device) -> int:
        """The images of a step: as given, or with batch=auto as the run to go on with had it, or the largest that fits.

        Raises:
            RevtrainError: a given one is larger than the training set, or needs more than `memory_limit`.
        """
        batch, processes, writer = self.config.training.batch, self.processes, self.writer
        if batch == "auto" and resumed is not None:  # as it was: what fits now may be another number
            self.take_batch(int(resumed["config"]["batch"]))
            batch = self.config.training.batch
        if isinstance(batch, int):
            planning.check_batch(batch, available)
            if self.config.machine.memory_limit is None:
                return batch
        own_share = processes.of_one(self.config)
        plan = planning.make_plan(own_share, device, images.classes, images.size, available // processes.size)
        writer.planned(plan)
        batch = processes.least(plan.batch) * processes.size
        self.take_batch(batch)
        if not plan.fits:
            raise processes.of_one_process(plan.refusal())
        log.info("plan       batch %d needs %.1f of %.1f MiB; the largest that fits is %d",
                 plan.batch, plan.needed_bytes / devices.MIB, (plan.limit_bytes or 0) / devices.MIB,
                 plan.largest_batch)  # fmt: skip
        return batch

    def take_batch(self, batch: int) -> None:
        """Go on with another batch, and record it."""
        self.config = replace(self.config, training=replace(self.config.training, batch=batch))
        self.writer.result["config"] = flat(self.config)

    def check_resumed(self, resumed: dict[str, Any], images: Images, available: int) -> None:
        """Refuse a checkpoint of another network or data set; say what costs bit-equality."""
        processes = self.processes
        same_folder = processes.of_leader(self.in_place)
        differences = checkpoint.check_compatible(resumed, flat(self.config), images.classes, available, same_folder)
        if resumed.get("processes", 1) != processes.size:
            differences.append(f"processes: {resumed.get('processes', 1)} in the checkpoint, {processes.size} now")
        for difference in differences:
            log.warning("resume     no longer bit-equal to an uninterrupted run: %s", difference)


# ---- the run ---------------------------------------------------------------------------------------------


class Run:
    """A network in training: what belongs to it, and the steps of its training.

    Args:
        session: what was asked for, and who takes part.
        batch: images of a step, of all processes together.
        dataset: uint8 images on the CPU.
    """

    def __init__(self, session: Session, batch: int, dataset: Dataset, device: torch.device):
        config, processes = planning.on_device(session.config, device), session.processes
        training, precision = config.training, config.network.precision
        self.session, self.config, self.writer, self.processes = session, config, session.writer, processes
        self.run_dir, self.batch, self.dataset, self.device = session.run_dir, batch, dataset, device
        self.epochs, self.precision = training.epochs, precision
        self.steps = len(dataset.train) // batch  # of an epoch; the last, incomplete batch is dropped
        self.images = Images(len(dataset.classes), dataset.image_size)
        torch.manual_seed(config.machine.seed)
        self.no_hits = partial(no_hits, config.network.task, self.images.classes, device)
        self.model = devices.place(models.build(config.network, self.images), device)
        share, images = processes.share(batch), self.images
        self.memory = predict.predict_step_memory(config, images.classes, images.size, share, device.type)
        room_bytes = planning.room_bytes(self.memory.peak_bytes, config.machine.memory_limit, device)
        self.trainer = Step(self.model, config, batch, dataset, device, processes, room_bytes)
        self.test, self.at_once = dataset.test, self.batches_at_once()
        if isinstance(self.test, Split) and self.trainer.feed.device_bytes + self.test.nbytes < room_bytes:
            self.test = self.test.on(device)
        if device.type == "cuda":
            held = self.trainer.feed.device_bytes / devices.MIB
            log.info(
                "images     %s", f"{held:,.1f} MiB on the GPU, beside the step" if held else "copied batch by batch"
            )
        self.generator = self.trainer.generator  # of order and augmentation
        self.rate = learning_rate(training, self.epochs * self.steps)

        self.probe = Probe(self.probe_that_fits(), dataset.train)
        self.probe_seconds: float | None = None  # that the last one took
        self.overflows = OverflowWatch(self.model, config.network, processes)
        self.watches = (FidelityWatch(config.network), HalvesWatch(config.network))

        self.epoch = 0  # epochs done; within the loop the one under way
        self.progress: Progress | None = None  # of the epoch under way
        self.best_accuracy = 0.0

    def train(self, resumed: dict[str, Any] | None) -> None:
        """All epochs, or with a checkpoint those that are left."""
        timeline = self.describe()
        history = [] if resumed is None else self.resume(resumed)
        self.writer.start(history, timeline)
        if resumed is None:
            self.record({"epoch": 0, "step": 0, **self.measure_probe()})
        self.save(self.epoch)  # also the first epoch can be interrupted
        self.forecast = self.look_ahead(resumed is not None)

        for epoch in range(self.epoch + 1, self.epochs + 1):
            if self.writer.result["target_reached"] is not None:
                break
            self.epoch = epoch
            self.stop_if_asked()
            line = self.record(self.measure(self.train_epoch()))
            self.progress = None
            self.save(epoch)
            log.info("%s", _summary(line, self.epochs))

    # ---- the beginning -----------------------------------------------------------------------------------

    def describe(self) -> StepTimeline:
        """Record the network's size and the memory that a step needs; its course over one step."""
        network, memory, result = self.config.network, self.memory, self.writer.result
        result["params"] = sum(p.numel() for p in self.model.parameters())
        result["bytes_per_pixel"], result["macs_per_image"] = memory.bytes_per_pixel, memory.macs_per_image
        result["memory_bytes"] = {
            "peak": memory.peak_bytes,
            "parameters": memory.parameter_bytes,
            "gradients": memory.gradient_bytes,
            "optimizer": memory.optimizer_bytes,
            "activations": memory.activation_bytes,
        }
        result["device"] = {**devices.describe(self.device), "processes": self.processes.size}
        alone = self.processes.size == 1
        log.info("model      %s: %s parameters, backward=%s, %.1f bytes per pixel; %s, %s",
                 network.arch, f"{result['params']:,}", network.backward, memory.bytes_per_pixel,
                 self.device if alone else f"{self.processes.size} processes, the first on {self.device}",
                 network.precision)  # fmt: skip
        return memory.timeline

    @cached_property
    def predictor(self) -> StepPredictor:
        """Of what else the run does on its device; it takes a second to make."""
        return StepPredictor(self.config, self.images.classes, self.images.size, planned_for=self.device.type)

    def probe_that_fits(self) -> ProbeConfig:
        """The probe of as many images as make sense, within what it may have beside what the loop holds."""
        share = self.processes.share(self.batch)
        images = planning.probe_images(self.config.probe, share, self.dataset.image_size.pixels)
        config = replace(self.config, probe=at_most(self.config.probe, images))
        limit = planning.limit_bytes(self.config.machine.memory_limit, self.device)
        if limit is None:
            return config.probe
        room = planning.room_bytes(self.memory.peak_bytes, config.machine.memory_limit, self.device)
        beside, _ = planning.loop_bytes(config, self.device, share, self.images.size, len(self.dataset.train), room)
        budget = limit - beside - planning.margin_bytes(self.device, limit)
        stored = planning.roughly_stored(config, self.images, config.probe.batch)
        if stored is not None and 2 * stored <= budget:  # it keeps each activation once, and on a CPU those for the SNR
            return config.probe
        return probe_within(config.probe, self.predictor.probe, budget)

    def batches_at_once(self) -> int:
        """How many batches an evaluation takes together: on a GPU as many as the memory of a step allows."""
        if self.device.type != "cuda":
            return 1
        share = self.processes.share(self.batch)
        return batches_at_once(self.predictor.evaluation, share, len(self.dataset.test), self.memory.peak_bytes)

    def resume(self, saved: dict[str, Any]) -> list[Line]:
        """Go on from a checkpoint, also from within an epoch; the lines of metrics.jsonl up to there."""
        self.epoch, self.best_accuracy = saved["epoch"], saved["best_accuracy"]
        checkpoint.restore(saved, *self.trained)
        if saved["partial"] is not None:
            self.progress = Progress.from_dict(saved["partial"], self.device)
        log.info("resume     %s after epoch %d%s", self.config.machine.resume, self.epoch,
                 f" and {self.progress.step} of {self.steps} steps" if self.progress else "")  # fmt: skip
        if self.processes.leads and self.session.in_place:
            checkpoint.put_in_place(saved)
        return saved["history"]

    def look_ahead(self, resumed: bool) -> Forecast:
        """How much there is to do, in training steps and probes."""
        network, left = self.config.network, range(self.epoch + 1, self.epochs + 1)
        rebuilds = network.backward == "invert" and models.traits(network.arch).reversible
        share, done = self.processes.share(self.batch), self.progress.step if self.progress else 0
        return Forecast(
            steps=len(left) * self.steps - done,
            # a step is a forward pass and a backward pass of twice the work, or three times where it rebuilds
            evaluation_steps=len(left) * len(self.dataset.test) / self.batch / (4 if rebuilds else 3),
            probes=sum(map(self.probe.is_due, left)),
            probe_steps=(3 if self.probe.gradients else 1) * len(self.probe.labels) / share,
            probe_seconds=self.probe_seconds,
            what=f"{'the rest of ' if resumed else ''}{self.epochs} epochs",
            silent=not self.processes.leads,
        )

    @property
    def trained(self) -> tuple[Any, ...]:
        """All that a checkpoint holds the state of, and where."""
        step = self.trainer
        return self.model, step.optimizer, step.scaler, self.generator, self.device, step.average

    # ---- an epoch ----------------------------------------------------------------------------------------

    def train_epoch(self) -> Progress:
        """The steps of the epoch under way, or those that are left of it."""
        if self.progress is None:
            self.progress = Progress.begin(len(self.dataset.train), self.steps, self.generator, self.no_hits())
        progress = self.progress
        self.model.train()
        self.trainer.epoch = self.epoch
        devices.reset_peak(self.device)
        clock = Clock(progress.seconds)
        self.forecast.begin(progress.step, progress.seconds)
        bar = tqdm(total=self.steps * self.batch, desc=f"epoch {self.epoch}/{self.epochs}", unit=" images",
                   initial=progress.step * self.batch, disable=None, leave=False)  # fmt: skip
        with bar:
            for step in range(progress.step, self.steps):
                self.step(progress, step)
                bar.update(self.batch)
                progress.step, progress.seconds = step + 1, clock.seconds()
                looks = (step + 1) % CHECK_EVERY == 0
                if looks or self.processes.size == 1 or self.device.type == "cpu":
                    self.stop_if_asked()
                if looks:
                    self.look(progress, bar)
                if looks or self.device.type == "cpu":  # a GPU may be behind: its time is told where it was waited for
                    self.forecast.mark(step + 1, clock.seconds())
            devices.synchronize(self.device)
        progress.seconds = clock.seconds()
        self.forecast.mark(progress.step, progress.seconds, last=True)
        self.check(progress)
        self.overflows.warn_once(self.epoch)
        return progress

    def step(self, progress: Progress, step: int) -> None:
        """One step of the optimizer."""
        picked, following = (progress.order[each * self.batch : (each + 1) * self.batch] for each in (step, step + 1))
        rate = self.rate((self.epoch - 1) * self.steps + step)
        try:
            loss, hits = self.trainer(picked, rate, following if step + 1 < self.steps else None)
        except ImageError:
            self.keep(progress)
            raise
        progress.losses[step] = loss
        progress.correct += hits

    def look(self, progress: Progress, bar: tqdm) -> None:
        """Wait for the device and look at the losses so far."""
        losses = progress.losses[: progress.step]
        errors.check_finite(losses, self.epoch, self.config)
        self.check_overflows(progress)
        if not bar.disable:
            right = accuracy(progress.correct, progress.step * self.batch)
            bar.set_postfix(loss=f"{losses.mean().item():.3f}", accuracy=f"{right:.3f}")

    def check(self, progress: Progress) -> None:
        """Raise where the epoch so far has left anything that is not finite: it must not be saved."""
        errors.check_finite(progress.losses[: progress.step], self.epoch, self.config)
        errors.check_weights(self.model, self.epoch, self.config)
        self.check_overflows(progress)

    def check_overflows(self, progress: Progress) -> None:
        """Raise where integer states have left their range in the first epoch."""
        values = self.batch * self.dataset.image_size.pixels * self.config.network.width
        self.overflows.stop_if_lost(self.epoch, progress.step, values)

    def keep(self, progress: Progress) -> None:
        """Save the steps of the epoch under way: a file may be repaired, and the run go on."""
        if progress.step and self.processes.size == 1:  # others may be elsewhere in theirs
            devices.synchronize(self.device)
            self.check(progress)
            self.save(self.epoch - 1)

    def stop_if_asked(self) -> None:
        """After SIGTERM and its like, save the epoch under way and end; no step is lost.

        Several processes stop after the same step: they ask each other, on GPUs only now and then, since that waits.
        """
        if not self.processes.any(sigterm.asked(), self.device):
            return
        if self.progress is None:  # the last checkpoint holds everything
            log.info("stopped    %s after epoch %d", sigterm.terminated().name, self.epoch - 1)
        else:
            self.check(self.progress)
            self.save(self.epoch - 1)
            log.info("stopped    %s in epoch %d, after %d of %d steps",
                     sigterm.terminated().name, self.epoch, self.progress.step, self.steps)  # fmt: skip
        raise sigterm.terminated()

    # ---- after an epoch ----------------------------------------------------------------------------------

    def measure(self, progress: Progress) -> dict[str, Any]:
        """The line of metrics.jsonl for the epoch whose steps are done."""
        trained, seconds = self.steps * self.batch, progress.seconds
        peak = devices.peak_vram_mib(self.device)
        self.make_room()
        # several processes do not all have as many batches, and could not ask each other after each
        may_stop = self.stop_if_asked if self.processes.size == 1 else _go_on
        loss_test, hits_test = self.tested(self.model, may_stop)
        accuracy_test = accuracy(hits_test, len(self.test))
        self.best_accuracy = max(self.best_accuracy, accuracy_test)
        return {
            "epoch": self.epoch,
            "step": self.epoch * self.steps,
            "lr": self.rate(self.epoch * self.steps - 1),
            "loss_train": progress.losses.mean().item(),
            "loss_test": loss_test,
            "accuracy_train": accuracy(progress.correct, trained),
            "accuracy_test": accuracy_test,
            **self.measure_overlap(progress.correct, hits_test),
            **self.measure_apart(may_stop),
            "train_images": trained,
            "train_seconds": seconds,
            "images_per_second": trained / seconds if seconds else None,
            **self.measure_probe(),
            "stream_overflows": self.overflows.count(),
            "peak_vram_mib": peak,
        }

    def measure_apart(self, may_stop: Callable[[], None]) -> dict[str, Any]:
        """The test accuracies beside the plain one: with flip averaging, and of the average of the weights."""
        average, found = self.trainer.average, {}
        if self.config.training.test_flip:
            found["accuracy_test_flip"] = self.accuracy_of(MirrorAveraged(self.model), may_stop)
        if average is not None:
            with average.in_place():  # whoever stopped here would save the average for the weights
                found["accuracy_test_ema"] = self.accuracy_of(self.model, _go_on)
        return found

    def measure_overlap(self, hits_train: Tensor, hits_test: Tensor) -> dict[str, Any]:
        """Intersection over union, where pixels have classes."""
        if self.config.network.task != "segment":
            return {}
        of_classes = dict(zip(self.dataset.classes, iou_of_classes(hits_test), strict=True))
        return {"iou_train": mean_iou(hits_train), "iou_test": mean_iou(hits_test), "iou_of_classes": of_classes}

    def tested(self, model: nn.Module, may_stop: Callable[[], None]) -> tuple[float, Tensor]:
        """Loss and hits on the test images."""
        return evaluate(
            model, self.test, self.batch, self.normalised, self.precision, self.device, self.no_hits(), self.processes,
            may_stop, self.at_once,
        )  # fmt: skip

    def accuracy_of(self, model: nn.Module, may_stop: Callable[[], None]) -> float:
        """Its accuracy on the test images, 0..1."""
        return accuracy(self.tested(model, may_stop)[1], len(self.test))

    def make_room(self) -> None:
        """Evaluation and probe need as much memory as a step, whose graph must not hold what there is of it."""
        limit = planning.limit_bytes(self.config.machine.memory_limit, self.device)
        if limit is not None:
            self.trainer.make_room(limit)

    def measure_probe(self) -> dict[str, Any]:
        """Its part of a line, where a probe is due; the first process alone takes it."""
        if not (self.processes.leads and self.probe.is_due(self.epoch)):
            return {}
        clock = Clock()
        found = self.probe.measure(self.model, self.normalised(self.probe.images), self.device, self.precision)
        self.probe_seconds = clock.seconds()
        return found

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) -> float32, of zero mean and unit deviation, on the device."""
        return data.normalise(images.to(self.device), self.trainer.mean, self.trainer.std)

    def record(self, measured: dict[str, Any]) -> Line:
        """Write a line of metrics.jsonl, always with the same keys: null where nothing was measured."""
        line = cast(Line, {**dict.fromkeys(LINE_KEYS), **measured})
        self.writer.epoch(line)
        for watch in self.watches:
            watch.look(line)
        return line

    def save(self, epochs_done: int) -> None:
        """Write last.pt, with what the epoch under way has come to."""
        if not self.processes.leads:
            return
        result, dataset = self.writer.result, self.dataset
        checkpoint.save(
            self.run_dir / checkpoint.NAME,
            {
                "config": result["config"],
                "overrides": result["overrides"],
                "classes": self.images.classes,
                "data": {
                    "classes": list(dataset.classes),
                    "image_size": dataset.image_size.plain,
                    "mean": dataset.mean.tolist(),
                    "std": dataset.std.tolist(),
                    "binary": isinstance(dataset.train, StreamedSplit) and dataset.train.binary,
                },
                "images": len(dataset.train),
                "processes": self.processes.size,
                "epoch": epochs_done,
                "partial": self.progress.as_dict() if self.progress else None,
                "best_accuracy": self.best_accuracy,
                "lines": self.writer.lines,
                **checkpoint.capture(*self.trained),
            },
        )


def _numbers(dataset: Dataset) -> str:
    """How many images there are, and how many parts of them."""
    train, test = dataset.train, dataset.test
    if (train.files, test.files) == (len(train), len(test)):
        return f"{len(train)} + {len(test)} images"
    return f"{len(train)} parts of {train.files} images + {len(test)} of {test.files}"


def _go_on() -> None:
    """What may stop, and does not."""


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.2f} %"


def _summary(line: Line, epochs: int) -> str:
    snr = f"  SNR min {snr_text(line['snr_db']['minimum'])}" if line["snr_db"] else ""
    overlap = "" if line["iou_test"] is None else f"  IoU {_percent(line['iou_test'])} test"
    return (
        f"epoch {line['epoch']:>{len(str(epochs))}}/{epochs}"
        f"  loss {line['loss_train']:.3f} train {line['loss_test']:.3f} test"
        f"  accuracy {_percent(line['accuracy_train'])} train {_percent(line['accuracy_test'])} test"
        f"{overlap}{snr}" + (f"  {line['images_per_second']:,.0f} images/s" if line["images_per_second"] else "")
    )
