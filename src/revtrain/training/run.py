"""Training, from top to bottom: `train` is the door, `Session` what comes before and after, `Run` the training itself.

The configuration is read once, at the door. B images of a batch, H = W pixels a side.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from revtrain import data, models
from revtrain.config import Config, flat, read
from revtrain.data import Dataset
from revtrain.machine import device as devices
from revtrain.machine import sigterm
from revtrain.machine.processes import Processes
from revtrain.models import Images
from revtrain.numerics.fidelity import FidelityWatch
from revtrain.optim import learning_rate, make_optimizer
from revtrain.planning import plan as planning
from revtrain.planning import predict
from revtrain.planning.predict import StepTimeline
from revtrain.runs import checkpoint
from revtrain.runs.schema import Line, Result, Status
from revtrain.runs.writer import LINE_KEYS, RunWriter, SilentWriter, holds_run
from revtrain.training import errors
from revtrain.training.evaluate import evaluate
from revtrain.training.forecast import Forecast
from revtrain.training.overflows import OverflowWatch
from revtrain.training.probe import Probe
from revtrain.training.progress import Clock, Progress

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
        revtrain.machine.sigterm.Terminated: SIGTERM; last.pt holds the last completed step, also within an epoch.
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
            mendable = errors.explain(error, self.run_dir, self.overrides)
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
        device = devices.choose_device(processes.device_name(machine.device))
        devices.check_precision(device, self.config.network.precision)
        if machine.plan:
            plan = planning.make_plan(own_share, device)
            writer.planned(plan)
            writer.result["device"] = devices.describe(device)
            log.info("%s", plan.table())
            return "planned"
        processes.connect(device)
        resumed = checkpoint.load(machine.resume) if machine.resume is not None else None
        with processes.first_of_machine_first():
            dataset = data.load_data(self.config.data)
        images, available = Images(len(dataset.classes), dataset.image_size), len(dataset.train.labels)
        batch = self.settle_batch(images, available, resumed, device)
        planning.cap_memory(machine.memory_limit, device)
        if resumed is not None:
            self.check_resumed(resumed, images, available)
        log.info("data       %s: %d + %d images, %dx%d, %d classes", self.config.data.name, available,
                 len(dataset.test.labels), images.size, images.size, images.classes)  # fmt: skip
        try:
            with sigterm.deferred():
                Run(self, batch, dataset, device).train(resumed)
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
        config, processes = session.config, session.processes
        training, precision = config.training, config.network.precision
        self.session, self.config, self.writer, self.processes = session, config, session.writer, processes
        self.run_dir, self.batch, self.dataset, self.device = session.run_dir, batch, dataset, device
        self.epochs, self.precision = training.epochs, precision
        self.steps = len(dataset.train.labels) // batch  # of an epoch; the last, incomplete batch is dropped
        self.images = Images(len(dataset.classes), dataset.image_size)
        self.mean, self.std = dataset.mean.to(device), dataset.std.to(device)

        torch.manual_seed(config.machine.seed)
        self.model: nn.Module = models.build(config.network, self.images).to(device)
        self.wrapped = processes.wrap(self.model)  # what a step calls: the model, its gradients averaged
        self.generator = torch.Generator().manual_seed(config.machine.seed)  # of order and augmentation
        self.optimizer = make_optimizer(self.model, training)
        self.scaler = devices.make_scaler(device, precision)
        self.rate = learning_rate(training, self.epochs * self.steps)

        self.probe = Probe(config.probe, dataset.train)
        self.probe_seconds: float | None = None  # that the last one took
        self.overflows = OverflowWatch(self.model, config.network, processes)
        self.fidelity = FidelityWatch(config.network)

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
            self.epoch = epoch
            self.stop_if_asked()
            line = self.record(self.measure(self.train_epoch()))
            self.progress = None
            self.save(epoch)
            log.info("%s", _summary(line, self.epochs))

    # ---- the beginning -----------------------------------------------------------------------------------

    def describe(self) -> StepTimeline:
        """Record the network's size and the memory that a step needs; its course over one step."""
        network, images, result = self.config.network, self.images, self.writer.result
        memory = predict.predict_step_memory(self.config, images.classes, images.size, self.processes.share(self.batch))
        result["params"] = sum(p.numel() for p in self.model.parameters())
        result["bytes_per_pixel"] = memory.bytes_per_pixel
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

    def resume(self, saved: dict[str, Any]) -> list[Line]:
        """Go on from a checkpoint, also from within an epoch; the lines of metrics.jsonl up to there."""
        self.epoch, self.best_accuracy = saved["epoch"], saved["best_accuracy"]
        checkpoint.restore(saved, self.model, self.optimizer, self.scaler, self.generator, self.device)
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
            evaluation_steps=len(left) * len(self.dataset.test.labels) / self.batch / (4 if rebuilds else 3),
            probes=sum(map(self.probe.is_due, left)),
            probe_steps=(3 if self.probe.gradients else 1) * len(self.probe.labels) / share,
            probe_seconds=self.probe_seconds,
            what=f"{'the rest of ' if resumed else ''}{self.epochs} epochs",
            silent=not self.processes.leads,
        )

    # ---- an epoch ----------------------------------------------------------------------------------------

    def train_epoch(self) -> Progress:
        """The steps of the epoch under way, or those that are left of it."""
        if self.progress is None:
            self.progress = Progress.begin(len(self.dataset.train.labels), self.steps, self.generator, self.device)
        progress = self.progress
        self.model.train()
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
                self.stop_if_asked()
                looks = (step + 1) % CHECK_EVERY == 0
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
        """One step of the optimizer; nothing of its batch is alive afterwards."""
        training = self.config.training
        inputs, targets = self.draw(progress.order[step * self.batch : (step + 1) * self.batch])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate((self.epoch - 1) * self.steps + step)
        with devices.autocast(self.device, self.precision):
            logits = self.wrapped(inputs)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=training.label_smoothing)
        self.scaler.scale(loss).backward()
        if training.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), training.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        progress.losses[step] = self.processes.mean(loss.detach())
        progress.correct += self.processes.sum((logits.detach().argmax(1) == targets).sum())

    def draw(self, picked: Tensor) -> tuple[Tensor, Tensor]:
        """The augmented images (B, 3, H, W) and labels (B,) of this process, of the training images `picked` (B,)."""
        augmentation, own = self.config.data.augment, self.processes.own(self.batch)
        draws = data.draw_augmentation(self.batch, self.images.size, augmentation, self.generator)
        picked, draws = picked[own], data.Draws(*(draw[own] for draw in draws))  # all processes draw the same
        images = self.dataset.train.images[picked].to(self.device)
        inputs = data.augment(images, draws, self.mean, self.std, augmentation)
        # in the precision of the first convolution, as autocast would make them
        return inputs.to(devices.DTYPES[self.precision]), self.dataset.train.labels[picked].to(self.device)

    def look(self, progress: Progress, bar: tqdm) -> None:
        """Wait for the device and look at the losses so far."""
        losses = progress.losses[: progress.step]
        errors.check_finite(losses, self.epoch, self.config)
        if not bar.disable:
            accuracy = progress.correct.item() / (progress.step * self.batch)
            bar.set_postfix(loss=f"{losses.mean().item():.3f}", accuracy=f"{accuracy:.3f}")

    def check(self, progress: Progress) -> None:
        """Raise where the epoch so far has left anything that is not finite: it must not be saved."""
        errors.check_finite(progress.losses[: progress.step], self.epoch, self.config)
        errors.check_weights(self.model, self.epoch, self.config)

    def stop_if_asked(self) -> None:
        """After SIGTERM, save the epoch under way and end; no step is lost."""
        if not sigterm.asked():
            return
        if self.progress is not None:
            self.check(self.progress)
            self.save(self.epoch - 1)
            log.info("stopped    SIGTERM in epoch %d, after %d of %d steps",
                     self.epoch, self.progress.step, self.steps)  # fmt: skip
        raise sigterm.Terminated

    # ---- after an epoch ----------------------------------------------------------------------------------

    def measure(self, progress: Progress) -> dict[str, Any]:
        """The line of metrics.jsonl for the epoch whose steps are done."""
        trained, seconds = self.steps * self.batch, progress.seconds
        peak = devices.peak_vram_mib(self.device)
        loss_test, accuracy_test = evaluate(
            self.model, self.dataset.test, self.batch, self.normalised, self.precision, self.device, self.processes,
            self.stop_if_asked,
        )  # fmt: skip
        self.best_accuracy = max(self.best_accuracy, accuracy_test)
        return {
            "epoch": self.epoch,
            "step": self.epoch * self.steps,
            "lr": self.rate(self.epoch * self.steps - 1),
            "loss_train": progress.losses.mean().item(),
            "loss_test": loss_test,
            "accuracy_train": progress.correct.item() / trained,
            "accuracy_test": accuracy_test,
            "train_images": trained,
            "train_seconds": seconds,
            "images_per_second": trained / seconds if seconds else None,
            **self.measure_probe(),
            "stream_overflows": self.overflows.count(),
            "peak_vram_mib": peak,
        }

    def measure_probe(self) -> dict[str, Any]:
        """Its part of a line, where a probe is due; the first process alone takes it."""
        if not (self.processes.leads and self.probe.is_due(self.epoch)):
            return {}
        clock = Clock()
        found = self.probe.measure(self.model, self.normalised(self.probe.images), self.device, self.precision)
        self.probe_seconds = clock.seconds()
        return found

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images (B, 3, H, W) on the CPU -> float32, of zero mean and unit deviation, on the device."""
        return data.normalise(images.to(self.device), self.mean, self.std)

    def record(self, measured: dict[str, Any]) -> Line:
        """Write a line of metrics.jsonl, always with the same keys: null where nothing was measured."""
        line = cast(Line, {**dict.fromkeys(LINE_KEYS), **measured})
        self.writer.epoch(line)
        self.fidelity.look(line)
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
                    "image_size": self.images.size,
                    "mean": dataset.mean.tolist(),
                    "std": dataset.std.tolist(),
                },
                "images": len(dataset.train.labels),
                "processes": self.processes.size,
                "epoch": epochs_done,
                "partial": self.progress.as_dict() if self.progress else None,
                "best_accuracy": self.best_accuracy,
                "lines": self.writer.lines,
                **checkpoint.capture(self.model, self.optimizer, self.scaler, self.generator, self.device),
            },
        )


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.2f} %"


def _summary(line: Line, epochs: int) -> str:
    snr = f"  SNR min {line['snr_db']['minimum']:.1f} dB" if line["snr_db"] else ""
    return (
        f"epoch {line['epoch']:>{len(str(epochs))}}/{epochs}"
        f"  loss {line['loss_train']:.3f} train {line['loss_test']:.3f} test"
        f"  accuracy {_percent(line['accuracy_train'])} train {_percent(line['accuracy_test'])} test"
        f"{snr}" + (f"  {line['images_per_second']:,.0f} images/s" if line["images_per_second"] else "")
    )
