"""A trained network as a file that needs no revtrain: safetensors, ONNX, torch.export.

All three hold the network for inference (eval mode, float32, `backward=store`: plain autograd modules): normalised
images (B, 3, H, W) float32 to logits, (B, classes) or with task=segment (B, classes, H, W), any B. What the numbers
mean is in the file's metadata:

    revtrain     the version that wrote it
    task         classify, or segment
    classes      names, a JSON list
    image_size   side in pixels, or [height, width]
    mean, std    a channel, JSON lists, in units of the full scale: an input is (image / 255 - mean) / std
    config       the resolved configuration of the run, JSON; `build_model` makes the network of it
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from revtrain import __version__
from revtrain.config import flat
from revtrain.errors import RevtrainError
from revtrain.inference.restore import Trained
from revtrain.machine.files import write_result_file

TOLERANCE = 1e-5  # of logits, relative where they are greater than one
TOLERANCE_OF_PIXELS = 1e-4  # likewise, of the mean over them
INPUT, OUTPUT = "images", "logits"
LARGEST_ONNX_BYTES = 2**31 - 2**20  # protobuf's limit, less what the graph takes
METADATA_FILE = "revtrain.json"  # inside a .pt2


def export(trained: Trained, path: Path) -> float | None:
    """Write the network to `path`; its suffix (.safetensors, .onnx, .pt2) names the format.

    What was written is loaded again and compared with the network itself before the file takes its place.

    Returns:
        The greatest difference of the logits, see `difference_of`; None where nothing can run them here (ONNX without
        onnxruntime).

    Raises:
        RevtrainError: another suffix, a missing package, or logits that differ.
        OSError: the file cannot be written.
    """
    if path.suffix not in FORMATS:
        raise RevtrainError(
            f"--to {path} was given; the suffix must be one of: {', '.join(FORMATS)}.\n"
            "As in --to model.safetensors (weights), --to model.onnx or --to model.pt2 (torch.export)."
        )
    packages, write, run = FORMATS[path.suffix]
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise RevtrainError(
            f"--to {path} needs {' and '.join(missing)}, not installed here.\n"
            f"Install: pip install {' '.join(missing)} (revtrain's extra export has all that export can use)."
        )
    images = torch.randn(3, 3, *trained.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trained.rebuilt()(images)  # the chain, in float32
        with _quiet():
            content = write(trained, trained.rebuilt(backward="store"))
            found = run(trained, content, images)
    difference = None if found is None else difference_of(found, expected)
    tolerance = TOLERANCE_OF_PIXELS if trained.is_dense else TOLERANCE
    if difference is not None and not difference <= tolerance * max(1.0, expected.abs().max().item()):
        raise RevtrainError(
            f"The logits of {path} differ from the network's own by {difference:.2g}; nothing was written.\n"
            "Try another format, and please report it."
        )
    write_result_file(path, content)
    return difference


def difference_of(found: Tensor, expected: Tensor) -> float:
    """The greatest difference of logits (B, classes), or of those of pixels (B, classes, H, W) in the mean over the
    pixels: states lie on a grid, and what is rounded the other way at some of them is no error."""
    difference = (found - expected).abs()
    return difference.flatten(2).mean(2).max().item() if difference.dim() > 2 else difference.max().item()


def metadata(trained: Trained) -> dict[str, str]:
    """What stands beside the weights in every format; see the head of this module."""
    return {
        "revtrain": __version__,
        "task": trained.config.network.task,
        "classes": json.dumps(trained.classes),
        "image_size": json.dumps(trained.image_size.plain),
        "mean": json.dumps(trained.mean.tolist()),
        "std": json.dumps(trained.std.tolist()),
        "config": json.dumps(flat(trained.config)),
    }


# ---- the formats: network -> bytes, and bytes -> logits ---------------------------------------------------


def _safetensors(trained: Trained, model: nn.Module) -> bytes:
    from safetensors.torch import save

    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return save(weights, {"format": "pt", **metadata(trained)})


def _run_safetensors(trained: Trained, content: bytes, images: Tensor) -> Tensor:
    from safetensors.torch import load

    model = trained.rebuilt(backward="store")
    for parameter in model.parameters():
        parameter.zero_()
    model.load_state_dict(load(content))
    return model(images)


def _program(trained: Trained, model: nn.Module) -> torch.export.ExportedProgram:
    # two images: one alone would be taken for a constant
    return torch.export.export(
        model, (torch.zeros(2, 3, *trained.image_size),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )


def _torch_export(trained: Trained, model: nn.Module) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(
        _program(trained, model), buffer, extra_files={METADATA_FILE: json.dumps(metadata(trained), indent=2)}
    )
    return buffer.getvalue()


def _run_torch_export(trained: Trained, content: bytes, images: Tensor) -> Tensor:
    return torch.export.load(io.BytesIO(content)).module()(images)


def _onnx(trained: Trained, model: nn.Module) -> bytes:
    if sum(p.numel() * p.element_size() for p in model.state_dict().values()) > LARGEST_ONNX_BYTES:
        raise RevtrainError("The weights are larger than the 2 GiB that an ONNX file can hold.\nUse --to model.pt2.")
    written = torch.onnx.export(
        _program(trained, model), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
    )
    if written is None:
        raise RevtrainError("torch.onnx wrote no network.\nTry another format, and please report it.")
    proto = written.model_proto
    for key, value in metadata(trained).items():
        proto.metadata_props.add(key=key, value=value)
    return proto.SerializeToString()


def _run_onnx(trained: Trained, content: bytes, images: Tensor) -> Tensor | None:
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporters warn of what is to come in later versions of themselves."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# suffix -> (packages it needs, writer, runner)
FORMATS = {
    ".safetensors": (("safetensors",), _safetensors, _run_safetensors),
    ".onnx": (("onnx", "onnxscript"), _onnx, _run_onnx),
    ".pt2": ((), _torch_export, _run_torch_export),
}
