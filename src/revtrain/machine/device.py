"""The device a run uses: its choice, its precision, its peak of memory."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch
from torch import nn

from revtrain.errors import RevtrainError

MIB = 2**20
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def present_devices() -> dict[str, str]:
    """The devices of this machine: {"cpu": "x86_64", "cuda:0": "NVIDIA H200", ...}."""
    devices = {"cpu": platform.machine()}  # platform.processor() would start a program: uname
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def choose_device(name: str) -> torch.device:
    """The device called `name`; `auto` takes the first GPU, or the CPU where there is none.

    Raises:
        RevtrainError: the device is absent; the message lists those present.
    """
    present = present_devices()
    if name == "auto":
        name = next((each for each in present if each != "cpu"), "cpu")
    if name == "cuda":
        name = "cuda:0"
    if name not in present:
        listed = ", ".join(f"{each} ({title})" for each, title in present.items())
        raise RevtrainError(
            f"device={name} was given; this machine has: {listed}.\nUse one of these, or device=auto."
            + ("" if torch.backends.cuda.is_built() else "\nThis torch was built without CUDA.")
        )
    return torch.device(name)


def weights_channels_last(model: nn.Module) -> nn.Module:
    """`model`, its convolutions' weights channels last, as are the inputs that they meet: else each call turns them."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return model


def make_current(device: torch.device) -> None:
    """Let kernels that are launched without a device's name, as Triton's are, run on this GPU."""
    if device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(device)


def check_precision(device: torch.device, precision: str) -> None:
    """Refuse what the GPU cannot do.

    Raises:
        RevtrainError: bf16 on a GPU without it.
    """
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise RevtrainError(
            f"precision=bf16 was given; {torch.cuda.get_device_name(device)} does not support bfloat16.\n"
            "Use precision=fp16 or precision=fp32."
        )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which forward passes run: nothing for fp32, autocast for bf16 and fp16."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def make_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Loss scaling for fp16, whose gradients would underflow; passes everything through otherwise."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def place(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` moved to `device`, its convolutions' weights in the layout that is fastest there: channels last, on a CPU
    in those modules alone that read their inputs so (`channels_last`)."""
    model.to(device)
    if device.type == "cuda":
        return weights_channels_last(model)
    for module in model.modules():
        if getattr(module, "channels_last", False):
            weights_channels_last(module)
    return model


def image_layout(device_type: str) -> torch.memory_format:
    """How images (B, C, H, W) lie in memory: channels last on CUDA, elsewhere as they are."""
    return torch.channels_last if device_type == "cuda" else torch.preserve_format


def synchronize(device: torch.device) -> None:
    """Wait for the work given to a GPU, so that a clock read now tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def reset_peak(device: torch.device) -> None:
    """Start a new measurement of the peak; what probe and evaluation left in reserve is given back first."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_vram_mib(device: torch.device) -> dict[str, float] | None:
    """The peak since `reset_peak` in MiB, allocated and reserved; None without CUDA, never 0."""
    if device.type != "cuda":
        return None
    return {
        "allocated": round(torch.cuda.max_memory_allocated(device) / MIB, 1),
        "reserved": round(torch.cuda.max_memory_reserved(device) / MIB, 1),
    }


def total_memory_bytes(device: torch.device) -> int:
    """The memory of the card, or of the machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def reserved_bytes(device: torch.device) -> int:
    """What this process's allocator holds of a GPU, in use or not."""
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def available_bytes(device: torch.device) -> int:
    """What this process can have: on a GPU, what is free and what it holds already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return total_memory_bytes(device)


def describe(device: torch.device) -> dict[str, Any]:
    """What a result must say of the hardware it was measured on."""
    return {
        "name": str(device),
        "title": present_devices()[str(device)],
        "memory_mib": total_memory_bytes(device) // MIB,
        "cpu_threads": torch.get_num_threads(),
    }
