"""Kind I: inverting as a user. In evaluation mode it works as it is; if something is missing, the error says what."""

import pytest
import torch
from cases import LAYERS, ids
from promise import (
    ANY,
    CHANNELS,
    HOLDERS,
    INSIDE,
    OWN,
    PER_SAMPLE,
    PRENORM,
    images,
    in_every_holder,
    in_pieces,
    loss_of,
    refused,
    seed,
    set_backward,
    values,
)
from torch import nn

from revtrain.core.chain import InvertibleChain
from revtrain.core.state_format import StateFormat
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import MIB, set_chunk_mib
from revtrain.layers import (
    AdditiveCoupling,
    ChannelPooling,
    CouplingConv2d,
    Head,
    InvertibleBatchNorm2d,
    InvertibleLeakyReLU,
    PreNorm,
)

in_both_modes = pytest.mark.parametrize("backward", ["store", "invert"])
LAYER_CASES = pytest.mark.parametrize("case", LAYERS, ids=ids(LAYERS))
# what needs numbers of the forward pass: statistics of the batch, masks of a dropout
NEEDS_SAVED = [
    case
    for case in LAYERS
    if case.name.split("-")[0] in ("batchnorm", "chunked", "prenorm", "chain", "affine", "momentum")
    or case.name in ("coupling-plain", "coupling-dropout", "coupling-chains")
]
PURE = [case for case in LAYERS if case not in NEEDS_SAVED]


def conv(channels):
    return nn.Conv2d(channels, channels, 3, padding=1)


def ready(make, backward="invert", x=None):
    """A model whose statistics have seen data, in evaluation mode."""
    seed(0)
    model = set_backward(make().double(), backward)
    x = images() if x is None else x
    with torch.no_grad():
        for i in range(2):
            model(x * (1 + i) + i)
    return model.eval()


def assert_inverts(model, x, tolerance=1e-9):
    with torch.no_grad():
        y = model(x)
        kept = y.clone()
        torch.testing.assert_close(model.inverse(y), x, rtol=tolerance, atol=tolerance)
        assert torch.equal(y, kept), "y stays as it is"


# ---- evaluation mode -----------------------------------------------------------------------------


@in_both_modes
@LAYER_CASES
def test_every_layer_in_a_chain(case, backward):
    assert_inverts(ready(lambda: InvertibleChain([case.make()]), backward, values(*case.shape)), values(*case.shape))


@LAYER_CASES
def test_every_layer_on_its_own(case):
    assert_inverts(ready(case.make, x=values(*case.shape)), values(*case.shape))


@in_pieces
@in_both_modes
@in_every_holder
def test_every_holder(holder, backward, piece_bytes):
    model = ready(lambda: holder.chain(lambda c: nn.Sequential(conv(c), nn.Dropout(0.5))), backward)
    if piece_bytes is not None:
        set_chunk_mib(model, piece_bytes / MIB)
    assert_inverts(model, images())


def test_the_result_may_be_written_into():
    """It shares no memory with y or the chain."""
    model = ready(lambda: ANY.chain(conv))
    with torch.no_grad():
        y = model(images())
        kept = y.clone()
        x = model.inverse(y)
        x.zero_()
        assert torch.equal(y, kept)
        torch.testing.assert_close(model.inverse(y), images(), rtol=1e-9, atol=1e-9)


@in_every_holder
def test_inverting_changes_no_state(holder):
    """Not the running statistics, not the random numbers, not the mode of a module."""
    model = ready(lambda: holder.chain(lambda c: nn.Sequential(conv(c), nn.Dropout(0.5))))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.no_grad():
        model.inverse(model(images()))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    assert not any(m.training for m in model.modules())


def test_with_any_strides():
    model = ready(lambda: ANY.chain(conv))
    with torch.no_grad():
        y = model(images())
        strided = torch.stack([y, -y], -1)[..., 0]
        torch.testing.assert_close(model.inverse(strided), images(), rtol=1e-9, atol=1e-9)
        expanded = model(images()[:1]).expand(3, -1, -1, -1)
        torch.testing.assert_close(model.inverse(expanded), images()[:1].expand(3, -1, -1, -1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stream", ["float32", "int32", "int16"])
@in_both_modes
def test_on_a_grid_to_the_bit(stream, backward):
    """The values of the grid that x was rounded to; y comes in floating point as the chain gave it."""
    grid = StateFormat(stream)
    seed(0)
    layers = [AdditiveCoupling(CHANNELS, conv(4), conv(4), scale=0.3, stream=grid) for _ in range(10)]
    chain = InvertibleChain([*layers, ChannelPooling()], backward=backward, stream=grid).eval()
    x = grid.snap(images().float()) if not grid.is_integer else (images().float() * 256).round() / 256
    with torch.no_grad():
        assert torch.equal(chain.inverse(chain(x)), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_in_the_type_of_the_caller(dtype):
    chain = ready(lambda: ANY.chain(conv)).to(dtype)
    with torch.no_grad():
        x = chain.inverse(chain(images().to(dtype)))
    assert x.dtype == dtype
    tolerance = {torch.float16: 0.05, torch.bfloat16: 0.3, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(x.double(), images(), rtol=tolerance, atol=tolerance)


@in_every_holder
def test_with_gradients_enabled(holder):
    """No `no_grad` around it: as in sampling from a flow. The gradient, if there is one, is that of the inverse."""
    model = ready(lambda: holder.chain(conv))
    y = model(images()).detach().requires_grad_()
    try:
        x = model.inverse(y)
    except RevtrainError as error:
        assert "no_grad" in str(error)
        return
    torch.testing.assert_close(x, images(), rtol=1e-9, atol=1e-9)
    # a result without a graph would be a missing gradient
    (dy,) = torch.autograd.grad(x, y, torch.ones_like(x))
    # J^-T 1, so that J^T of it is 1 again
    leaf = images().requires_grad_()
    (ones,) = torch.autograd.grad(model(leaf), leaf, dy)
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=1e-8, atol=1e-8)


def test_a_chain_in_a_chain_and_a_layer_twice():
    def make():
        layer = CouplingConv2d(CHANNELS)
        return InvertibleChain(
            [layer, InvertibleChain([InvertibleBatchNorm2d(CHANNELS), layer]), InvertibleLeakyReLU(0.5), layer]
        )

    assert_inverts(ready(make), images())


def test_after_training_steps():
    model = ready(lambda: PRENORM.chain(conv)).train()
    loss_of(model(images())).backward()
    assert_inverts(model.eval(), images())


def test_a_batch_of_no_images():
    model = ready(lambda: ANY.chain(conv))
    with torch.no_grad():
        assert model.inverse(model(images(0))).shape == (0, CHANNELS, 4, 4)


def test_of_a_copy_and_a_saved_model(tmp_path):
    model = ready(lambda: PRENORM.chain(conv))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = PRENORM.chain(conv).double().eval()
    again.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(again.inverse(model(images())), images(), rtol=1e-9, atol=1e-9)


@in_pieces
def test_with_side_inputs(piece_bytes):
    class Conditioned(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv, self.linear = conv(channels), nn.Linear(3, channels)

        def forward(self, x, context):
            return self.conv(x) + self.linear(context)[:, :, None, None]

    seed(0)
    context = values(4, 3)
    for holder in (ANY, PER_SAMPLE, PRENORM):
        model = holder.chain(Conditioned).double().eval()
        if piece_bytes is not None:
            set_chunk_mib(model, piece_bytes / MIB)
        with torch.no_grad():
            y = model(images(), context)
            torch.testing.assert_close(model.inverse(y, context), images(), rtol=1e-9, atol=1e-9)


# ---- training mode -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PURE, ids=ids(PURE))
def test_layers_that_need_nothing_of_the_forward_pass_invert_in_training_mode(case):
    seed(0)
    chain = InvertibleChain([case.make()]).double().train()
    with torch.no_grad():
        y = chain(values(*case.shape))
        torch.testing.assert_close(chain.inverse(y), values(*case.shape), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(chain.layers[0].inverse(y), values(*case.shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", NEEDS_SAVED, ids=ids(NEEDS_SAVED))
def test_the_others_say_what_is_missing(case):
    seed(0)
    layer = case.make().double().train()
    chain = InvertibleChain([layer])
    with torch.no_grad():
        y = chain(values(*case.shape))
        for inverse in (chain.inverse, layer.inverse):
            with refused("eval()", "forward pass"):
                inverse(y)


@pytest.mark.parametrize("case", NEEDS_SAVED, ids=ids(NEEDS_SAVED))
def test_with_what_the_forward_pass_saved_they_invert_in_training_mode(case):
    seed(0)
    layer = case.make().double().train()
    with torch.no_grad():
        y, saved = layer.forward_(values(*case.shape))
        torch.testing.assert_close(layer.inverse(y, saved), values(*case.shape), rtol=1e-9, atol=1e-9)


def test_the_message_names_the_layer_and_its_place():
    chain = InvertibleChain([CouplingConv2d(CHANNELS), InvertibleBatchNorm2d(CHANNELS), InvertibleLeakyReLU(0.5)])
    with torch.no_grad(), refused("InvertibleBatchNorm2d", "layers[1]", "eval()", "saved"):
        chain.inverse(images().float())


def test_a_chain_that_is_only_partly_in_evaluation_mode():
    """One frozen norm, as in fine-tuning: what is in evaluation mode needs nothing."""
    chain = ready(lambda: InvertibleChain([CouplingConv2d(CHANNELS), InvertibleBatchNorm2d(CHANNELS)]))
    chain.train()
    chain.layers[1].eval()
    assert_inverts(chain, images())


@pytest.mark.parametrize("holder", [ANY, OWN, INSIDE], ids=lambda holder: holder.name)
def test_a_batch_norm_or_dropout_inside_f_needs_what_was_saved_too(holder):
    """F(x2) of this batch cannot be computed again without its mask; a silent other mask would be a wrong x."""
    for body in (lambda c: nn.Dropout(0.5), lambda c: nn.BatchNorm2d(c)):
        seed(0)
        chain = holder.chain(body).double().train()
        with torch.no_grad():
            y = chain(images())
            try:
                x = chain.inverse(y)
            except RevtrainError as error:
                assert "eval()" in str(error)
            else:
                torch.testing.assert_close(x, images(), rtol=1e-9, atol=1e-9)


# ---- what has no inverse -------------------------------------------------------------------------


def test_a_chain_that_ends_in_a_head_says_that_it_has_no_inverse():
    chain = ANY.chain(conv, readout=Head(CHANNELS, 3)).eval()
    with torch.no_grad(), refused("head", "inverse"):
        chain.inverse(chain(images().float()))


@pytest.mark.parametrize("shape", [(4, 6, 4, 4), (4, 7), (8,), ()], ids=str)
def test_a_y_of_another_shape_is_refused(shape):
    """(4, 8) is one that a coupling can cut; F, a convolution, then says itself that it takes images."""
    chain = ready(lambda: ANY.chain(conv))
    with torch.no_grad(), refused("channels", str(shape)):
        chain.inverse(values(*shape))


def test_a_y_of_pooling_that_cannot_have_come_from_it():
    with torch.no_grad(), refused("ChannelPooling", "channels"):
        InvertibleChain([ChannelPooling()]).eval().inverse(images(channels=6))


def test_prenorm_in_evaluation_mode_uses_the_running_statistics():
    model = ready(lambda: InvertibleChain([AdditiveCoupling(CHANNELS, PreNorm(4, conv(4)), PreNorm(4, conv(4)))]))
    with torch.no_grad():
        alone = [model.inverse(model(image[None])) for image in images()]
    torch.testing.assert_close(torch.cat(alone), images(), rtol=1e-9, atol=1e-9)


def test_both_modes_have_the_same_inverse():
    for holder in HOLDERS:
        stored, inverted = (
            ready(lambda holder=holder: holder.chain(conv), backward) for backward in ("store", "invert")
        )
        with torch.no_grad():
            y = stored(images())
            torch.testing.assert_close(stored.inverse(y), inverted.inverse(y), rtol=1e-9, atol=1e-9)
