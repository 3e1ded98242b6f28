"""RevNet (Gomez et al. 2017): reversible blocks between residual blocks that halve the image.

Legend: B batch, c = width, N = depth reversible blocks in all, one stage more than pooling has
entries; every entry is "stride"; s = residual_scale.

    images (B, 3, 32, 32)
      stem        conv 3x3                           (B, c, 32, 32)
      stage 1     N / 4 x block                      y1 = x1 + s F(x2), y2 = x2 + s G(y1)
      down        residual block, stride 2           (B, 2c, 16, 16)    not invertible: stores its input
      stage 2     N / 4 x block
      down        residual block, stride 2           (B, 4c, 8, 8)
      stage 3     N / 4 x block
      down        residual block, stride 2           (B, 8c, 4, 4)
      stage 4     N / 4 x block
      head        BN, ReLU, mean over pixels, linear (B, classes)

    F, G:  2 x [ BN, ReLU, conv 3x3 ]  on half of the channels
    down:  torchvision's BasicBlock with a 1x1 convolution on its shortcut

The blocks start with BN and ReLU, so the stem is a convolution alone: a BN and a ReLU of its own would store two
more activations at full resolution. With c = 64 and N = 8 the network has about as many parameters as ResNet-18.

With stage_channels stages change as Gomez et al. have it (arch=revnet_gomez is their RevNet-38: c = 32, then 64 and
112, 3-3-3 blocks): the first block of a stage has a stride of its own, its shortcut is mean pooling and channels of
zeros; BN and ReLU follow the stem, and the first F does without its own. They save the input of such a block and
compute the rest again; here autograd stores what is inside.

Each stage is a chain of its own. What the down-sampling blocks store is the paper's global bottleneck; what is alive
inside one block while it runs backward is the local one, the largest in stage 1, as activations halve from stage to
stage. What is stored decides where memory peaks: at the end of the forward pass, in stage 4 (1,916 bytes a pixel at
c = 64 in fp32; in the backward pass 1,772 in stage 4, and 1,548 in stage 1).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from revtrain.config import CouplingSettings, Network, key, typed
from revtrain.errors import RevtrainError
from revtrain.memory.closed_form import EQ_STORED, FLOAT, Module, Term, Work
from revtrain.memory.formulas import (
    Stage,
    Symbols,
    convolution,
    end_of_residual_block,
    gradient,
    linear,
    local,
    per_pixel,
    preactivated_parameters,
    preactivated_rebuilt,
    preactivated_stored,
    preactivated_storing,
    stages,
    statistics_bytes,
    stem,
)
from revtrain.models import Images, Traits, advise_on_couplings, units_of_stages

if TYPE_CHECKING:
    from torch import nn

TRAITS = Traits(hardly_uses={"slope": "it has no LeakyReLU"})
# of docs/paper.md: gradients; what the pass keeps; what is alive inside one block
EQ_GRADIENT, EQ_GLOBAL, EQ_LOCAL = "Eq. 9", "Eq. 10", "Eq. 11"


@dataclass
class Settings(CouplingSettings):
    """Coupling blocks of ordinary functions."""

    stage_channels: list[int] = key(
        [],
        "of the stages after the first, whose first blocks have the strides, as in Gomez et al.; []: doubled between",
    )


def build(network: Network[Settings], images: Images) -> nn.Sequential:
    """`depth` reversible blocks; see the module's legend."""
    from torch import nn

    from revtrain.core.chain import InvertibleChain
    from revtrain.layers import AdditiveCoupling, Head, check_pooling
    from revtrain.models.common import StridedBlock, conv3x3, down_sampling, preactivated, state_format

    if network.width < 2 or network.width % 2:
        raise RevtrainError(
            f"width={network.width} cannot be split into two equal halves.\n"
            f"Expected an even number of channels, e.g. width={max(2, network.width + network.width % 2)}."
        )
    if any(kind != "stride" for kind in network.pooling):
        raise RevtrainError(
            f"pooling={typed(network.pooling)} does not fit arch=revnet.\n"
            "Expected only stride entries, e.g. pooling=[stride,stride,stride]; channel and batch pooling are for "
            "fully invertible architectures."
        )
    check_pooling(network.pooling, images.size)
    stream, scale = state_format(network), network.own.residual_scale
    channels, *later = channels_of_stages(network)
    strides_inside = bool(network.own.stage_channels)
    stem: nn.Module = conv3x3(3, channels)
    if strides_inside:
        stem = nn.Sequential(stem, nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    trunk: list[nn.Module] = []
    for stage, blocks in enumerate(units_of_stages(network)):
        if stage > 0:
            trunk.append((StridedBlock if strides_inside else down_sampling)(channels, later[stage - 1]))
            channels, blocks = later[stage - 1], blocks - strides_inside
        if blocks:
            functions = [(preactivated(channels // 2), preactivated(channels // 2)) for _ in range(blocks)]
            if strides_inside and stage == 0:
                functions[0] = functions[0][0][2:], functions[0][1]
            trunk.append(
                InvertibleChain(
                    [AdditiveCoupling(channels, f, g, scale=scale, state_format=stream) for f, g in functions],
                    backward=network.backward,
                    state_format=stream,
                    reuse_output=True,  # whoever stored it has done its backward pass by then
                )
            )
    head = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), Head(channels, images.classes))
    return nn.Sequential(OrderedDict(stem=stem, stages=nn.Sequential(*trunk), head=head))


def channels_of_stages(network: Network[Settings]) -> list[int]:
    """The channels of every stage: `width`, then `stage_channels`, or twice as many each time.

    Raises `RevtrainError` for another count, odd numbers, or a stage without the block that has its stride.
    """
    given, stages_after = list(network.own.stage_channels), len(network.pooling)
    if not given:
        return [network.width * 2**stage for stage in range(stages_after + 1)]
    found = [network.width, *given]
    if len(given) != stages_after or any(each % 2 for each in given) or found != sorted(found):
        raise RevtrainError(
            f"stage_channels={typed(given)} was given with width={network.width} and {stages_after} poolings.\n"
            "Expected an even number for each pooling, none below the one before, as in stage_channels=[64,112]."
        )
    if network.depth <= stages_after:
        raise RevtrainError(
            f"depth={network.depth} was given with stage_channels={typed(given)}; expected a block for each of "
            f"{stages_after + 1} stages.\nUse depth={stages_after + 1} or more."
        )
    return found


def memory(network: Network[Settings], images: Images) -> list[Module]:
    """The closed form (Eqs. 9-11): a chain for each stage, residual blocks that store between them. Symbols:
    memory.formulas. Raises `RevtrainError` with `stage_channels`, which has none."""
    if network.own.stage_channels:
        raise RevtrainError(
            f"stage_channels={typed(network.own.stage_channels)} has no closed form of its memory.\n"
            "plan=true predicts it: a step on fake tensors, which serves any network."
        )
    symbols = Symbols(network)
    row = stages(network, units_of_stages(network))
    modules = [stem(symbols)]
    for stage in row:
        if stage.index > 0:
            modules.append(_down(symbols, row[stage.index - 1], stage))
        modules += [_block(symbols, stage, unit) for unit in range(stage.units)]
    return [*modules, _head(symbols, row[-1], images.classes)]


def _block(symbols: Symbols, stage: Stage, unit: int) -> Module:
    """One reversible block; where it inverts, all blocks of a stage share one state."""
    t, values = stage.index, stage.values
    name = f"stage {t + 1}, block {unit + 1}"
    if symbols.inverts:
        stored = per_pixel(f"output of stage {t + 1}", EQ_GLOBAL, f"E_{t} s", values * symbols.s)
        gradients = (
            gradient("gradient of the state", EQ_GRADIENT, f"E_{t} g", values * symbols.g, None),
            gradient("the same, as it came from above", EQ_GRADIENT, f"4 E_{t}", values * FLOAT, None),
        )
        work: tuple[Work, ...] = preactivated_rebuilt(symbols, stage, EQ_LOCAL, gradients)
    else:
        of_block = preactivated_stored(symbols, stage)
        stored, work = replace(of_block, name=f"{name}: {of_block.name}"), preactivated_storing(symbols, stage)
    counters = symbols.on_grid * (1 + (unit == 0))  # the chain's own, too
    buffers = statistics_bytes(2 * stage.channels, torch_norms=4, counters=counters)
    parameters = preactivated_parameters(stage.channels)
    return Module(name, t, parameters, buffers, (stored,), work=work, by_autograd=not symbols.inverts)


def _result(symbols: Symbols, stage: Stage) -> tuple[int, bool]:
    """(bytes of a value of what a stage hands on, whether somebody keeps that already)."""
    if not stage.units:  # the output of the stem, of no other use, or of the block of stride 2
        return symbols.a, stage.index > 0
    if symbols.inverts:  # the chain's state itself, or a copy of it in float32
        return FLOAT, not symbols.is_integer
    return symbols.v, False


def _down(symbols: Symbols, before: Stage, after: Stage) -> Module:
    """The residual block of stride 2: stored by autograd in both modes (the global bottleneck)."""
    a, t = symbols.a, after.index
    reads, kept = _result(symbols, before)
    what = f"down {t}: inputs of conv 2 and of three BNs, ReLU's output"
    stored = [per_pixel(what, EQ_GLOBAL, f"5 E_{t} a", 5 * after.values * a)]
    if symbols.cast(reads):
        what, formula = f"down {t}: its input in 16 bit, for two convs", f"2 E_{t - 1} a"
        stored.append(per_pixel(what, EQ_GLOBAL, formula, 2 * before.values * a))
    elif not kept:
        stored.append(per_pixel(f"down {t}: its input", EQ_GLOBAL, f"E_{t - 1} a", before.values * a))
    passing: list[Term] = [local("shortcut's sum", EQ_LOCAL, f"E_{t} a", after.values * a)]
    if symbols.cast(reads) and not kept:
        passing.append(local("its input in float32", EQ_LOCAL, f"4 E_{t - 1}", before.values * FLOAT))
    small, large = before.channels, after.channels
    parameters = convolution(small, large) + convolution(large, large) + convolution(small, large, kernel_size=1)
    return Module(
        f"down {t}", t, parameters + 6 * large, statistics_bytes(3 * large, torch_norms=3), tuple(stored),
        work=(Work("forward", tuple(passing)), end_of_residual_block(before, reads)),
    )  # fmt: skip


def _head(symbols: Symbols, last: Stage, classes: int) -> Module:
    reads, kept = _result(symbols, last)
    nbytes, formula, channels = last.values * reads, f"E_{last.index} v", last.channels
    stored = [per_pixel("output of the head's ReLU", EQ_STORED, formula, nbytes)]
    if not kept:
        stored.append(per_pixel("input of the head's BN", EQ_STORED, formula, nbytes))
    work = Work("backward", (gradient("gradient of the head's ReLU", EQ_STORED, formula, nbytes),))
    parameters, buffers = linear(channels, classes) + 2 * channels, statistics_bytes(channels, torch_norms=1)
    return Module("head", last.index, parameters, buffers, tuple(stored), work=(work,))


def advise(network: Network[Settings]) -> list[str]:
    """Only the sums of coupling blocks can be off."""
    return advise_on_couplings(network.own)
