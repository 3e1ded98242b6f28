"""What a run leaves behind: its files, how it can end, and what is in them, stated once for all who write or read it.

A run directory holds

    .hydra/          the composed configuration and the command line, as Hydra writes them
    .lock            held by the process that works in the folder
    job.json         of a sweep's job: what it was asked for
    train.log        what was said on the terminal, dated; tracebacks
    metrics.jsonl    one `Line` for each epoch, epoch 0 being the state before the first step
    result.json      one `Result`, replaced in one step when training starts and when it ends
    last.pt          one `Checkpoint`, replaced in one step after each epoch; previous.pt is the one before it
    events.out.*     TensorBoard's events; scalars have the tags of `Tag`

Both text files are strict JSON: what was not measured, or is not finite, is null. Accuracies are shares, 0..1; units of
everything else are in the names.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

RESULT = "result.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "last.pt"
PREVIOUS = "previous.pt"
LOG = "train.log"
JOB = "job.json"
EVENTS = "events.out.tfevents.*"  # a pattern
HYDRA = ".hydra"
CONFIG = f"{HYDRA}/config.yaml"

TRACES = (RESULT, METRICS, CHECKPOINT)  # where one of them is, a run has been

# `running` is also what a killed run leaves behind; `interrupted`: Ctrl-C or SIGTERM; `planned`: plan=true, nothing was
# trained
Status = Literal["running", "completed", "failed", "interrupted", "planned"]
ENDED: tuple[Status, ...] = ("completed", "planned")  # nothing is left to do


class Snr(TypedDict):
    """Signal-to-noise ratios of the rebuilt inputs of layers, in dB (Eq. 15); 320 dB: no error at all."""

    minimum: float
    minimum_layer: str
    layers: dict[str, float]  # as the backward pass meets them: the last layer comes first


class GradientOfParameter(TypedDict):
    """One parameter's gradient beside that of backward=store on the same batch."""

    cosine: float  # of the angle between the two, -1..1
    relative_error: float  # norm of the difference over that of the true one


class GradientErrors(TypedDict):
    """The gradients of a probe beside those of backward=store."""

    minimum_cosine: float
    minimum_cosine_parameter: str
    maximum_relative_error: float
    maximum_relative_error_parameter: str
    parameters: dict[str, GradientOfParameter]


class Halves(TypedDict):
    """The two halves of the last state of a reversible network, in a probe."""

    correlation: float  # -1..1, of channel i of the one with channel i of the other; near 1 they are copies
    effective_rank: float  # of all channels
    channels: int
    layers: dict[str, float]  # the correlation behind each layer of the trunk


class PeakVram(TypedDict):
    """The most GPU memory that PyTorch took during training steps, in MiB."""

    allocated: float  # by tensors
    reserved: float  # by the allocator, from the driver


class Reached(TypedDict):
    """When a run came to its `target_accuracy`; all of the training up to the end of that epoch."""

    accuracy: float  # on the test images, then
    epoch: int
    train_seconds: float  # of training steps alone
    train_images: int


class MemoryBytes(TypedDict):
    """The peak of one training step taken apart; counted, so the same on any machine."""

    peak: float
    parameters: float
    gradients: float
    optimizer: float
    activations: float


class Line(TypedDict):
    """A line of metrics.jsonl."""

    epoch: int
    step: int  # training steps so far
    lr: float | None  # of the last step
    loss_train: float | None  # mean over the epoch
    loss_test: float | None
    accuracy_train: float | None  # 0..1, of images; with task=segment of pixels, as all accuracies
    accuracy_test: float | None
    accuracy_test_flip: float | None  # of the mean of logits of image and mirror image; null without test_flip
    accuracy_test_ema: float | None  # of the average of the weights; null without ema_decay
    iou_train: float | None  # 0..1, mean of all classes but the background; null but for task=segment
    iou_test: float | None
    iou_of_classes: dict[str, float | None] | None  # on the test images; null: no pixel of it
    train_images: int | None  # in the training steps of this epoch
    train_seconds: float | None  # that they took
    images_per_second: float | None
    snr_db: Snr | None  # null in epochs without a probe, and with backward=store
    gradients: GradientErrors | None
    halves: Halves | None  # null in epochs without a probe, and for a network that has none
    stream_overflows: int | None  # values beyond the range of the states' grid since the start; null: no grid
    peak_vram_mib: PeakVram | None  # null without CUDA


class Result(TypedDict):
    """result.json. Under torchrun sizes, plan and peak are those of the first process with its share of the batch; all
    else is of the whole batch."""

    status: Status
    error: str | None
    arch: str | None
    params: int | None
    epochs: int  # completed
    test_accuracy: float | None  # after the last epoch
    best_test_accuracy: float | None
    test_accuracy_flip: float | None  # after the last epoch, as in `Line`
    test_accuracy_ema: float | None
    test_iou: float | None  # after the last epoch, as `iou_test` in `Line`
    target_reached: Reached | None  # null: no target, or not reached
    train_seconds: float | None  # of training steps alone, those of a run that was resumed included
    images_per_second: float | None
    snr_db: Snr | None  # of the last probe
    gradients: GradientErrors | None  # of the last probe
    halves: Halves | None  # of the last probe
    gradients_trusted: bool | None  # whether every one pointed the right way at every probe
    stream_overflows: int | None
    peak_vram_mib: PeakVram | None  # over all training steps
    bytes_per_pixel: float | None  # stored for a training step, by input pixel: weights and their gradients apart
    memory_bytes: MemoryBytes | None
    macs_per_image: int | None  # multiply-accumulates of forward and backward pass, recomputation included
    plan: dict[str, Any] | None  # what a `revtrain.planning.plan.Plan` lists, sizes in bytes
    device: dict[str, Any] | None  # name, title, memory_mib, cpu_threads, processes
    versions: dict[str, str | None]  # of Python and the packages that a result depends on
    overrides: list[str]  # the command line
    config: dict[str, Any]  # resolved: the keys of its architecture and data set; batch as batch=auto chose it


class DataMeaning(TypedDict):
    """What inference must know of the images that a network was trained on."""

    classes: list[str]  # names
    image_size: int | list[int]  # side in pixels, or [height, width]
    mean: list[float]  # a channel, 0..1
    std: list[float]
    binary: bool  # of masks: whatever is not 0 is of class 1; left out by runs of before


class Checkpoint(TypedDict):
    """last.pt: plain containers and tensors. The lines themselves stay in metrics.jsonl: rewritten with each
    checkpoint they would make a long run's writing quadratic. The learning rate is a function of the step: there is no
    schedule to store."""

    config: dict[str, Any]  # as in `Result`
    overrides: list[str]
    classes: int
    data: DataMeaning
    images: int  # in the training set
    processes: int  # that trained together under torchrun
    epoch: int  # epochs completed; 0 is the state before the first
    partial: dict[str, Any] | None  # what the epoch after that has come to; None: it has not begun
    model: dict[str, Any]  # state_dict
    optimizer: dict[str, Any]  # state_dict
    scaler: dict[str, Any]  # state_dict, {} but for fp16
    average: dict[str, Any] | None  # of the weights, with its steps; None without ema_decay
    rng: dict[str, Any]  # states of the generators: cpu, cuda, data
    best_accuracy: float  # on the test images so far
    lines: int  # of metrics.jsonl so far


class Tag:
    """TensorBoard's scalars."""

    ACCURACY_TRAIN = "accuracy/train"
    ACCURACY_TEST = "accuracy/test"
    ACCURACY_TEST_FLIP = "accuracy/test_flip"
    ACCURACY_TEST_EMA = "accuracy/test_ema"
    IOU_TRAIN = "iou/train"
    IOU_TEST = "iou/test"
    IOU_OF_CLASS = "iou/class/"  # followed by its name
    LOSS_TRAIN = "loss/train"
    LOSS_TEST = "loss/test"
    LR = "lr"
    SNR_MINIMUM = "snr_db/min"
    SNR_OF_LAYER = "snr_db/"  # followed by the layer's name
    GRADIENT_COSINE = "gradients/minimum_cosine"
    GRADIENT_ERROR = "gradients/maximum_relative_error"
    HALVES_CORRELATION = "halves/correlation"
    HALVES_RANK = "halves/effective_rank"
    PEAK_VRAM = "memory/peak_vram_mib"
    LIVE = "memory/live_mib"  # of a training step, counted: the same on any machine
    BYTES_PER_PIXEL = "memory/bytes_per_pixel"
    SPEED = "speed/images_per_second"


LINE_KEYS = tuple(Line.__annotations__)
RESULT_KEYS = tuple(Result.__annotations__)
