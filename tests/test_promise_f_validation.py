"""Kind F: what cannot be right is refused when it is built, put in or first called; in both modes alike."""

import pytest
import torch
from promise import ANY, CHANNELS, OwnCoupling, assert_promise, images, loss_of, refused, run, values
from torch import nn

from revtrain.core.chain import InvertibleChain
from revtrain.core.layer import InvertibleLayer
from revtrain.core.state_format import StateFormat
from revtrain.errors import RevtrainError
from revtrain.layers import (
    AdditiveCoupling,
    BatchPooling,
    ChannelPooling,
    CouplingConv2d,
    Head,
    HiddenChunkCoupling,
    InvertibleBatchNorm2d,
    InvertibleLeakyReLU,
    PreNorm,
)

in_both_modes = pytest.mark.parametrize("backward", ["store", "invert"])


def conv(channels):
    return nn.Conv2d(channels, channels, 3, padding=1)


class NoInverse(InvertibleLayer):
    def forward(self, x):
        return x.exp()


# ---- shapes --------------------------------------------------------------------------------------

COUPLINGS = {
    "additive": lambda c: AdditiveCoupling(c, conv(c // 2), conv(c // 2)),
    "channel-free": lambda c: AdditiveCoupling(c, nn.Tanh(), nn.Tanh()),
    "per-sample": lambda c: AdditiveCoupling(c, nn.Tanh(), nn.Tanh(), per_sample=True),
    "prenorm": lambda c: AdditiveCoupling(c, PreNorm(c // 2, nn.Tanh()), PreNorm(c // 2, nn.Tanh())),
    "convolution": CouplingConv2d,
    "hidden-chunks": lambda c: HiddenChunkCoupling(c, hidden=3),
}


@in_both_modes
@pytest.mark.parametrize("channels", [2, 6, 5, 1])
@pytest.mark.parametrize("kind", COUPLINGS)
def test_a_coupling_refuses_another_number_of_channels(kind, channels, backward):
    """Six channels in a coupling of four: two of them would pass by, silently."""
    with refused("4", str(channels), "channels"):
        run(lambda: InvertibleChain([COUPLINGS[kind](4)]), images(channels=channels), backward=backward)


@in_both_modes
@pytest.mark.parametrize("made_for", [1, 4, 16])
def test_our_batch_norm_refuses_another_number_of_channels(made_for, backward):
    """One made for a single channel would broadcast."""
    with refused(str(made_for), str(CHANNELS), "channels"):
        run(lambda: InvertibleChain([InvertibleBatchNorm2d(made_for)]), images(), backward=backward)


@in_both_modes
@pytest.mark.parametrize("pooling", [ChannelPooling, BatchPooling])
@pytest.mark.parametrize("shape", [(2, 2, 2, 2, 2, 2), (4, 4), (16,)], ids=str)
def test_pooling_refuses_a_wrong_number_of_dimensions(pooling, shape, backward):
    with refused(pooling.__name__, "dimension"):
        run(lambda: InvertibleChain([pooling()]), values(*shape), backward=backward)


@in_both_modes
@pytest.mark.parametrize("pooling", [ChannelPooling, BatchPooling])
def test_pooling_of_three_dimensions_mixes_no_samples(pooling, backward):
    """(B, C, L) is no image without a batch: the first sample is pooled as it is alone."""
    chain, x = InvertibleChain([pooling()], backward=backward), values(3, 4, 6)
    alone = chain(x[:1])
    assert torch.equal(chain(x)[: len(alone)], alone)


@in_both_modes
def test_an_input_that_is_no_tensor_is_refused(backward):
    chain = ANY.chain(conv, backward=backward)
    for given in ([images()], None, images().numpy()):
        with refused("tensor"):
            chain(given)


@in_both_modes
def test_an_input_without_the_split_dimension_is_refused(backward):
    with refused("dimension"):
        run(lambda: InvertibleChain([COUPLINGS["channel-free"](4)]), values(4), backward=backward)


@in_both_modes
@pytest.mark.parametrize("result", [2, 6, 8], ids=str)
def test_a_function_that_changes_the_number_of_channels_is_refused(result, backward):
    layer = lambda: AdditiveCoupling(CHANNELS, nn.Conv2d(4, result, 1), nn.Tanh())  # noqa: E731
    with refused("shape", "Conv2d"):
        run(lambda: InvertibleChain([layer()]), images(), backward=backward)


@in_both_modes
@pytest.mark.parametrize(("size", "padding"), [(1, 1), (3, 0)], ids=["larger", "smaller"])
def test_a_function_that_changes_the_image_size_is_refused(size, padding, backward):
    layer = lambda: AdditiveCoupling(CHANNELS, nn.Conv2d(4, 4, size, padding=padding), nn.Tanh())  # noqa: E731
    with refused("shape", "Conv2d"):
        run(lambda: InvertibleChain([layer()]), images(), backward=backward)


# ---- state formats -------------------------------------------------------------------------------


@pytest.mark.parametrize("of_layer", ["plain", "float32", "int32"])
@pytest.mark.parametrize("of_chain", ["plain", "float32", "int32"])
def test_couplings_of_another_state_format_are_refused(of_layer, of_chain):
    layer = lambda: AdditiveCoupling(CHANNELS, conv(4), conv(4), stream=StateFormat(of_layer))  # noqa: E731
    if of_layer == of_chain:
        InvertibleChain([layer()], stream=StateFormat(of_chain))
        return
    with refused(of_layer, of_chain):
        InvertibleChain([InvertibleChain([layer()], stream=StateFormat(of_layer))], stream=StateFormat(of_chain))
    with refused(of_layer, of_chain, "AdditiveCoupling"):
        InvertibleChain([layer()], stream=StateFormat(of_chain))


def test_another_number_of_grid_bits_is_another_format():
    layer = AdditiveCoupling(CHANNELS, conv(4), conv(4), stream=StateFormat("float32", grid_bits=8))
    with refused("AdditiveCoupling"):
        InvertibleChain([layer], stream=StateFormat("float32", grid_bits=12))


def test_a_layer_put_in_later_is_held_to_the_format_of_the_chain():
    grid = StateFormat("int32")
    chain = InvertibleChain([AdditiveCoupling(CHANNELS, conv(4), conv(4), stream=grid)], stream=grid)
    for layer in (InvertibleBatchNorm2d(CHANNELS), CouplingConv2d(CHANNELS)):
        with refused(type(layer).__name__, "int32"):
            chain.layers.append(layer)
            chain(images())


# ---- what a body may contain ---------------------------------------------------------------------

NORMS = {
    "torch": lambda c: nn.BatchNorm2d(c),
    "ours": lambda c: InvertibleBatchNorm2d(c),
    "prenorm": lambda c: PreNorm(c, nn.Conv2d(c, c, 1)),
    "synchronised": lambda c: nn.SyncBatchNorm(c),
    "without-statistics": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    "deep-inside": lambda c: nn.Sequential(nn.Sequential(nn.Sequential(nn.BatchNorm2d(c)))),
}


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("holder", ["per-sample", "prenorm"])
def test_a_batch_norm_where_pieces_of_the_batch_are_run_is_refused(holder, kind):
    def body():
        return nn.Sequential(conv(4), NORMS[kind](4))

    def make():
        if holder == "per-sample":
            return InvertibleChain([AdditiveCoupling(CHANNELS, body(), body(), per_sample=True)])
        return InvertibleChain([AdditiveCoupling(CHANNELS, PreNorm(4, body()), PreNorm(4, body()))])

    with refused("BatchNorm" if kind != "prenorm" else "PreNorm"):
        run(make, images(), backward="invert")


@pytest.mark.parametrize("holder", ["per-sample", "prenorm"])
def test_a_batch_norm_put_in_later_is_refused_at_the_next_call(holder):
    function = conv if holder == "per-sample" else lambda c: PreNorm(c, nn.Sequential(conv(c)))
    chain = InvertibleChain([AdditiveCoupling(CHANNELS, function(4), function(4), per_sample=holder == "per-sample")])
    chain(images().float())
    norm = nn.Sequential(conv(4), nn.BatchNorm2d(4))
    if holder == "per-sample":
        chain.layers[0].f = norm
    else:
        chain.layers[0].f.body = norm
    with refused("BatchNorm"):
        loss_of(chain(images().float())).backward()


@pytest.mark.parametrize("holder", ["per-sample", "prenorm"])
def test_a_batch_norm_in_evaluation_mode_is_a_function_of_each_image(holder):
    """Frozen statistics mix nothing: legal there."""

    def make():
        body = lambda: nn.Sequential(conv(4), nn.BatchNorm2d(4))  # noqa: E731
        if holder == "per-sample":
            return InvertibleChain([AdditiveCoupling(CHANNELS, body(), body(), per_sample=True)]).eval()
        return InvertibleChain([AdditiveCoupling(CHANNELS, PreNorm(4, body()), PreNorm(4, body()))]).eval()

    assert_promise(make, images(), piece_bytes=1)


# ---- the end of a chain --------------------------------------------------------------------------


class OrdinaryHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(CHANNELS, 3)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize("make_head", [OrdinaryHead, lambda: nn.Sequential(nn.Flatten(), nn.Linear(128, 3))])
def test_an_ordinary_module_at_the_end_of_a_chain(make_head):
    """It is run by autograd on the output of the chain."""
    assert_promise(lambda: ANY.chain(conv, readout=make_head()), images())


def test_our_head_at_the_end_of_a_chain():
    assert_promise(lambda: ANY.chain(conv, readout=Head(CHANNELS, 3, slope=0.2)), images())


def test_something_that_is_no_module_at_the_end_of_a_chain_is_refused():
    with refused("head", "Module"):
        ANY.chain(conv, readout=lambda x: x)


# ---- layers --------------------------------------------------------------------------------------

NOT_LAYERS = {
    "module": lambda: nn.ReLU(),
    "no-inverse": NoInverse,
    "function": lambda: torch.relu,
    "none": lambda: None,
}


@pytest.mark.parametrize("kind", NOT_LAYERS)
def test_what_is_no_invertible_layer_is_refused_at_construction(kind):
    given = NOT_LAYERS[kind]()
    with refused("inverse", "Layer 1" if kind in ("module",) else ""):
        InvertibleChain([InvertibleLeakyReLU(0.5), given])


PUT = {
    "set": lambda layers, layer: layers.__setitem__(1, layer),
    "set-last": lambda layers, layer: layers.__setitem__(-1, layer),
    "append": lambda layers, layer: layers.append(layer),
    "insert": lambda layers, layer: layers.insert(0, layer),
    "extend": lambda layers, layer: layers.extend([layer]),
    "add": lambda layers, layer: layers.__iadd__([layer]),
    "by-name": lambda layers, layer: setattr(layers, "1", layer),
    "add-module": lambda layers, layer: layers.add_module("1", layer),
}


@pytest.mark.parametrize("kind", ["module", "no-inverse"])
@pytest.mark.parametrize("put", PUT)
def test_what_is_no_invertible_layer_is_refused_when_it_is_put_in_later(put, kind):
    """At once, or at the next call where torch gives no chance; never by a RecursionError in the backward pass."""
    chain = InvertibleChain([InvertibleLeakyReLU(0.5), CouplingConv2d(CHANNELS), InvertibleLeakyReLU(0.6)])
    given = NOT_LAYERS[kind]()
    with refused(type(given).__name__, "inverse"):
        PUT[put](chain.layers, given)
        chain(images().float())


def test_the_whole_list_replaced_later():
    chain = ANY.chain(conv)
    with refused("ReLU", "inverse"):
        chain.layers = nn.ModuleList([nn.ReLU()])
        chain(images().float())


def test_legal_layers_may_be_put_in_and_taken_out():
    def make():
        chain = ANY.chain(conv)
        chain.layers[0] = CouplingConv2d(CHANNELS)
        chain.layers.append(InvertibleLeakyReLU(0.8))
        chain.layers.insert(1, InvertibleBatchNorm2d(CHANNELS))
        del chain.layers[-1]
        return chain

    assert_promise(make, images())


def test_a_refused_layer_leaves_the_chain_as_it_was():
    chain = ANY.chain(conv)
    before = list(chain.layers)
    for put in ("set", "append", "insert", "extend"):
        with pytest.raises(RevtrainError):
            PUT[put](chain.layers, nn.ReLU())
        assert list(chain.layers) == before, put


def test_a_layer_whose_inverse_has_another_shape_is_refused():
    class Cuts(OwnCoupling):
        def inverse(self, y, saved=None):
            return super().inverse(y, saved)[:, :4]

    with refused("Cuts", "shape"):
        run(lambda: InvertibleChain([CouplingConv2d(CHANNELS), Cuts(conv(4))]), images(), backward="invert")


class Wrong(OwnCoupling):
    """Its inverse adds where it should take off."""

    def inverse(self, y, saved=None):
        y1, y2 = y.chunk(2, dim=1)
        return torch.cat([y1 + self.f(y2), y2], dim=1)


def test_a_wrong_inverse_is_found_by_verify():
    import revtrain

    right = InvertibleChain([CouplingConv2d(CHANNELS), OwnCoupling(conv(4)), InvertibleLeakyReLU(0.5)]).double()
    wrong = InvertibleChain([CouplingConv2d(CHANNELS), Wrong(conv(4)), InvertibleLeakyReLU(0.5)]).double()
    assert revtrain.verify(right, images())
    report = revtrain.verify(wrong, images())
    assert not report
    assert "Wrong" in str(report)


def test_a_function_that_mixes_samples_in_pieces_is_found_by_verify():
    import revtrain

    class Mixes(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = conv(channels)

        def forward(self, x):
            return self.conv(x - x.mean(0, keepdim=True))

    make = lambda: InvertibleChain([AdditiveCoupling(CHANNELS, Mixes(4), Mixes(4), per_sample=True)])  # noqa: E731
    chain = make().double()
    chain.layers[0].piece_bytes = 1
    report = revtrain.verify(chain, images())
    assert not report
    assert "AdditiveCoupling" in str(report) or "Mixes" in str(report)


# ---- arguments -----------------------------------------------------------------------------------

ARGUMENTS = {
    "scale-nan": lambda: AdditiveCoupling(4, conv(2), conv(2), scale=float("nan")),
    "scale-inf": lambda: AdditiveCoupling(4, conv(2), conv(2), scale=float("inf")),
    "channels-negative": lambda: AdditiveCoupling(-4, conv(2), conv(2)),
    "channels-fraction": lambda: AdditiveCoupling(4.5, conv(2), conv(2)),
    "channels-odd": lambda: AdditiveCoupling(5, conv(2), conv(2)),
    "f-none": lambda: AdditiveCoupling(4, None, conv(2)),
    "f-class": lambda: AdditiveCoupling(4, nn.Tanh, nn.Tanh),
    "f-function": lambda: AdditiveCoupling(4, torch.tanh, torch.tanh),
    "norm-channels": lambda: InvertibleBatchNorm2d(0),
    "norm-eps": lambda: InvertibleBatchNorm2d(4, eps=-1.0),
    "prenorm-body": lambda: PreNorm(4, torch.tanh),
    "mode": lambda: InvertibleChain([], backward="checkpoint"),
    "layers-module": lambda: InvertibleChain(InvertibleLeakyReLU(0.5)),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_that_cannot_be_right_are_refused_at_construction(kind):
    with refused():
        ARGUMENTS[kind]()


def test_a_mode_set_later_is_checked_at_the_next_call():
    """`chain.backward_mode = "stor"` would silently invert."""
    chain = ANY.chain(conv)
    with refused("stor", "invert"):
        chain.backward_mode = "stor"
        chain(images().float())
