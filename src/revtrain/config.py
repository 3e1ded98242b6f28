"""The typed schema of the configuration, and the checks that need no data.

This module imports neither torch nor Hydra: it is read before either is needed. `conf/` holds the values,
these classes hold the types, so `batch=abc` and a misspelt key are refused before anything runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Optional, Union, get_args, get_origin, get_type_hints  # OmegaConf reads Optional[...]

from revtrain.errors import RevtrainError

ARCHITECTURES = ("resnet18", "revnet", "irevnet", "layerwise", "hybrid", "chunked")
REVERSIBLE = ("revnet", "irevnet", "layerwise", "hybrid", "chunked")
DATASETS = ("cifar10", "imagefolder", "synthetic")
SCHEDULES = ("triangular", "onecycle", "cosine", "constant")
PRECISIONS = ("fp32", "bf16", "fp16")
BACKWARDS = ("invert", "store")
ACTIVATIONS = ("relu", "gelu", "silu", "leaky_relu")  # of arch=chunked
NORM_SIGNS = ("positive", "mixed", "negative")  # of the invertible BNs
NORMS = ("input", "hidden")  # of arch=chunked
STREAMS = ("auto", "plain", "float32", "int32", "int16")
POOLINGS = ("channel", "batch", "stride")
LARGEST_SEED = 2**63 - 1  # of torch's generators
MEMORY_UNITS = {"b": 1} | {
    f"{letter}{i}b": base**power
    for power, letter in enumerate("kmgt", start=1)
    for i, base in (("", 1000), ("i", 1024))
}


@dataclass
class AugmentConfig:
    """Training-time augmentation; the test set is never augmented."""

    pad: int = 4  # pixels of reflection before the random crop; 0: no crop
    flip: bool = True  # horizontal flip with probability 1/2
    cutout: int = 8  # side of the square set to the mean, in pixels; 0: none


@dataclass
class DataConfig:
    """Where the images come from. The group `data` chooses `name` and its defaults."""

    name: str = "synthetic"
    root: Optional[str] = None  # cifar10: where the archive lies; imagefolder: holds train/ and test/
    url: Optional[str] = None  # cifar10: a mirror of the archive
    cache: Optional[str] = None  # folder for decoded images; null: the user's cache folder
    image_size: Optional[int] = None  # side in pixels; null: as the images are
    classes: Optional[int] = None  # null: as many as the data set has
    train_limit: Optional[int] = None  # a fixed, class-balanced subset of so many images; null: all
    test_limit: Optional[int] = None
    train_images: int = 10000  # synthetic only: how many to draw
    test_images: int = 2000
    seed: int = 0  # synthetic only: the seed of the images
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass
class ProbeConfig:
    """The probe that measures the SNR of reconstructed activations, outside of the training steps."""

    batch: int = 64  # images in the probe batch
    every: int = 1  # epochs between two probes; 0: never
    gradients: bool = True  # compare every parameter's gradient with that of backward=store, too


@dataclass
class Config:
    """Everything a run depends on; `conf/` gives the values."""

    # the network
    arch: str = "hybrid"
    depth: Optional[int] = None  # reversible units in the trunk, spread over the stages
    width: Optional[int] = None  # channels at full resolution
    slope: float = 0.2  # n, negative slope of the LeakyReLU, 0 < n <= 1 (Eq. 24)
    epsilon_i: float = 0.1  # keeps |gamma| of an invertible BN away from zero (Eq. 23)
    norm_sign: str = "positive"  # of an invertible BN's gains: positive (the paper's) | mixed | negative (least noise)
    init_gain: float = 1.0  # of the coupling convolutions' initial weights, relative to torch's
    max_gain: Optional[float] = None  # bound on their largest singular value, all through training; null: none
    pooling: list[str] = field(default_factory=list)  # one entry between two stages: channel | batch | stride
    residual_scale: float = 1.0  # s in y1 = x1 + s F(x2), of the coupling blocks
    stream: str = (
        "auto"  # number format of the coupling blocks' states; auto: float32, or int16 where precision is 16 bit
    )
    grid_bits: Optional[int] = None  # their values are multiples of 2^-grid_bits; null: the stream's own, 16 or 8
    activation: str = "relu"  # of chunked: relu | gelu | silu | leaky_relu
    norm: str = "input"  # of chunked: BN before F's first convolution (input) or between the two (hidden)
    expansion: list[float] = field(default_factory=list)  # of chunked: hidden channels per channel; []: 2, 1, 1/2
    hidden_chunk: int = 8  # of chunked with norm=hidden: hidden channels alive at a time, at full resolution
    backward: str = "invert"
    chunk_mib: float = 2.0  # scratch of the in-place passes, per temporary
    # optimisation
    batch: Union[int, str] = 512  # noqa: UP007 - OmegaConf reads Union[...]; or auto: the largest that memory_limit allows
    epochs: int = 40
    lr: float = 0.4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_norm_and_bias: bool = False
    label_smoothing: float = 0.0
    schedule: str = "triangular"
    warmup: float = 0.125  # share of the steps in which the rate rises
    clip_grad_norm: Optional[float] = None
    # the machine
    precision: str = "fp32"
    device: str = "auto"
    memory_limit: Optional[str] = None  # a size with its unit, as in 1GiB; what a training step may take
    plan: bool = False  # print what the run would need, and end
    seed: int = 0
    resume: Optional[str] = None
    data: DataConfig = field(default_factory=DataConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    experiment: Any = None


def schema(node: type = Config, prefix: str = "") -> dict[str, Any]:
    """All keys, dotted, with their types: {"arch": str, ..., "data.augment.pad": int, ...}."""
    found = {}
    for name, kind in get_type_hints(node).items():
        found[prefix + name] = kind
        if is_dataclass(kind):
            found |= schema(kind, f"{prefix}{name}.")
    return found


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"data": {"name": ...}} as {"data.name": ...}."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def expected(key: str) -> str:
    """What a value of `key` must be, in words."""
    if key == "batch":
        return "a whole number, or auto"
    kind = schema()[key]
    options = get_args(kind) if get_origin(kind) is Union else (kind,)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if get_origin(kind) is list:
        return "a list, as in pooling=[channel,batch]"
    return " or ".join(words.get(option, f"one of its keys, as in {key}.KEY=VALUE") for option in options)


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """' Did you mean hybrid?', or '' when nothing is near."""
    near = get_close_matches(str(word).lower(), [str(choice) for choice in choices], n=1, cutoff=0.6)
    return f" Did you mean {near[0]}?" if near else ""


def parse_memory(text: str) -> int:
    """Bytes of a size with its unit: "500MiB", "1.5 GiB", "2GB"; MiB = 2^20 bytes, MB = 10^6 bytes.

    Raises:
        RevtrainError: no unit, no such unit, or nothing at all.
    """
    words = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text), re.IGNORECASE)
    unit = words[2].lower() if words else ""
    size = int(float(words[1]) * MEMORY_UNITS[unit]) if unit in MEMORY_UNITS else 0
    if size < 1:
        number = words[1] if words and float(words[1]) else "1"
        near = {"": "MiB", "t": "TiB", "g": "GiB", "m": "MiB", "k": "KiB"}.get(unit)
        hint = f" Did you mean {number}{near}?" if words and near and float(words[1]) else ""
        raise RevtrainError(
            f"memory_limit={text} was given; expected a size with its unit.{hint}\n"
            "As in memory_limit=500MiB or memory_limit=2GB; KiB, MiB, GiB, TiB are powers of 1024, "
            "kB, MB, GB, TB of 1000."
        )
    return size


def validate(cfg: Any) -> None:
    """Refuse values that no run could use, before anything is loaded or written.

    What needs the data or the network (batch larger than the data set, an image size that the pooling cannot
    divide) is refused by `revtrain.train` and `revtrain.models`, also before the first step.

    Args:
        cfg: the composed configuration; anything with the attributes of `Config`.

    Raises:
        RevtrainError: names the key, the value given and the values expected.
    """
    _choice("arch", cfg.arch, ARCHITECTURES)
    _at_least("depth", cfg.depth, 1, "depth counts the units of the trunk; each arch has its own default", most=10_000)
    _at_least("width", cfg.width, 1, "width is the number of channels at full resolution")
    if cfg.arch in REVERSIBLE and cfg.width % 2:
        raise RevtrainError(
            f"width={cfg.width} was given; expected an even number: {cfg.arch} halves its channels.\n"
            f"Use width={cfg.width - 1 or 2} or width={cfg.width + 1}."
        )
    _slope(cfg.slope)
    _number("epsilon_i", cfg.epsilon_i, at_least=0)
    _choice("norm_sign", cfg.norm_sign, NORM_SIGNS, "the sign of an invertible BN's gains; the paper's is positive")
    _number("init_gain", cfg.init_gain, above=0)
    if cfg.max_gain is not None:
        _number("max_gain", cfg.max_gain, above=0)
    for entry in cfg.pooling:
        _choice("pooling", entry, POOLINGS, "one entry between two stages, as in pooling=[channel,batch]")
    _number("residual_scale", cfg.residual_scale, above=0)
    _choice("stream", cfg.stream, STREAMS)
    if cfg.grid_bits is not None:
        _at_least("grid_bits", cfg.grid_bits, 1, "values are multiples of 2^-grid_bits; null: the stream's own")
    _choice("norm", cfg.norm, NORMS)
    _choice("activation", cfg.activation, ACTIVATIONS)
    _at_least("hidden_chunk", cfg.hidden_chunk, 1, "hidden channels alive at a time in arch=chunked")
    _choice("backward", cfg.backward, BACKWARDS)
    _number("chunk_mib", cfg.chunk_mib, above=0)

    _batch(cfg.batch)
    _at_least("epochs", cfg.epochs, 1)
    _number("lr", cfg.lr, above=0)
    _number("momentum", cfg.momentum, at_least=0, below=1)
    _number("weight_decay", cfg.weight_decay, at_least=0)
    _number("label_smoothing", cfg.label_smoothing, at_least=0, below=1)
    _choice("schedule", cfg.schedule, SCHEDULES)
    _number("warmup", cfg.warmup, at_least=0, below=1)
    if cfg.clip_grad_norm is not None:
        _number("clip_grad_norm", cfg.clip_grad_norm, above=0)

    _choice("precision", cfg.precision, PRECISIONS)
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", cfg.device):
        raise RevtrainError(
            f"device={cfg.device} was given; expected auto, cpu, cuda, cuda:N or mps."
            f"{did_you_mean(cfg.device, ('auto', 'cpu', 'cuda', 'mps'))}\n"
            "device=auto takes the first GPU, or the CPU where there is none."
        )
    if cfg.memory_limit is not None:
        parse_memory(cfg.memory_limit)
    _at_least("seed", cfg.seed, 0, most=LARGEST_SEED)
    if cfg.resume is not None and not Path(cfg.resume).exists():
        raise RevtrainError(
            f"resume={cfg.resume} was given; there is no such file or run directory.\n"
            "Give the directory of an earlier run, or the last.pt in it, as in resume=outputs/DATE/RUN."
        )
    _at_least("probe.batch", cfg.probe.batch, 2, "batch normalisation needs at least two images")
    _at_least("probe.every", cfg.probe.every, 0, "0 means: never probe")
    _validate_data(cfg.data)


def _validate_data(data: Any) -> None:
    _choice("data", data.name, DATASETS)
    if data.name == "imagefolder" and not data.root:
        raise RevtrainError(
            "data=imagefolder was given without data.root.\n"
            "Add data.root=FOLDER, a folder that holds train/CLASS/* and test/CLASS/*."
        )
    for name, least in (
        ("image_size", 1),
        ("classes", 2),
        ("train_limit", 1),
        ("test_limit", 1),
        ("train_images", 1),
        ("test_images", 1),
        ("seed", 0),
    ):
        if data[name] is not None:
            _at_least(f"data.{name}", data[name], least, most=LARGEST_SEED if name == "seed" else 2**31 - 1)
    _at_least("data.augment.pad", data.augment.pad, 0, "0 means: no crop")
    _at_least("data.augment.cutout", data.augment.cutout, 0, "0 means: no cutout")


def _choice(key: str, value: str, choices: tuple[str, ...], remark: str = "") -> None:
    if value not in choices:
        raise RevtrainError(
            f"{key}={value} was given; expected one of: {', '.join(choices)}.{did_you_mean(value, choices)}"
            + (f"\n{key}: {remark}." if remark else f"\nChoose one, as in {key}={choices[0]}.")
        )


def _at_least(key: str, value: int | None, least: int, remark: str = "", most: int = 2**31 - 1) -> None:
    if value is not None and value > most:
        raise RevtrainError(f"{key}={value} was given; expected a whole number of at most {most}.\nUse a smaller one.")
    if value is None or value < least:
        given = "null" if value is None else value
        raise RevtrainError(
            f"{key}={given} was given; expected a whole number of at least {least}."
            + (f"\n{remark[0].upper()}{remark[1:]}." if remark else f"\nUse {key}={least} or more.")
        )


def _number(
    key: str,
    value: float,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> None:
    wanted = []
    if at_least is not None:
        wanted.append((f"at least {at_least}", value >= at_least))
    if above is not None:
        wanted.append((f"greater than {above}", value > above))
    if below is not None:
        wanted.append((f"below {below}", value < below))
    if not (math.isfinite(value) and all(holds for _, holds in wanted)):
        wish = " and ".join(text for text, _ in wanted)
        default = next(item.default for item in fields(Config) if item.name == key)
        raise RevtrainError(
            f"{key}={value:g} was given; expected a number {wish}.\n"
            f"The default is {key}={'null (off)' if default is None else default}."
        )


def _batch(batch: int | str) -> None:
    if batch == "auto":
        return
    if isinstance(batch, str):
        raise RevtrainError(
            f"batch={batch} was given; expected {expected('batch')}.{did_you_mean(batch, ['auto'])}\n"
            "batch=auto takes the largest batch that memory_limit allows."
        )
    _at_least("batch", batch, 2, "batch normalisation needs at least two images")


def _slope(slope: float) -> None:
    if 0 < slope <= 1:
        return
    message = f"slope={slope:g} was given; expected 0 < slope <= 1: LeakyReLU multiplies negative values by it.\n"
    if 1 < slope < math.inf:
        message += f"Where the slope is written as a divisor (y = x/n), use its inverse: slope={1 / slope:.4g}."
    elif slope == 0:
        message += "A slope of 0 (ReLU) cannot be inverted, and a small one lowers the SNR. Try slope=0.2."
    else:
        message += "Try slope=0.2."
    raise RevtrainError(message)
