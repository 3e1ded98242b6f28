"""The command lines `revtrain-eval` and `revtrain-export`.

Exit codes: 0 done, 2 something the user can mend, 130 Ctrl-C. torch is imported after the words were read, so that
--help answers at once.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from revtrain.cli.guard import DONE, guarded
from revtrain.errors import RevtrainError
from revtrain.machine.files import place, write_result_file
from revtrain.report.tables import clean
from revtrain.runs.schema import CHECKPOINT

if TYPE_CHECKING:
    from revtrain.inference.restore import Trained

Written = TypeVar("Written")
RUN_HELP = f"a run directory, or the {CHECKPOINT} of one"
AVERAGED_HELP = "take the average of the weights, which a run with ema_decay keeps, in their place"


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """`revtrain-eval`; `argv` are the words after it, by default those of this process. Returns the exit code."""
    return guarded(_evaluate, _evaluate_parser(), argv)


def export_main(argv: Sequence[str] | None = None) -> int:
    """`revtrain-export`; `argv` are the words after it, by default those of this process. Returns the exit code."""
    return guarded(_export, _export_parser(), argv)


# ---- revtrain-eval -----------------------------------------------------------------------------------------


def _evaluate_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "revtrain-eval",
        description="Evaluate a trained network: accuracy in all and by class, and the confusion matrix, on the test "
        "set of its own run or on another folder; or print what it sees in a folder of images. With task=segment these "
        "are of pixels, with the IoU of each class.",
        epilog="Images are normalised as in training. Exit code: 0 done, 2 something was wrong that you can mend.",
    )
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help=RUN_HELP)
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--data", metavar="FOLDER",
        help="evaluate on FOLDER/test/CLASS/*, or FOLDER/CLASS/*; with task=segment on images and masks, which are "
        "folders in FOLDER/test, or in FOLDER",
    )  # fmt: skip
    what.add_argument(
        "--images", metavar="FOLDER",
        help="print class and probability for every image in FOLDER; with task=segment class and share of the pixels",
    )  # fmt: skip
    parser.add_argument(
        "--masks", metavar="OUT", type=Path,
        help="with --images and task=segment: write the class of each pixel, a PNG for each image, into OUT",
    )  # fmt: skip
    parser.add_argument("--csv", metavar="FILE", type=Path, help="write the matrix, or the predictions")
    parser.add_argument("--png", metavar="FILE", type=Path, help="draw the confusion matrix (needs matplotlib)")
    parser.add_argument("--top", metavar="K", type=_count, default=1, help="with --images: the K first classes (1)")
    parser.add_argument("--batch", metavar="N", type=_count, help="images at a time (default: as in the run)")
    parser.add_argument("--averaged", action="store_true", help=AVERAGED_HELP)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (auto)")
    return parser


def _evaluate(args: argparse.Namespace) -> int:
    if args.masks is not None and args.images is None:
        raise RevtrainError("--masks was given without --images.\nAdd --images FOLDER, the images to make masks of.")
    if args.png is not None:
        from revtrain.figures import require

        if args.images is not None:
            raise RevtrainError("--png was given with --images.\nIt draws a confusion matrix: leave --images out.")
        require(f"--png {args.png}")  # before anything is computed
    from revtrain.inference.evaluate import evaluate
    from revtrain.inference.restore import restore

    trained = restore(args.run, args.device, args.averaged)
    print(f"{clean(trained.path)}: {trained.config.network.arch} after epoch {trained.epoch}", flush=True)
    if args.images is not None:
        if args.masks is not None and not trained.is_dense:
            raise RevtrainError(
                "--masks was given for a run of task=classify, which knows no classes of pixels.\n"
                "Leave --masks out, or give a run of task=segment."
            )
        if args.masks is not None and args.masks.exists() and not args.masks.is_dir():
            raise RevtrainError(f"--masks {clean(args.masks)} is a file.\nGive a folder, which need not exist yet.")
        return _predict(trained, args)
    evaluation = evaluate(trained, args.data, args.batch)
    print(f"{clean(evaluation.source)}\n\n{evaluation.table()}", flush=True)
    if args.csv is not None:
        _write(args.csv, lambda: write_result_file(args.csv, evaluation.comma_separated().encode()))
    if args.png is not None:
        _write(args.png, lambda: evaluation.write_picture(args.png))
    return DONE


def _predict(trained: Trained, args: argparse.Namespace) -> int:
    from revtrain.data.imagefolder import image_files
    from revtrain.inference.predict import predict, write_mask

    files = image_files(args.images, slides=trained.streaming is not None)
    folder = place(args.images, "--images")
    masks = _mask_files(files, folder, place(args.masks, "--masks")) if args.masks is not None else {}
    text, unreadable = io.StringIO(), 0
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "rank", "class", "share" if trained.is_dense else "probability"])
    names = {path: clean(path.relative_to(folder) if path != folder else path, 60) for path in files}
    width = max(map(len, names.values()))
    for each in predict(trained, files, args.top, args.batch, bool(masks)):
        if each.error is not None:
            unreadable += 1
            print(clean(each.error), file=sys.stderr)
            continue
        if each.mask is not None:
            write_mask(masks[each.path], each.mask)
        found = "  ".join(f"{clean(name, 30)} {100 * share:.1f} %" for name, share in each.classes)
        print(f"{names[each.path]:<{width}}  {found}")
        for rank, (name, share) in enumerate(each.classes, start=1):
            rows.writerow([each.path, rank, name, f"{share:.6f}"])
    if masks:
        print(f"wrote {len(files) - unreadable} masks to {clean(args.masks)}", file=sys.stderr)
    if args.csv is not None:
        _write(args.csv, lambda: write_result_file(args.csv, text.getvalue().encode(errors="backslashreplace")))
    if unreadable:
        raise RevtrainError(
            f"{unreadable} of {len(files)} files could not be read; they are named above.\nRepair or remove them."
        )
    return DONE


def _mask_files(images: Sequence[Path], folder: Path, out: Path) -> dict[Path, Path]:
    """Where the mask of each image goes: its place in `folder`, or its name if it is that itself, and .png.

    Raises:
        RevtrainError: two masks would be one file, or one would take the place of an image.
    """
    masks: dict[Path, Path] = {}
    image_of: dict[Path, Path] = {}
    real = {image.resolve() for image in images}
    for image in images:
        mask = out / image.relative_to(folder if image != folder else folder.parent).with_suffix(".png")
        if mask in image_of:
            raise RevtrainError(
                f"{clean(image_of[mask])} and {clean(image)} would both have the mask {clean(mask)}.\n"
                "Rename one of them."
            )
        if mask.resolve() in real:
            raise RevtrainError(f"The mask {clean(mask)} would replace an image.\nGive --masks another folder.")
        masks[image], image_of[mask] = mask, image
    return masks


# ---- revtrain-export ---------------------------------------------------------------------------------------


def _export_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "revtrain-export",
        description="Write a trained network to a file that needs no revtrain: weights (.safetensors), ONNX (.onnx) "
        "or torch.export (.pt2). Its logits are compared with the network's own first.",
        epilog="The file takes normalised images (B, 3, H, W), float32; task, classes, mean and std are in its "
        "metadata.",
    )
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help=RUN_HELP)
    parser.add_argument(
        "--to", metavar="FILE", type=Path, action="append", required=True,
        help="model.safetensors, model.onnx or model.pt2; may be given several times",
    )  # fmt: skip
    parser.add_argument("--averaged", action="store_true", help=AVERAGED_HELP)
    return parser


def _export(args: argparse.Namespace) -> int:
    from revtrain.inference.export import export
    from revtrain.inference.restore import restore

    trained = restore(args.run, averaged=args.averaged)
    for path in args.to:
        difference = _write(path, partial(export, trained, path))
        said = "logits not compared: onnxruntime is not installed"
        if difference is not None:
            said = f"logits as the network's own, greatest difference {difference:.2g}"
        print(f"{clean(path)}: {trained.config.network.arch} after epoch {trained.epoch}, {said}", flush=True)
    return DONE


# ---- what both share ---------------------------------------------------------------------------------------


def _write(path: Path, write: Callable[[], Written]) -> Written:
    """What `write` returns. Raises `RevtrainError` where the file cannot be written."""
    try:
        returned = write()
    except (OSError, ValueError) as error:  # matplotlib: a suffix that it does not know
        why = getattr(error, "strerror", None) or error
        raise RevtrainError(f"{clean(path)} cannot be written: {why}.\nChoose another file or folder.") from error
    print(f"wrote {clean(path)}", file=sys.stderr)
    return returned


def _count(word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} was given; expected a whole number of at least 1")
    return int(word)
