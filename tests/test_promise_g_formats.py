"""Kind G: number formats. 16-bit models train, both modes give the same bits on a grid, a NaN is never hidden."""

import pytest
import torch
from cases import LAYERS, ids
from promise import (
    ANY,
    CHANNELS,
    INSIDE,
    OWN,
    PRENORM,
    assert_promise,
    backward_of_loss,
    images,
    loss_of,
    refused,
    run,
    seed,
    set_backward,
    values,
)
from torch import nn

from revtrain.core.chain import InvertibleChain
from revtrain.core.state_format import StateFormat
from revtrain.errors import RevtrainError
from revtrain.layers import AdditiveCoupling, CouplingConv2d, HiddenChunkCoupling, InvertibleLeakyReLU, PreNorm

in_both_modes = pytest.mark.parametrize("backward", ["store", "invert"])
LAYER_CASES = pytest.mark.parametrize("case", LAYERS, ids=ids(LAYERS))
# of the norm of a gradient: what 16 bit may cost
NARROW = {torch.float16: 0.03, torch.bfloat16: 0.2}
in_16_bit = pytest.mark.parametrize("dtype", NARROW, ids=["half", "bfloat16"])


def conv(channels):
    return nn.Conv2d(channels, channels, 3, padding=1)


def _relative(a, b):
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-6)).item()


# ---- 16 bit --------------------------------------------------------------------------------------


def _trained(make, backward, dtype, x):
    """Output and gradients of a model whose parameters are all of `dtype`."""
    seed(0)
    model = set_backward(make(), backward).to(dtype)
    x = x.to(dtype).requires_grad_()
    seed(1)
    y = model(x)
    # a mean keeps the gradients within the range of float16
    (y.float().square().mean() + y.float().sin().mean()).backward()
    return [y, x.grad, *(p.grad for p in model.parameters())]


@in_16_bit
@LAYER_CASES
def test_every_layer_trains_in_16_bit(case, dtype):
    if any(isinstance(m, nn.Dropout) and m.p for m in case.make().modules()):
        pytest.skip("masks of float16 and float32 differ; the layers are covered without dropout")
    make = lambda: InvertibleChain([case.make()])  # noqa: E731
    left = _trained(make, "invert", dtype, values(*case.shape))
    wide = _trained(make, "store", torch.float64, values(*case.shape))
    for narrow in left:
        assert narrow is not None and narrow.dtype == dtype and narrow.isfinite().all()
    assert _relative(left[0], wide[0]) < NARROW[dtype]
    whole = [torch.cat([g.detach().double().flatten() for g in gradients[1:]]) for gradients in (left, wide)]
    assert _relative(*whole) < 2 * NARROW[dtype]


@in_16_bit
@in_both_modes
def test_a_deep_chain_in_16_bit_keeps_its_gradient(backward, dtype):
    """States hold float32 at least inside: sixteen blocks are undone, whatever the type of the weights."""

    def make():
        return InvertibleChain([AdditiveCoupling(CHANNELS, conv(4), conv(4), scale=0.2) for _ in range(16)])

    left = _trained(make, backward, dtype, images())
    wide = _trained(make, "store", torch.float64, images())
    for narrow, expected in zip(left, wide, strict=True):
        assert _relative(narrow, expected) < 2 * NARROW[dtype]


@in_16_bit
@pytest.mark.parametrize("stream", ["float32", "int32", "int16"])
def test_a_model_in_16_bit_on_a_grid(stream, dtype):
    grid = StateFormat(stream)
    make = lambda: InvertibleChain(  # noqa: E731
        [AdditiveCoupling(CHANNELS, conv(4), conv(4), stream=grid) for _ in range(3)], stream=grid
    )
    left = _trained(make, "invert", dtype, images())
    wide = _trained(make, "store", torch.float64, images())
    for narrow, expected in zip(left, wide, strict=True):
        assert narrow.dtype == dtype and _relative(narrow, expected) < 2 * NARROW[dtype]


@in_16_bit
def test_weights_in_float32_and_an_input_in_16_bit_under_autocast(dtype):
    def trained(backward):
        seed(0)
        model = set_backward(ANY.chain(conv), backward)
        x = images().to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = model(x)
        y.float().square().mean().backward()
        return [y, x.grad, *(p.grad for p in model.parameters())]

    # under autocast the result has the type of the last operation: a sum of states, which are in float32 in `invert`
    for inverted, stored in zip(trained("invert"), trained("store"), strict=True):
        assert _relative(inverted, stored) < NARROW[dtype]


def test_one_function_in_another_precision():
    """A part kept in float64, say, in a model of float32: F casts for itself."""

    class Wide(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = conv(channels)

        def forward(self, x):
            return torch.nn.functional.conv2d(x.double(), self.conv.weight.double(), padding=1).to(x.dtype)

    def trained(backward):
        seed(0)
        model = set_backward(ANY.chain(Wide), backward)
        y = model(images().float())
        loss_of(y).backward()
        return [y, *(p.grad for p in model.parameters() if p.grad is not None)]

    torch.testing.assert_close(trained("invert"), trained("store"), rtol=1e-4, atol=1e-4)


def test_parameters_of_two_precisions_in_one_function():
    """Weights in 16 bit, a norm in float32, as mixed-precision recipes have it."""

    class Mixed(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv, self.norm = conv(channels), nn.GroupNorm(1, channels)

        def forward(self, x):
            return self.norm(self.conv(x.bfloat16()).float()).to(x.dtype)

    def trained(backward):
        seed(0)
        model = set_backward(ANY.chain(Mixed), backward)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.bfloat16()
        y = model(images().float())
        y.square().mean().backward()
        return [y, *(p.grad for p in model.parameters())]

    for inverted, stored in zip(trained("invert"), trained("store"), strict=True):
        assert inverted.dtype == stored.dtype
        assert _relative(inverted, stored) < 0.02


# ---- what is no number ---------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["input", "function", "weight"])
@pytest.mark.parametrize("stream", ["float32", "int32", "int16"])
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_state_on_a_grid_does_not_hide_what_is_no_number(stream, where, kind):
    """The loss is NaN (or infinite), or the step is refused: never finite without a word."""
    value = float(kind)

    class Breaks(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = conv(channels)

        def forward(self, x):
            y = self.conv(x)
            return torch.where(torch.arange(y.shape[-1]) == 0, value, y) if where == "function" else y

    grid = StateFormat(stream)
    chain = InvertibleChain([AdditiveCoupling(CHANNELS, Breaks(4), conv(4), stream=grid)], stream=grid)
    x = images().float()
    with torch.no_grad():
        if where == "input":
            x[0, 0, 0, 0] = value
        elif where == "weight":
            chain.layers[0].f.conv.weight[0, 0, 0, 0] = value
    try:
        loss = chain(x).square().mean()
    except RevtrainError:
        return
    assert not loss.isfinite()


@pytest.mark.parametrize("stream", ["int32", "int16"])
def test_a_value_beyond_the_range_of_a_grid_is_counted_but_is_a_number(stream):
    grid = StateFormat(stream)
    chain = InvertibleChain([AdditiveCoupling(CHANNELS, conv(4), conv(4), stream=grid)], stream=grid)
    x = images().float()
    x[0, 0, 0, 0] = 1e6
    chain(x)
    assert chain.overflows > 0


# ---- the same bits -------------------------------------------------------------------------------

BODIES = {
    "convolution": conv,
    "prenorm": lambda c: PreNorm(c, conv(c)),
    "batch-norm": lambda c: nn.Sequential(conv(c), nn.BatchNorm2d(c), nn.SiLU()),
}


@pytest.mark.parametrize("scale", [0.3, 1 / 3, 0.7, 1e-3, 1.5], ids="{:.3g}".format)
@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("stream", ["float32", "int32", "int16"])
def test_both_modes_give_the_same_bits_whatever_the_residual_scale(stream, body, scale):
    grid = StateFormat(stream)

    def output(backward):
        seed(0)
        layers = [AdditiveCoupling(CHANNELS, BODIES[body](4), BODIES[body](4), scale=scale, stream=grid) for _ in "123"]
        return set_backward(InvertibleChain(layers, stream=grid), backward)(images().float())

    assert torch.equal(output("store"), output("invert"))


@pytest.mark.parametrize("scale", [0.3, 1 / 3], ids="{:.3g}".format)
def test_hidden_channel_chunks_give_the_same_bits_in_both_modes(scale):
    grid = StateFormat("float32", grid_bits=10)

    def output(backward):
        seed(0)
        layers = [HiddenChunkCoupling(CHANNELS, 4, 4, scale=scale, stream=grid) for _ in range(2)]
        return set_backward(InvertibleChain(layers, stream=grid), backward)(images().float())

    assert torch.equal(output("store"), output("invert"))


@pytest.mark.parametrize("scale", [0.3, 1 / 3], ids="{:.3g}".format)
def test_without_a_grid_the_scale_rounds_alike(scale):
    """y1 = x1 + s F(x2): one rounding or two, but the same in both modes, in float32 and to the bit."""

    def output(backward):
        seed(0)
        layers = [AdditiveCoupling(CHANNELS, conv(4), conv(4), scale=scale) for _ in range(3)]
        return set_backward(InvertibleChain(layers), backward)(images().float())

    assert torch.equal(output("store"), output("invert"))


class Attention(nn.Module):
    """Pixels as tokens through one of torch's layers that has a fast path of its own for evaluation."""

    def __init__(self, channels, kind):
        super().__init__()
        self.layer = (
            nn.TransformerEncoderLayer(channels, 2, 8, dropout=0.0, batch_first=True, norm_first=True)
            if kind == "encoder"
            else nn.MultiheadAttention(channels, 2, batch_first=True)
        )

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        if isinstance(self.layer, nn.MultiheadAttention):
            y, _ = self.layer(tokens, tokens, tokens, need_weights=False)
        else:
            y = self.layer(tokens)
        return y.transpose(1, 2).reshape(x.shape)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("kind", ["encoder", "attention"])
@pytest.mark.parametrize("stream", ["float32", "int32"])
def test_a_body_whose_evaluation_takes_another_path_is_undone_exactly(stream, kind):
    """Without a graph torch runs fused kernels, with one others: the second run must be the first, to the bit."""
    grid = StateFormat(stream, grid_bits=16)  # 20 bits would leave float32 a range of 16
    seed(0)
    chain = InvertibleChain(
        [AdditiveCoupling(CHANNELS, Attention(4, kind), Attention(4, kind), stream=grid) for _ in range(4)], stream=grid
    ).eval()
    seen = _Rebuilt()
    from revtrain.core.chain import observe

    with observe(chain, seen):
        loss_of(chain(images().float())).backward()
    assert len(seen.inputs) == len(seen.rebuilt) == 4
    for before, after in zip(seen.inputs, reversed(seen.rebuilt), strict=True):
        assert torch.equal(before, after)


class _Rebuilt:
    def __init__(self):
        self.inputs, self.rebuilt = [], []

    def on_input(self, layer, x):
        self.inputs.append(x.clone())

    def on_reconstructed(self, layer, x):
        self.rebuilt.append(x.clone())


@pytest.mark.parametrize("kind", ["encoder", "attention"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("holder", [ANY, INSIDE, OWN, PRENORM], ids=lambda holder: holder.name)
def test_attention_in_both_modes(holder, training, kind):
    make = lambda: holder.chain(lambda c: Attention(c, kind)).train(training)  # noqa: E731
    assert_promise(make, images())


@pytest.mark.parametrize("stream", ["float32", "int32"])
def test_evaluation_and_training_give_the_same_bits_on_a_grid(stream):
    """Nothing in it depends on the mode, so no_grad and a step must agree."""
    grid = StateFormat(stream)
    seed(0)
    chain = InvertibleChain([AdditiveCoupling(CHANNELS, conv(4), conv(4), scale=0.3, stream=grid)] * 2, stream=grid)
    with torch.no_grad():
        expected = chain.eval()(images().float())
    assert torch.equal(chain.train()(images().float()), expected)


# ---- types of the caller's -----------------------------------------------------------------------


@in_both_modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_result_has_the_callers_type(dtype, backward):
    chain = InvertibleChain([InvertibleLeakyReLU(0.5), CouplingConv2d(CHANNELS)], backward=backward).to(dtype)
    x = images().to(dtype).requires_grad_()
    y = chain(x)
    y.sum().backward()
    with torch.no_grad():
        assert chain(x).dtype == y.dtype == x.grad.dtype == dtype


@in_both_modes
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_an_input_of_whole_numbers_is_refused(dtype, backward):
    """Images that were never divided by 255: their sums would wrap around."""
    with refused("floating point"):
        InvertibleChain([AdditiveCoupling(CHANNELS, nn.Identity(), nn.Identity())], backward=backward)(
            images().to(dtype)
        )


def test_a_default_type_of_float64():
    torch.set_default_dtype(torch.float64)
    try:
        assert_promise(lambda: PRENORM.chain(conv), images())
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_gradient_scaler_around_the_step():
    """Losses multiplied by 2^16: gradients beyond the range are infinite in both modes, and the scaler sees it."""

    def scaled(backward, factor):
        seed(0)
        model = set_backward(ANY.chain(conv), backward).half()
        y = model(images().half())
        (y.float().square().mean() * factor).backward()
        return [bool(p.grad.isfinite().all()) for p in model.parameters()]

    for factor in (1.0, 2.0**30):
        assert scaled("invert", factor) == scaled("store", factor)


def test_steps_on_a_grid_train_alike():
    grid = StateFormat("float32", grid_bits=12)

    def trained(backward):
        seed(0)
        model = set_backward(
            InvertibleChain([AdditiveCoupling(CHANNELS, conv(4), conv(4), scale=0.3, stream=grid)] * 1, stream=grid),
            backward,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            backward_of_loss(model, images().float())
            optimizer.step()
        return list(model.parameters())

    torch.testing.assert_close(trained("invert"), trained("store"), rtol=1e-4, atol=1e-5)


def test_the_types_of_what_a_step_leaves_are_those_of_store():
    for case in LAYERS:
        make = lambda case=case: InvertibleChain([case.make()])  # noqa: E731
        left = [run(make, values(*case.shape), backward=backward) for backward in ("invert", "store")]
        types = [{name: getattr(v, "dtype", None) for name, v in each.items()} for each in left]
        assert types[0] == types[1], case.name
