"""The memory of a run, known before it starts: does it fit, and what is the largest batch that does?

A plan predicts the peak of one training step by running the step on fake tensors, which have shapes but no
storage (see `revtrain.memory.live`). It has to answer at once, also for thousands of images and for deep networks,
so `StepPredictor` leaves out what repeats: a loop allocates and frees the same in each of its rounds. What is
left out changes no peak by more than a few numbers a channel; tests hold it to the full prediction.

What a plan promises is about live bytes: exact on the CPU, where the allocator's own use comes on top. On CUDA a
margin is kept for what the count of live bytes cannot see, see `margin_bytes`. The data set lies in main memory and
counts only as far as it is copied to a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from omegaconf import DictConfig

from revtrain.config import Config, DataConfig, ImageSize, Network, ProbeConfig, parse_memory, read, registry
from revtrain.data import Facts
from revtrain.errors import RevtrainError
from revtrain.machine import device as devices
from revtrain.memory.closed_form import MemoryModel
from revtrain.models import Images, analytic_memory, for_task, traits
from revtrain.planning.cost import CARDS, step_cost
from revtrain.planning.predict import StepPredictor, pieces_of_state

MIB = 2**20
LEAST_BATCH = 1
MOST_COUNTED = 20  # pieces of a state whose operations are counted one by one
STRAIGHT_TRIES = 6  # along the line; from then on the search halves the interval
MOST_IMAGES = 2**24  # where the size of the training set is not known
# A closed form is good to a few per cent: an architecture is recommended with a tenth to spare.
SPARE = 1.1
PROBE_PIXELS = 64**3  # that a probe may have at any rate: 64 images of 64 x 64
MARGIN_SHARE, LEAST_MARGIN_BYTES = 0.1, 64 * MIB  # on CUDA

# ---- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run needs and what it may have; see `make_plan`. Sizes in bytes; None where not asked for."""

    arch: str
    width: int
    depth: int
    backward: str
    precision: str
    device: str
    batch: int  # of a step of the optimizer
    accumulate: int  # micro-batches of it
    image_size: ImageSize
    classes: int
    training_images: int | None  # no batch is larger; None: not known
    parameters: int  # how many
    parameter_bytes: int  # running statistics included
    gradient_bytes: int  # of the parameters, as far as they exist at the peak
    optimizer_bytes: int
    activation_bytes: int  # bytes_per_pixel * batch * height * width
    bytes_per_pixel: float  # slope of the peak between this batch and another, much larger or smaller
    buffer_bytes: int  # of a step: which images it takes and how each is changed, loss and hits
    scratch_bytes: int  # what does not grow with the batch: temporaries of chunks, of the optimizer
    peak_bytes: int  # the sum of the six above
    loop_bytes: int  # what lies beside every step: see `loop_bytes`
    holds_images: bool  # whether all training images lie on the GPU
    margin_bytes: int  # kept for what live bytes do not show
    limit_bytes: int | None
    limit_given: str | None  # memory_limit as written; None: what the device has free
    largest_batch: int | None  # 0: not even one image fits
    alternatives: tuple[str, ...]  # command-line words, for a run that does not fit
    assumptions: tuple[str, ...]  # what was not known without the data
    cost: dict[str, Any] | None = None  # of the step on a GPU, where it was asked for: see `with_cost`

    @property
    def needed_bytes(self) -> int:
        """The step, what lies beside it, and the margin."""
        return self.peak_bytes + self.loop_bytes + self.margin_bytes

    @property
    def fits(self) -> bool | None:
        """Whether the run keeps within the limit; None without one."""
        return None if self.limit_bytes is None else self.needed_bytes <= self.limit_bytes

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, for result.json."""
        plain = asdict(self) | {"fits": self.fits, "image_size": self.image_size.plain}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}

    def table(self) -> str:
        """The plan for a terminal, sizes in MiB."""
        rows = [
            ("parameters", _mib(self.parameter_bytes), f"{self.parameters:,}, with running statistics"),
            ("gradients", _mib(self.gradient_bytes), "of the parameters"),
            ("optimizer", _mib(self.optimizer_bytes), "momentum; with ema_decay the average of the weights"),
            ("activations", _mib(self.activation_bytes), f"{self.bytes_per_pixel:.1f} bytes per pixel"),
            ("buffers", _mib(self.buffer_bytes), "choices of a batch, loss, hits"),
            ("scratch", _mib(self.scratch_bytes), "does not grow with the batch"),
            ("predicted peak", _mib(self.peak_bytes), "live bytes of a training step"),
            ("loop", _mib(self.loop_bytes), self._loop()),
        ]
        if self.margin_bytes:
            rows.append(("margin", _mib(self.margin_bytes), "workspace of convolutions, rounding of the allocator"))
        if self.limit_bytes is not None:
            source = f"memory_limit={self.limit_given}" if self.limit_given else f"free on {self.device}"
            rows.append(("limit", _mib(self.limit_bytes), source))
            rows.append(("fits", "yes" if self.fits else "no", self._verdict()))
            most = f"the training set has {self.training_images:,} images" if self.training_images else ""
            rows.append(("largest batch", f"{self.largest_batch:,}" if self.largest_batch else "none", most))
        if self.cost is not None:
            moved, products = self.cost["bytes_moved"] / 1e9, self.cost["multiplications"] / 1e12
            what = f"operations on a GPU; {moved:.1f} GB read and written, {products:.2f} T multiplications"
            rows.append(("a step", f"{self.cost['operations']:,}", what))
            for card, milliseconds in self.cost["estimated_ms"].items():
                rows.append(("", f"{milliseconds:.0f} ms", f"estimated on {card}, as a CUDA graph"))
        if self.alternatives:
            rows.append(("would fit", "", f"at batch={self.batch}: {'; '.join(self.alternatives)}"))
        rows += [("assumed", "", each) for each in self.assumptions]
        title = (
            f"plan: {self.arch}, width {self.width}, depth {self.depth}, backward={self.backward}, {self.precision}, "
            f"{self.device}; batch {self.batch:,}{self._micro()} of {self.image_size}"
        )
        rule = "-" * len(title)
        lines = [f"  {name:<14}  {value:>14}  {text}".rstrip() for name, value, text in rows]
        return "\n".join([rule, title, *lines, rule])

    def refusal(self) -> RevtrainError:
        """Why the run may not start, and what to do instead."""
        limit = _mib(self.limit_bytes or 0)
        asked = f"memory_limit={self.limit_given}" if self.limit_given else f"{self.device}: {limit}"
        margin = f" and a margin of {_mib(self.margin_bytes)}" if self.margin_bytes else ""
        lines = [
            f"{asked} is too little for arch={self.arch} width={self.width} batch={self.batch}{self._micro()} at "
            f"{self.image_size}:",
            f"a training step needs {_mib(self.peak_bytes + self.loop_bytes)}{margin}; the limit is {limit}.",
        ]
        if self.largest_batch:
            lines.append(f"The largest batch that fits is batch={self.largest_batch}; batch=auto takes it.")
        else:
            held = self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes
            lines.append(
                f"No batch fits: weights, gradients and momentum take {_mib(held)}. Choose a smaller width or depth."
            )
        if self.alternatives:
            lines.append(f"At batch={self.batch} would fit: {'; '.join(self.alternatives)}.")
        return RevtrainError("\n".join(lines))

    def _micro(self) -> str:
        return f" in {self.accumulate} micro-batches" if self.accumulate > 1 else ""

    def _loop(self) -> str:
        if self.device == "cpu":
            return "order and losses of an epoch, images of the probe; the data set apart"
        return "the training images" if self.holds_images else "two batches of images, copied from main memory"

    def _verdict(self) -> str:
        rest = (self.limit_bytes or 0) - self.needed_bytes
        return f"{_mib(abs(rest))} {'to spare' if rest >= 0 else 'too much'}"


def plan(cfg: DictConfig | Mapping[str, Any] | Config) -> Plan:
    """What the run that `cfg` describes needs of memory on its device, without looking at its data: `plan=true`.

    Raises:
        RevtrainError: see `make_plan`; or the device is absent.
    """
    config = read(cfg)
    return make_plan(config, devices.choose_device(config.machine.device))


def make_plan(
    cfg: DictConfig | Config,
    device: torch.device,
    classes: int | None = None,
    image_size: int | Sequence[int] | None = None,
    training_images: int | None = None,
) -> Plan:
    """The plan of a run, without its data.

    Args:
        cfg: the configuration, composed or read; `batch=auto` becomes the largest batch that fits, `memory_limit` or,
            on CUDA, the free memory is the limit.
        device: where the run will be. On CUDA a margin is kept, see `margin_bytes`.
        classes, image_size, training_images: of the data; None: what `cfg.data` tells, or else 10 classes,
            32x32 pixels and no bound, which `Plan.assumptions` then says.

    Raises:
        RevtrainError: `batch=auto` without any limit, or no batch fits it; a batch larger than the training set;
            a network that cannot be built.
    """
    config = on_device(read(cfg), device)
    network, batch, unit = config.network, config.training.batch, config.training.accumulate
    given = batch if isinstance(batch, int) else None  # None: batch=auto
    assumptions: list[str] = []
    if classes is None or image_size is None:
        classes, image_size, training_images, assumptions = _without_data(config.data)
    size = ImageSize.of(image_size)
    images = Images(classes, size)
    if given is not None:
        check_batch(given, training_images)
    limit = limit_bytes(config.machine.memory_limit, device)
    if limit is None and given is None:
        raise RevtrainError(
            f"batch=auto was given without a limit; on {device.type} there is no card whose memory to fill.\n"
            "Add one, as in memory_limit=4GiB, or give a number, as in batch=512."
        )
    margin = margin_bytes(device, limit)
    predict = StepPredictor(config, classes, size, planned_for=device.type)

    def peak(batch: int) -> int:
        return predict(batch).peak

    def needed(batch: int, room: int = 0) -> int:
        return peak(batch) + loop_bytes(config, device, batch, size, training_images, room)[0] + margin

    largest = None
    if limit is not None:
        per_image, guess = _first_guess(config, images, limit - margin)
        first = guess // 2 if given is None else given // unit  # both serve for the slope as well
        most = (training_images or MOST_IMAGES) // unit
        largest = unit * largest_batch(lambda micro: needed(unit * micro), limit, most, per_image, first)
    batch = given or largest or LEAST_BATCH * unit  # where nothing fits, the numbers of the smallest batch say why
    fits = limit is None or needed(batch) <= limit
    room = max(0, limit - margin - peak(batch)) if limit is not None else 0
    beside, holds_images = loop_bytes(config, device, batch, size, training_images, room)
    plan = Plan(
        arch=network.arch,
        width=network.width or 0,
        depth=network.depth or 0,
        backward=network.backward,
        precision=network.precision,
        device=str(device),
        batch=batch,
        accumulate=unit,
        image_size=size,
        classes=classes,
        training_images=training_images,
        parameters=predict.parameters,
        **_terms(predict, batch),
        loop_bytes=beside,
        holds_images=holds_images,
        margin_bytes=margin,
        limit_bytes=limit,
        limit_given=config.machine.memory_limit,
        largest_batch=largest,
        alternatives=() if fits or limit is None else alternatives(config, images, batch // unit, limit - margin),
        assumptions=tuple(assumptions),
    )
    if given is None and not largest:
        raise plan.refusal()
    return plan


def with_cost(plan: Plan, config: Config) -> Plan:
    """`plan` with what its step costs on a GPU, counted (see `revtrain.planning.cost`).

    As it is where a state is so many pieces that the count would take more than some seconds.
    """
    config = on_device(config, torch.device("cuda"))
    if pieces_of_state(config, plan.batch, plan.image_size, "cuda") > MOST_COUNTED:
        return plan
    counted = step_cost(config, plan.batch, plan.classes, plan.image_size)
    estimated = {card.name: 1e3 * counted.seconds(card, plan.precision != "fp32") for card in CARDS}
    return replace(
        plan,
        cost={
            "operations": counted.launches,
            "bytes_moved": counted.total_bytes,
            "multiplications": counted.multiplications,
            "estimated_ms": estimated,
        },
    )


def on_device(config: Config, device: torch.device) -> Config:
    """The configuration with what `auto` means on `device`."""
    return replace(config, network=replace(config.network, chunk_mib=config.network.piece_mib(device.type)))


def _terms(predict: StepPredictor, batch: int) -> dict[str, Any]:
    """The parts of a plan's peak, by the names that `Plan` has for them; they add up to it."""
    unit = predict.accumulate
    known = [other for other in predict.known if not batch / 1.5 < other < batch * 1.5]
    others = known or [batch // 2 // unit * unit or 2 * batch]
    step, other = predict(batch), predict(others[0])
    per_image = (step.peak - step.buffers - other.peak + other.buffers) / (batch - others[0])
    activations = round(per_image * batch)
    rest = step.peak - step.parameters - step.gradients - step.optimizer - step.buffers - activations
    return {
        "parameter_bytes": step.parameters,
        "gradient_bytes": step.gradients + min(0, rest),  # a peak before the last gradients are there
        "optimizer_bytes": step.optimizer,
        "activation_bytes": activations,
        "bytes_per_pixel": per_image / predict.image_size.pixels,
        "buffer_bytes": step.buffers,
        "scratch_bytes": max(0, rest),
        "peak_bytes": step.peak,
    }


def check_batch(batch: int, training_images: int | None) -> None:
    """Refuse a batch that is larger than the training set.

    Args:
        training_images: how many there are; None: not known, nothing is refused.
    """
    if training_images is not None and batch > training_images:
        raise RevtrainError(
            f"batch={batch} was given; the training set has {training_images} images.\n"
            f"Use batch={training_images} or less."
        )


def limit_bytes(memory_limit: str | None, device: torch.device) -> int | None:
    """The memory that a run may use: `memory_limit`, on CUDA no more than is free; None: no limit."""
    given = None if memory_limit is None else parse_memory(memory_limit)
    if device.type != "cuda":
        return given
    free = devices.available_bytes(device)
    return free if given is None else min(given, free)


def loop_bytes(
    config: Config,
    device: torch.device,
    batch: int,
    image_size: int | Sequence[int],
    training_images: int | None,
    room: int = 0,
) -> tuple[int, bool]:
    """(bytes on the device that lie beside every step of a loop, whether all training images are among them).

    On a GPU those images where they fit, or two batches of them, and the losses of an epoch. On the CPU the losses, the
    order of the images and those of the probe: the data set itself lies in main memory whatever the device. Of images
    that are streamed one batch lies on the device; on the CPU there are the one that is read ahead, and the files'
    parts that it is put together from.

    Args:
        training_images: None: not known; what depends on it is left out.
        room: what the step and the margin leave of the limit.
    """
    pixels = ImageSize.of(image_size).pixels
    image_bytes = 3 * pixels + (pixels if config.network.task == "segment" else 8)  # uint8, and labels
    count = training_images or 0
    losses = 4 * (count // batch) + 8  # and the hits
    if device.type == "cpu":
        probe = config.probe
        images = probe_images(probe, batch, pixels)
        probed = image_bytes * min(images, count or images) if probe.every else 0
        return losses + 8 * count + probed + (3 * image_bytes * batch if config.data.streams else 0), False
    if config.data.streams:
        return losses + image_bytes * batch, False
    whole, two = image_bytes * count, 2 * image_bytes * batch
    holds = 0 < whole <= max(room, two)
    return losses + (whole if holds else two), holds


def probe_images(probe: ProbeConfig, batch: int, pixels: int) -> int:
    """How many images a probe takes: as many as it is asked for, but of large ones no more than a step does. It stores
    activations, which of many large images fit nowhere.

    Args:
        batch: images of a step. pixels: of an image.
    """
    return min(probe.batch, max(2, batch, PROBE_PIXELS // pixels))


def room_bytes(peak_bytes: int, memory_limit: str | None, device: torch.device) -> int:
    """What a GPU has left for the images beside a step of `peak_bytes`, and its margin; 0 elsewhere."""
    limit = limit_bytes(memory_limit, device) if device.type == "cuda" else None
    return 0 if limit is None else max(0, limit - peak_bytes - margin_bytes(device, limit))


def margin_bytes(device: torch.device, limit: int | None) -> int:
    """What a plan leaves free on CUDA: a tenth of the limit, at least 64 MiB; nothing elsewhere.

    It is for what the count of live bytes cannot see: the workspace of convolutions and of matrix products (up to
    32 MiB for the latter), and the allocator's rounding to blocks of 2 MiB, with the gaps between them.
    """
    if device.type != "cuda" or limit is None:
        return 0
    return max(LEAST_MARGIN_BYTES, round(MARGIN_SHARE * limit))


def cap_memory(memory_limit: str | None, device: torch.device) -> None:
    """Let the allocator of a CUDA device behave like that of a card with `memory_limit`; without one, lift the cap.

    The cap is on reserved memory. The driver's own part (some 100 MiB a process) comes on top, as it would on any
    card. On other devices nothing happens.
    """
    if device.type == "cuda":
        total = devices.total_memory_bytes(device)
        limit = total if memory_limit is None else parse_memory(memory_limit)
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


# ---- the search for the largest batch ------------------------------------------------------------


def largest_batch(peak: Callable[[int], int], budget: int, most: int, per_image: float, first: int) -> int:
    """The largest batch up to `most` whose peak is within `budget`, itself predicted; 0 where one image is too many.

    The peak grows with the batch, in pieces that are nearly straight: a line through the last prediction gives the
    next, between the largest batch that is known to fit and the smallest that is known not to.

    Args:
        per_image: bytes an image, about; serves until two predictions tell better.
        first: the batch to begin with.
    """
    fits, too_large = LEAST_BATCH - 1, most + 1
    at, tried = min(max(first, LEAST_BATCH), most), 0
    while True:
        tried += 1
        if peak(at) <= budget:
            fits = at
        else:
            too_large = at
        if fits + 1 == too_large:
            return fits if fits >= LEAST_BATCH else 0
        before, at = at, at + int((budget - peak(at)) // per_image)
        if at == fits and tried > 1:
            return fits  # one image more is too many, by a line through two predictions
        if tried > STRAIGHT_TRIES:
            at = (fits + too_large) // 2
        at = min(max(at, fits + 1), too_large - 1)
        per_image = (peak(at) - peak(before)) / (at - before) or per_image


def _first_guess(config: Config, images: Images, budget: int) -> tuple[float, int]:
    """(bytes an image, largest batch) by the closed form; a guess where there is none."""
    model, pixels = _closed_form(config, images), ImageSize.of(images.size).pixels
    if model is None:
        return 1024.0 * pixels, 64
    lines = [(moment.bytes_per_pixel * pixels, moment.fixed_bytes) for moment in model.moments]
    batch = min((budget - fixed) / slope for slope, fixed in lines)
    return max(slope for slope, _ in lines), int(batch)


def roughly_stored(config: Config, images: Images, batch: int) -> int | None:
    """Bytes of a step of `batch` images that stores all activations, by the closed form; None where there is none."""
    model = _closed_form(replace(config, network=replace(config.network, backward="store")), images)
    return None if model is None else int(SPARE * model.peak_bytes(batch, images.size))


def _closed_form(config: Config, images: Images) -> MemoryModel | None:
    try:
        return analytic_memory(config, images.classes, images.size)
    except RevtrainError:
        return None  # an architecture without one


# ---- what would fit instead ----------------------------------------------------------------------


def alternatives(config: Config, images: Images, batch: int, budget: int) -> tuple[str, ...]:
    """Words for the command line that make a run fit at the same batch, by the closed forms, smallest first.

    Args:
        config: of the run that does not fit.
        batch: of one process.
        budget: bytes that a training step may take.
    """
    network = config.network
    stores = traits(network.arch).reversible and network.backward == "store"
    candidates = {"backward=invert": replace(network, backward="invert")} if stores else {}
    for arch in for_task(network.task):
        if arch != network.arch and (other := _as_its_yaml_has_it(arch, network)):
            also = " backward=invert" if stores and traits(arch).reversible else ""
            candidates[f"arch={arch} width={other.width}{also}"] = other
    found = []
    for words, candidate in candidates.items():
        model = _closed_form(replace(config, network=candidate), images)
        if model is not None and SPARE * (needed := model.peak_bytes(batch, images.size)) <= budget:
            found.append((needed, words))
    return tuple(f"{words} (about {_mib(needed)})" for needed, words in sorted(found))


def _as_its_yaml_has_it(arch: str, like: Network[Any]) -> Network[Any] | None:
    """The network that `arch=` alone would give, in all else like another one; None: no yaml gives it a size."""
    given, kind = registry.preset("arch", arch), registry.settings("models", arch)
    if not {"depth", "width"} <= given.keys():
        return None

    def of(part: type) -> dict[str, Any]:
        return {each.name: given[each.name] for each in fields(part) if each.name in given}

    return replace(like, **of(Network) | {"backward": "invert", "own": kind(**of(kind)) if kind else None})


# ---- the data, not looked at ---------------------------------------------------------------------


def _without_data(data: DataConfig[Any]) -> tuple[int, ImageSize, int | None, list[str]]:
    """(classes, image size, training images, what was assumed) of a data set that is not looked at."""
    source = registry.load("data", data.name)
    facts = source.facts(data) if hasattr(source, "facts") else Facts()
    classes, size = data.classes or facts.classes or 10, ImageSize.of(facts.image_size or data.image_size or 32)
    assumed = []
    unknown = {
        f"{classes} classes": ("data.classes", data.classes or facts.classes),
        f"images of {size}": ("data.image_size", facts.image_size or data.image_size),
    }
    guessed = {what: key for what, (key, known) in unknown.items() if not known}
    if guessed:
        keys = " and ".join(guessed.values())
        assumed.append(f"{' and '.join(guessed)}: data.root was not looked at. Give {keys}.")
    images = facts.training_images
    if data.train_limit is not None:
        images = min(data.train_limit, images or data.train_limit)
    return classes, size, images, assumed


def _mib(size: float) -> str:
    return f"{size / MIB:,.1f} MiB"
