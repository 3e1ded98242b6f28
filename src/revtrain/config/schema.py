"""Every key of the configuration, with its type, default, meaning and bounds.

Each part of a run has a dataclass of its own, and a part of the program receives the part that it needs:

    Network    what is built: `revtrain.models`, the closed forms of its memory
    Training   how it is optimised
    Machine    where, in what precision of memory and files
    DataConfig, ProbeConfig   images; the probe of reconstruction errors

On the command line the keys of the first three stand side by side (`depth=4 lr=0.1`), those of the last two below a
name (`data.root=FOLDER`). What only some architectures or data sets have is stated in their own files (`Settings`) and
found from there; `CouplingSettings` and `InvertibleSettings` below are for the architectures to share.

Neither torch nor Hydra is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, Optional, TypeVar, Union  # OmegaConf reads Optional[...] and Union[...]

from revtrain.config.image_size import ImageSize
from revtrain.config.keys import key

LARGEST_SEED = 2**63 - 1  # of torch's generators
IGNORED = 255  # the label of pixels that count for nothing
STATE_FORMATS = ("plain", "float32", "int32", "int16")
NORM_SIGNS = ("positive", "mixed", "negative")
TASKS = ("classify", "segment")
POOLINGS = ("channel", "batch", "stride")
PRECISIONS = ("fp32", "bf16", "fp16")
BACKWARDS = ("invert", "store")
GRAPHS = ("auto", "off")
SCHEDULES = ("triangular", "onecycle", "cosine", "constant")

Own = TypeVar("Own", covariant=True)  # the Settings of an architecture or a data set


@dataclass
class Network(Generic[Own]):
    """What is built. `own` holds the keys that only some architectures have."""

    arch: str = key(None, "architecture")
    task: str = key(
        "classify",
        "classify: the class of each image; segment: that of each pixel (chooses arch, data and augmentation for it)",
        choices=TASKS,
    )
    depth: int = key(
        None,
        "units of the trunk, spread over the stages",
        at_least=1,
        at_most=10_000,
        remark="depth counts the units of the trunk, 1 or more; each arch has its own default",
        shown="the arch's own",
    )
    width: int = key(
        None,
        "c, channels at full resolution",
        at_least=1,
        remark="width is the number of channels at full resolution",
        shown="the arch's own",
    )
    pooling: list[str] = key(
        [],
        "one entry between two stages: channel, batch or stride, as in pooling=[channel,batch]",
        choices=POOLINGS,
        remark="one entry between two stages, as in pooling=[channel,batch]",
        shown="the arch's own",
    )
    slope: float = key(0.2, "n, negative slope of the LeakyReLUs, 0 < n <= 1 (Eq. 24)")
    backward: str = key(
        "invert", "invert: recompute activations; store: keep them, as ordinary training does", choices=BACKWARDS
    )
    precision: str = key("fp32", "of the convolutions: fp32, bf16 or fp16", choices=PRECISIONS)
    chunk_mib: Union[int, float, str] = key(  # noqa: UP007
        "auto", "MiB of scratch for each temporary of the in-place passes; auto: 2 on a CPU, 11 on a GPU", above=0
    )
    own: Own = field(default=None)  # type: ignore[assignment]  # filled in by `revtrain.config.read`

    def piece_mib(self, device_type: str = "cpu") -> float:
        """`chunk_mib` as a number. A CPU works fastest in its cache; a GPU needs work for all of its multiprocessors in
        every launch, and its scratch, about four temporaries, is then still a small part of two states."""
        if isinstance(self.chunk_mib, str):
            return 2.0 if device_type == "cpu" else 11.0
        return self.chunk_mib


@dataclass
class Training:
    """How the network is optimised: SGD with Nesterov momentum, the rate a function of the step."""

    batch: Union[int, str] = key(  # noqa: UP007
        512,
        "images of a step; auto: the largest within memory_limit (on a GPU: within what is free)",
        at_least=1,
        remark="one image can be the batch where it is large",
    )
    accumulate: int = key(
        1,
        "micro-batches that a step's batch is cut into: memory of one, gradients averaged, BN statistics of each alone",
        at_least=1,
        remark="each micro-batch has batch / accumulate images",
    )
    epochs: int = key(40, "passes over the training images", at_least=1)
    target_accuracy: Optional[float] = key(
        None, "end when the test accuracy reaches this, as in 0.93, and record when; null: never", above=0, below=1
    )
    lr: float = key(0.4, "the highest rate of the schedule", above=0)
    momentum: float = key(0.9, "Nesterov momentum; 0: none", at_least=0, below=1)
    weight_decay: float = key(5e-4, "decay of the weights", at_least=0)
    decay_norm_and_bias: bool = key(False, "let biases and BN decay, too")
    label_smoothing: float = key(0.0, "share of the label that is spread over all classes", at_least=0, below=1)
    schedule: str = key("triangular", "shape of the learning rate", choices=SCHEDULES)
    warmup: float = key(0.125, "share of the steps in which the rate rises", at_least=0, below=1)
    clip_grad_norm: Optional[float] = key(None, "largest norm of the gradients; null: no clipping", above=0)
    ema_decay: Optional[float] = key(
        None, "of a step, in an average of the weights tested beside them, as in 0.98; null: none", above=0, below=1
    )
    test_flip: bool = key(False, "test on the mean of each image's logits and its mirror image's, too: a figure apart")


@dataclass
class Machine:
    """Where the run takes place, and what it may use there."""

    device: str = key("auto", "cpu, cuda, cuda:1 or mps; auto: the first GPU, else the CPU")
    memory_limit: Optional[str] = key(
        None, "refuse a run that needs more, as in 1GiB or 500MiB; a GPU then acts like one of that size"
    )
    graph: str = key(
        "auto",
        "auto: on CUDA the whole step is one graph, replayed; off: launched operation by operation",
        choices=GRAPHS,
    )
    plan: bool = key(False, "print what the run needs, whether it fits, the largest batch that does; then end")
    seed: int = key(0, "of weights, order and augmentation", at_least=0, at_most=LARGEST_SEED)
    resume: Optional[str] = key(
        None,
        "continue the run of this directory, or last.pt, as it was but for what else is given, in a new one",
        path=True,
    )


@dataclass
class AugmentConfig:
    """Training-time augmentation; the test set is never augmented."""

    pad: int = key(4, "pixels of reflection before the random crop; 0: no crop", at_least=0, remark="0 means: no crop")
    flip: bool = key(True, "horizontal flip with probability 1/2")
    alternate_flip: bool = key(
        False, "flip by chance in the first epoch only; every second one mirrors the other half of the images"
    )
    flip_vertical: bool = key(False, "vertical flip with probability 1/2, for images without an upper side")
    colour: float = key(
        0.0, "largest change of brightness, contrast and saturation, as in 0.2: a fifth up or down", at_least=0, below=1
    )
    cutout: int = key(8, "side in pixels of the square set to the mean; 0: none", at_least=0,
                      remark="0 means: no cutout")  # fmt: skip


@dataclass
class DataConfig(Generic[Own]):
    """Where the images come from. `own` holds the keys that only some data sets have."""

    name: str = key("synthetic", "data set, chosen by the group data")
    root: Optional[str] = key(None, "folder of the images or of the archive", path=True)
    cache: Optional[str] = key(None, "folder for decoded images; null: the user's cache folder", path=True)
    image_size: int | list[int] | None = key(
        None, "side in pixels, or [height,width]; null: as the images are", at_least=1, count=2
    )
    classes: Optional[int] = key(None, "number of classes; null: as many as the data set has", at_least=2)
    train_limit: Optional[int] = key(None, "so many training images, balanced over the classes; null: all", at_least=1)
    test_limit: Optional[int] = key(None, "so many test images; null: all", at_least=1)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    own: Own = field(default=None)  # type: ignore[assignment]  # filled in by `revtrain.config.read`

    @property
    def streams(self) -> bool:
        """Whether images are read when they are needed, and never all in memory."""
        return isinstance(self.own, StreamSettings) and self.own.streams

    @property
    def size(self) -> ImageSize | None:
        """Of the images; None: as they are."""
        return None if self.image_size is None else ImageSize.of(self.image_size)


@dataclass
class ProbeConfig:
    """The probe that measures the SNR of reconstructed activations, outside of the training steps."""

    batch: int = key(
        64,
        "images in the probe batch; of large ones no more than a step has",
        at_least=2,
        remark="batch normalisation needs at least two images",
    )
    every: int = key(1, "epochs between two probes; 0: never", at_least=0, remark="0 means: never probe")
    gradients: bool = key(True, "compare every parameter's gradient with that of backward=store, too")


@dataclass
class Config:
    """Everything a run depends on, each part for those who need it; made by `revtrain.config.read`."""

    network: Network[Any]
    training: Training
    machine: Machine
    data: DataConfig[Any]
    probe: ProbeConfig
    experiment: Any = None


# ---- keys that several data sets share -------------------------------------------------------------------


@dataclass
class StreamSettings:
    """Of data sets that can be read while the network trains."""

    crop: int | list[int] | None = key(
        None,
        "side in pixels, or [height,width], of the part that is cut out: of a training image anywhere, of a test image "
        "its centre, or all of it in windows of that size where pixels are judged; smaller images are mirrored at "
        "their borders; null: whole images",
        at_least=1,
        count=2,
    )
    crops: int = key(1, "parts cut out of each training image in an epoch, with crop", at_least=1)
    workers: int = key(4, "threads that read images ahead", at_least=1, at_most=256)
    level: int = key(0, "of a slide's pyramid that is read; 0: the finest", at_least=0)

    @property
    def crop_size(self) -> ImageSize | None:
        """Of the parts that are cut out; None: whole images."""
        return None if self.crop is None else ImageSize.of(self.crop)

    @property
    def streams(self) -> bool:
        """Whether images are read when they are needed."""
        return True


# ---- keys that several architectures share ---------------------------------------------------------------


@dataclass
class CouplingSettings:
    """Of architectures with additive coupling blocks, y1 = x1 + s F(x2), y2 = x2 + s G(y1).

    `state_format` is the number format that `stream` and `precision` choose together, one of STATE_FORMATS.
    """

    residual_scale: float = key(1.0, "s in y1 = x1 + s F(x2) of coupling blocks", above=0)
    zero_last: bool = key(
        False,
        "the last convolution of F and of G starts at zero; identity paths of F, where it has some, stay",
    )
    stream: str = key(
        "auto",
        "number format of coupling blocks' states, on a grid where sums are exact: float32, int32, int16; "
        "plain: off any grid; auto: float32, or int16 with precision=bf16 or fp16",
        choices=("auto", *STATE_FORMATS),
    )
    grid_bits: Optional[int] = key(
        None,
        "states are multiples of 2^-grid_bits; null: the format's own, 16, or 8 for int16",
        at_least=1,
        remark="values are multiples of 2^-grid_bits; null: the stream's own",
    )

    def state_format(self, precision: str) -> str:
        automatic = "float32" if precision == "fp32" else "int16"
        return automatic if self.stream == "auto" else self.stream


@dataclass
class InvertibleSettings:
    """Of architectures with invertible BNs and coupling convolutions."""

    epsilon_i: float = key(0.1, "keeps the gain |gamma| + epsilon_i of an invertible BN off zero (Eq. 23)", at_least=0)
    norm_sign: str = key(
        "positive",
        "of the BN's gains: positive (the paper's), mixed or negative; the further to the right, the less noise",
        choices=NORM_SIGNS,
        remark="the sign of an invertible BN's gains; the paper's is positive",
    )
    init_gain: float = key(1.0, "of the coupling convolutions' initial weights, relative to torch's", above=0)
    max_gain: Optional[float] = key(
        None, "bound on their largest singular value, all through training; null: none", above=0
    )
