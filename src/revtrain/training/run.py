"""The training loop, from top to bottom.

B images of a batch, H = W pixels a side. `train` guards, `_train` does the work in the order of its banners.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from revtrain.config import flat, read
from revtrain.errors import RevtrainError
from revtrain.machine import device as devices
from revtrain.machine import sigterm as preemption
from revtrain.machine.files import DISK_FULL
from revtrain.machine.processes import ALONE, Processes
from revtrain.models import traits
from revtrain.numerics.fidelity import FidelityWatch, summarise_gradients
from revtrain.optim import learning_rate, make_optimizer
from revtrain.runs import checkpoint
from revtrain.runs.writer import LINE_KEYS, RunWriter, SilentWriter, holds_run

log = logging.getLogger(__name__)

CHECK_EVERY = 20  # steps between two looks at the losses: each look waits for the GPU


@dataclass
class Progress:
    """How far an epoch has come: what a run that is ended within it needs to go on to the same numbers."""

    order: Tensor  # (N,) int64: the order of the training images in this epoch
    losses: Tensor  # (steps of an epoch,): the losses of the first `step` steps, then zeros
    correct: Tensor  # () int64: training images classified correctly
    step: int = 0  # steps done
    seconds: float = 0.0  # that they took

    @classmethod
    def begin(cls, images: int, steps: int, generator: torch.Generator, device: torch.device) -> Progress:
        return cls(
            order=torch.randperm(images, generator=generator),
            losses=torch.zeros(steps, device=device),
            correct=torch.zeros((), dtype=torch.int64, device=device),
        )

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_dict(cls, saved: dict[str, Any], device: torch.device) -> Progress:
        try:
            return cls(**saved | {key: saved[key].to(device) for key in ("losses", "correct")})
        except (TypeError, KeyError, AttributeError) as error:
            raise RevtrainError(
                f"resume: what the checkpoint says of the epoch under way is incomplete ({error}).\n"
                "Begin at the end of the last complete epoch: the previous.pt beside it."
            ) from error


def train(cfg: Any, run_dir: str | Path, overrides: list[str] | None = None) -> dict[str, Any]:
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
    with preemption.watching():
        return _train_watched(cfg, Path(run_dir).absolute(), list(overrides or ()))


def _train_watched(cfg: Any, run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    config = read(cfg)
    cfg = OmegaConf.create(flat(config))
    team = Processes.of_environment()
    if team.leads and holds_run(run_dir) and not _in_place(cfg, run_dir):
        raise RevtrainError(
            f"{run_dir} already holds a run; nothing of it was changed.\n"
            "Choose another folder, or leave hydra.run.dir out: each run then gets a new one."
        )
    kind = RunWriter if team.leads else SilentWriter
    report = kind(run_dir, flat(config), overrides)
    try:
        with team.failing_together():
            if team.leads:
                run_dir.mkdir(parents=True, exist_ok=True)
            report.finish(_train(cfg, run_dir, report, team))
    except KeyboardInterrupt:
        with suppress(OSError):
            report.finish("interrupted")
        raise
    except Exception as error:
        mendable = _explain(error, run_dir, report.result["overrides"])
        with suppress(OSError):  # a full disk may not take result.json either; the error itself matters more
            report.finish("failed", mendable or error)
        if mendable is None or mendable is error:
            raise
        raise mendable from error
    finally:
        team.close()
    if report.result["status"] == "completed":
        log.info("%s", report.table())
    return report.result


def _train(cfg: Any, run_dir: Path, report: RunWriter, team: Processes) -> str:
    """Do what `cfg` asks for; its status."""
    from revtrain.data import load_data
    from revtrain.planning.plan import cap_memory, make_plan

    if cfg.batch != "auto":
        team.share(cfg.batch)  # or refuse it
    device = devices.choose_device(team.device_name(cfg.device))
    devices.check_precision(device, cfg.precision)
    if cfg.plan:
        plan = make_plan(team.with_share(cfg), device)
        report.planned(plan)
        report.result["device"] = devices.describe(device)
        log.info("%s", plan.table())
        return "planned"
    team.connect(device)
    resumed = checkpoint.load(cfg.resume) if cfg.resume is not None else None
    if resumed is not None and cfg.batch == "auto":  # as it was: what fits now may be another number
        cfg = OmegaConf.merge(cfg, {"batch": resumed["config"]["batch"]})
        report.result["config"]["batch"] = cfg.batch

    # ---- data: uint8 on the host; one generator decides order and augmentation -------------------
    with team.first_of_machine_first():
        data = load_data(read(cfg).data)
    classes, size, available = len(data.classes), data.image_size, len(data.train.labels)
    if cfg.batch != "auto" and cfg.batch > available:
        raise RevtrainError(
            f"batch={cfg.batch} was given; the training set has {available} images.\nUse batch={available} or less."
        )
    if cfg.batch == "auto" or cfg.memory_limit is not None:
        plan = make_plan(team.with_share(cfg), device, classes, size, available // team.size)
        report.planned(plan)
        batch = report.result["config"]["batch"] = team.least(plan.batch) * team.size
        if not plan.fits:
            raise team.of_one_process(plan.refusal())
        cfg = OmegaConf.merge(cfg, {"batch": batch})
        log.info("plan       batch %d needs %.1f of %.1f MiB; the largest that fits is %d",
                 plan.batch, plan.needed_bytes / devices.MIB, plan.limit_bytes / devices.MIB,
                 plan.largest_batch)  # fmt: skip
    cap_memory(cfg, device)
    generator = torch.Generator().manual_seed(cfg.seed)
    if resumed is not None:
        in_place = team.of_leader(_in_place(cfg, run_dir))
        differences = checkpoint.check_compatible(resumed, report.result["config"], classes, available, in_place)
        if resumed.get("processes", 1) != team.size:
            differences.append(f"processes: {resumed.get('processes', 1)} in the checkpoint, {team.size} now")
        for difference in differences:
            log.warning("resume     no longer bit-equal to an uninterrupted run: %s", difference)
    log.info("data       %s: %d + %d images, %dx%d, %d classes",
             cfg.data.name, available, len(data.test.labels), size, size, classes)  # fmt: skip

    try:
        with preemption.deferred():
            _fit(cfg, run_dir, report, data, device, generator, resumed, team)
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        raise _out_of_memory(cfg, classes, size, device, team) from error
    return "completed"


def _in_place(cfg: Any, run_dir: Path) -> bool:
    """Whether the run to resume is the one of this folder."""
    if cfg.resume is None:
        return False
    resumed = Path(cfg.resume)
    named = resumed.name in (checkpoint.NAME, checkpoint.PREVIOUS)
    return (resumed.parent if named else resumed).resolve() == run_dir.resolve()


def _fit(
    cfg: Any,
    run_dir: Path,
    report: RunWriter,
    data: Any,
    device: torch.device,
    generator: torch.Generator,
    resumed: dict[str, Any] | None,
    team: Processes,
) -> None:
    from revtrain.data import Draws, augment, draw_augmentation, normalise
    from revtrain.layers import unsynchronised
    from revtrain.models import build_model
    from revtrain.numerics.gradients import probe_gradients
    from revtrain.numerics.snr import probe_snr
    from revtrain.planning.predict import predict_step_memory

    images, labels = data.train.images, data.train.labels
    classes, size = len(data.classes), data.image_size
    mean, std = data.mean.to(device), data.std.to(device)
    steps_per_epoch = len(labels) // cfg.batch  # the last, incomplete batch is dropped

    # ---- model -----------------------------------------------------------------------------------
    torch.manual_seed(cfg.seed)
    model = build_model(cfg, classes=classes, image_size=size).to(device)
    network = team.wrap(model)  # what a training step calls
    memory = predict_step_memory(cfg, classes, size, team.share(cfg.batch))
    report.result.update(
        params=sum(p.numel() for p in model.parameters()),
        bytes_per_pixel=memory.bytes_per_pixel,
        memory_bytes={
            "peak": memory.peak_bytes,
            "parameters": memory.parameter_bytes,
            "gradients": memory.gradient_bytes,
            "optimizer": memory.optimizer_bytes,
            "activations": memory.activation_bytes,
        },
        device={**devices.describe(device), "processes": team.size},
    )
    log.info("model      %s: %s parameters, backward=%s, %.1f bytes per pixel; %s, %s",
             cfg.arch, f"{report.result['params']:,}", cfg.backward, memory.bytes_per_pixel,
             device if team.size == 1 else f"{team.size} processes, the first on {device}",
             cfg.precision)  # fmt: skip

    # ---- optimizer: the rate is a function of the step -------------------------------------------
    optimizer = make_optimizer(model, cfg)
    scaler = devices.make_scaler(device, cfg.precision)
    rate = learning_rate(cfg, cfg.epochs * steps_per_epoch)

    # ---- resume: weights, momentum, random states ------------------------------------------------
    start, best_accuracy, history, progress = 0, 0.0, [], None
    if resumed is not None:
        start, best_accuracy, history = resumed["epoch"], resumed["best_accuracy"], resumed["history"]
        checkpoint.restore(resumed, model, optimizer, scaler, generator, device)
        if resumed["partial"] is not None:
            progress = Progress.from_dict(resumed["partial"], device)
        log.info("resume     %s after epoch %d%s", cfg.resume, start,
                 f" and {progress.step} of {steps_per_epoch} steps" if progress else "")  # fmt: skip
        if team.leads and _in_place(cfg, run_dir):
            checkpoint.put_in_place(resumed)
    report.start(history, memory.timeline)

    # ---- probe: SNR of reconstructed activations, and gradients, on one fixed, unaugmented batch -
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[: cfg.probe.batch]
    comparing = cfg.probe.gradients

    def probe(epoch: int) -> dict[str, Any]:
        if cfg.probe.every == 0 or epoch % cfg.probe.every or not team.leads:
            return {}
        batch = normalise(images[chosen].to(device), mean, std), labels[chosen].to(device)
        with devices.autocast(device, cfg.precision), unsynchronised(model):
            found = {"snr_db": summarise_snr(probe_snr(model, *batch))}
            if comparing:
                found["gradients"] = compare_gradients(batch)
        return found

    def compare_gradients(batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any] | None:
        nonlocal comparing
        try:
            return summarise_gradients(probe_gradients(model, *batch))
        except torch.OutOfMemoryError:  # the comparison stores every activation: training goes on without it
            comparing = False
            log.warning("probe      not enough memory to store the activations of %d images: gradients are not\n"
                        "           compared from here on. Try a smaller probe.batch.", len(batch[1]))  # fmt: skip
            return None

    def save(epoch: int, progress: Progress | None = None) -> None:
        if not team.leads:
            return
        checkpoint.save(
            run_dir / checkpoint.NAME,
            {
                "config": report.result["config"],
                "overrides": report.result["overrides"],
                "classes": classes,
                "data": {
                    "classes": list(data.classes),
                    "image_size": size,
                    "mean": data.mean.tolist(),
                    "std": data.std.tolist(),
                },
                "images": len(labels),
                "processes": team.size,
                "epoch": epoch,
                "partial": progress.as_dict() if progress else None,
                "best_accuracy": best_accuracy,
                "lines": report.lines,
                **checkpoint.capture(model, optimizer, scaler, generator, device),
            },
        )

    def stop_if_asked() -> None:
        """After SIGTERM, save the epoch under way and end; no step is lost."""
        if not preemption.asked():
            return
        if progress is not None:
            _check_finite(progress.losses[: progress.step], epoch, cfg)
            _check_weights(model, epoch, cfg)
            save(epoch - 1, progress)
            log.info("stopped    SIGTERM in epoch %d, after %d of %d steps", epoch, progress.step, steps_per_epoch)
        raise preemption.Terminated

    overflows, fidelity = _Overflows(model, cfg, team), FidelityWatch(read(cfg).network)
    if resumed is None:
        first = _line(epoch=0, step=0, **probe(0))
        report.epoch(first)
        fidelity.look(first)
    save(start, progress)  # also the first epoch can be interrupted

    # ---- the loop --------------------------------------------------------------------------------
    for epoch in range(start + 1, cfg.epochs + 1):
        stop_if_asked()
        model.train()
        devices.reset_peak(device)
        if progress is None:
            progress = Progress.begin(len(labels), steps_per_epoch, generator, device)
        order, losses, correct = progress.order, progress.losses, progress.correct
        bar = tqdm(total=steps_per_epoch * cfg.batch, desc=f"epoch {epoch}/{cfg.epochs}", unit=" images",
                   disable=None, leave=False)  # fmt: skip
        bar.update(progress.step * cfg.batch)
        clock = _Clock(progress.seconds)
        with bar:
            for step in range(progress.step, steps_per_epoch):
                picked = order[step * cfg.batch : (step + 1) * cfg.batch]
                draws = draw_augmentation(cfg.batch, size, cfg.data.augment, generator)
                own = team.own(cfg.batch)  # all processes draw the same
                picked, draws = picked[own], Draws(*(draw[own] for draw in draws))
                inputs = augment(images[picked].to(device), draws, mean, std, cfg.data.augment)
                inputs = inputs.to(devices.DTYPES[cfg.precision])  # as the first convolution would
                targets = labels[picked].to(device)

                lr = rate((epoch - 1) * steps_per_epoch + step)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                with devices.autocast(device, cfg.precision):
                    logits = network(inputs)
                    loss = F.cross_entropy(logits.float(), targets, label_smoothing=cfg.label_smoothing)
                scaler.scale(loss).backward()
                if cfg.clip_grad_norm is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad_norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad(set_to_none=True)

                losses[step] = team.mean(loss.detach())
                correct += team.sum((logits.detach().argmax(1) == targets).sum())
                del inputs, logits, loss  # or they would still be there when the next step makes its own
                bar.update(cfg.batch)
                progress.step, progress.seconds = step + 1, clock.seconds()
                stop_if_asked()
                if (step + 1) % CHECK_EVERY == 0:
                    _check_finite(losses[: step + 1], epoch, cfg)
                    if not bar.disable:
                        done = (step + 1) * cfg.batch
                        bar.set_postfix(loss=f"{losses[: step + 1].mean().item():.3f}",
                                        accuracy=f"{correct.item() / done:.3f}")  # fmt: skip
            devices.synchronize(device)
        seconds = progress.seconds = clock.seconds()
        peak = devices.peak_vram_mib(device)
        _check_finite(losses, epoch, cfg)
        _check_weights(model, epoch, cfg)
        overflows.warn_once(epoch)

        # -- after the epoch: test, probe, report, checkpoint
        loss_test, accuracy_test = evaluate(model, data.test, cfg, mean, std, device, team, stop_if_asked)
        best_accuracy = max(best_accuracy, accuracy_test)
        trained = steps_per_epoch * cfg.batch
        line = _line(
            epoch=epoch,
            step=epoch * steps_per_epoch,
            lr=rate(epoch * steps_per_epoch - 1),
            loss_train=losses.mean().item(),
            loss_test=loss_test,
            accuracy_train=correct.item() / trained,
            accuracy_test=accuracy_test,
            train_images=trained,
            train_seconds=seconds,
            images_per_second=trained / seconds if seconds else None,
            **probe(epoch),
            stream_overflows=overflows.count() if overflows.applies else None,
            peak_vram_mib=peak,
        )
        report.epoch(line)
        fidelity.look(line)
        progress = None
        save(epoch)
        log.info("%s", _summary(line, cfg.epochs))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    split: Any,
    cfg: Any,
    mean: Tensor,
    std: Tensor,
    device: torch.device,
    team: Processes = ALONE,
    after_batch: Callable[[], None] = lambda: None,
) -> tuple[float, float]:
    """Mean loss and accuracy (0..1) over a whole split (`.images`, `.labels`), unaugmented, in eval mode.

    The processes of `team` take turns at the batches; all return the whole split's figures. `after_batch` is called
    after each batch and may raise, to stop.
    """
    from revtrain.data import normalise

    model.eval()
    loss = torch.zeros((), dtype=torch.float64)
    correct = 0
    share = team.share(cfg.batch)
    batches = list(zip(split.images.split(share), split.labels.split(share), strict=True))
    for images, labels in batches[team.rank :: team.size]:
        labels = labels.to(device)
        with devices.autocast(device, cfg.precision):
            logits = model(normalise(images.to(device), mean, std)).float()
        loss += F.cross_entropy(logits, labels, reduction="sum").cpu()
        correct += (logits.argmax(1) == labels).sum().item()
        after_batch()
    total = team.add_up({"loss": loss.item(), "correct": correct})
    return total["loss"] / len(split.labels), total["correct"] / len(split.labels)


def summarise_snr(layers: dict[str, float]) -> dict[str, Any] | None:
    """{"minimum", "minimum_layer", "layers"} in dB; None without layers."""
    if not layers:
        return None
    worst = min(layers, key=layers.__getitem__)
    return {"minimum": layers[worst], "minimum_layer": worst, "layers": layers}


def _line(**measured: Any) -> dict[str, Any]:
    """A line of metrics.jsonl: always the same keys, null where nothing was measured."""
    return {**dict.fromkeys(LINE_KEYS), **measured}


def _summary(line: dict[str, Any], epochs: int) -> str:
    snr = f"  SNR min {line['snr_db']['minimum']:.1f} dB" if line["snr_db"] else ""
    return (
        f"epoch {line['epoch']:>{len(str(epochs))}}/{epochs}"
        f"  loss {line['loss_train']:.3f} train {line['loss_test']:.3f} test"
        f"  accuracy {100 * line['accuracy_train']:.2f} % train {100 * line['accuracy_test']:.2f} % test"
        f"{snr}" + (f"  {line['images_per_second']:,.0f} images/s" if line["images_per_second"] else "")
    )


class _Clock:
    """Seconds since it was made, from a given number on; never fewer than that, whatever the clock does."""

    def __init__(self, seconds: float):
        self.before, self.started = seconds, time.perf_counter()

    def seconds(self) -> float:
        return self.before + max(0.0, time.perf_counter() - self.started)


# ---- warnings and errors -------------------------------------------------------------------------


class _Overflows:
    """Values beyond the range of the stream's grid: integers went on with a wrong number in their place, floating
    point is no longer undone exactly."""

    def __init__(self, model: nn.Module, cfg: Any, team: Processes):
        from revtrain.models.common import state_format
        from revtrain.numerics.snr import stream_overflows

        self.applies = any(name.endswith("overflows") for name, _ in model.named_buffers())
        self.by_layer = lambda: team.add_up(stream_overflows(model))
        self.cfg, self.warned = cfg, False
        self.consequence = (
            "The network computed with wrong values there"
            if self.applies and state_format(read(cfg).network).is_integer
            else "Reconstruction is no longer exact there"
        )

    def count(self) -> int:
        return sum(self.by_layer().values())

    def warn_once(self, epoch: int) -> None:
        layers = self.by_layer() if self.applies and not self.warned else {}
        if layers:
            self.warned = True
            worst = max(layers, key=layers.__getitem__)
            log.warning(
                "stream     %d values left the range of the stream by epoch %d, most of them (%d) in %s.\n"
                "           %s. Use %sa smaller residual_scale (now %g), a lower lr, or fewer grid_bits.",
                sum(layers.values()), epoch, layers[worst], worst, self.consequence,
                "" if self.cfg.stream == "int32" else "stream=int32, ", self.cfg.residual_scale,
            )  # fmt: skip


def _check_finite(losses: Tensor, epoch: int, cfg: Any) -> None:
    """Raise on the first loss of this epoch that is NaN or infinite."""
    bad = (~torch.isfinite(losses)).nonzero()
    if len(bad):
        step = int(bad[0])
        raise _diverged(f"the loss became {losses[step].item()} at step {step + 1} of epoch {epoch}", epoch, cfg)


def _check_weights(model: nn.Module, epoch: int, cfg: Any) -> None:
    """Raise when the last step of an epoch left NaN or infinity in the weights or running statistics."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise _diverged(f"{name} was no longer finite at the end of epoch {epoch}", epoch, cfg)


def _diverged(what: str, epoch: int, cfg: Any) -> RevtrainError:
    ways = [f"a lower rate, as in lr={cfg.lr / 4:g}", "clip_grad_norm=1"]
    if cfg.backward == "invert" and traits(cfg.arch).reversible:
        ways += ["a larger slope or epsilon_i", "backward=store to see whether the inversion is to blame"]
    if cfg.precision != "fp32":
        ways.append("precision=fp32")
    good = f"epoch {epoch - 1}" if epoch > 1 else "the start: no epoch was completed"
    return RevtrainError(f"Training stopped: {what}.\nlast.pt holds {good}.\nTry {', or '.join(ways)}.")


def _explain(error: Exception, run_dir: Path, overrides: list[str]) -> RevtrainError | None:
    """What the user can do about an error from below; None where it is a bug of ours."""
    if isinstance(error, RevtrainError):
        return error
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return RevtrainError(
            f"The disk is full: a file in {run_dir} could not be written ({error.strerror}).\n"
            "What last.pt held before is still whole. Make room, then continue:\n"
            f"{checkpoint.command(overrides, run_dir)}"
        )
    if isinstance(error, OSError) and error.filename:
        at = Path(error.filename).absolute()
        if at == run_dir or at in run_dir.parents or run_dir in at.parents:
            if error.errno == errno.ENOENT and not run_dir.exists():
                return RevtrainError(
                    f"{run_dir} was deleted while the run was writing to it; what it held is gone.\n"
                    "Run the same command again."
                )
            return RevtrainError(
                f"{error.filename}: {error.strerror}. The run's files go to {run_dir}.\n"
                "Choose another folder with hydra.run.dir=FOLDER, or give yourself the right to write there."
            )
    return None


def _is_out_of_memory(error: Exception) -> bool:
    # the CPU's allocator and Apple's raise a plain RuntimeError
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and any(text in str(error) for text in ("can't allocate memory", "not enough memory", "out of memory"))
    )


def _out_of_memory(cfg: Any, classes: int, size: int, device: torch.device, team: Processes) -> RevtrainError:
    """Say how large a batch would fit: a step's peak grows linearly with the batch, so two sizes tell."""
    from revtrain.planning.plan import limit_bytes
    from revtrain.planning.predict import predict_step_memory

    cfg = team.with_share(cfg)
    small = max(2, cfg.batch // 2)
    large = 2 * small
    low, high = (predict_step_memory(cfg, classes, size, batch).peak_bytes for batch in (small, large))
    per_image = (high - low) / (large - small)
    fixed = low - per_image * small
    available = limit_bytes(cfg, device) or devices.available_bytes(device)
    # a tenth is left to the allocator's rounding and the workspace of the convolutions
    fits = min(int((0.9 * available - fixed) / per_image), cfg.batch - 1)
    fits -= fits % 8 if fits > 8 else 0

    def mib(size: float) -> str:
        return f"{size / devices.MIB:,.0f} MiB"

    if fits >= 2:
        advice = f"A batch of about {fits} would fit: batch={fits}."
    else:
        advice = "No batch fits: choose a smaller width, or a smaller depth."
    if cfg.backward == "store" or not traits(cfg.arch).reversible:
        advice += " With backward=invert, arch=hybrid needs far less."
    return team.of_one_process(
        RevtrainError(
            f"{device} is out of memory: arch={cfg.arch} width={cfg.width} batch={cfg.batch} at {size}x{size}\n"
            f"needs about {mib(fixed + per_image * cfg.batch)}; {mib(available)} are available of "
            f"{mib(devices.total_memory_bytes(device))}.\n{advice}"
        )
    )
