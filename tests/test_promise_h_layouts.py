"""Kind H: data of any layout, and the vocabulary that users of other libraries bring; all held to the promise.

What is new is imported inside the tests, so that each tells on its own what is missing.
"""

import pytest
import torch
from promise import (
    ANY,
    CHANNELS,
    SINGLE_IMAGES,
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

from revtrain import layers as library
from revtrain.core.chain import InvertibleChain
from revtrain.layers import (
    AdditiveCoupling,
    BatchPooling,
    ChannelPooling,
    CouplingConv2d,
    InvertibleBatchNorm2d,
    InvertibleLeakyReLU,
    PreNorm,
)

in_pieces = pytest.mark.parametrize("piece_bytes", [SINGLE_IMAGES, None], ids=["single-images", "whole-batch"])
in_both_modes = pytest.mark.parametrize("backward", ["store", "invert"])

# layout -> (shape of x with 8 channels, the dimension that is split, a function of `c` channels of such data)
LAYOUTS = {
    "features": ((6, 8), 1, lambda c: nn.Sequential(nn.Linear(c, 5), nn.SiLU(), nn.Linear(5, c))),
    "1d": ((4, 8, 6), 1, lambda c: nn.Conv1d(c, c, 3, padding=1)),
    "2d": ((4, 8, 4, 4), 1, lambda c: nn.Conv2d(c, c, 3, padding=1)),
    "3d": ((3, 8, 2, 4, 2), 1, lambda c: nn.Conv3d(c, c, 3, padding=1)),
    "tokens": ((4, 5, 8), 2, lambda c: nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 6), nn.GELU(), nn.Linear(6, c))),
    "tokens-from-behind": ((4, 5, 8), -1, lambda c: nn.Linear(c, c)),
    "channels-behind": ((3, 4, 4, 8), -1, lambda c: nn.Linear(c, c)),
}
in_every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def conv(channels):
    return nn.Conv2d(channels, channels, 3, padding=1)


def assert_inverse(layer, x, tolerance=1e-9):
    """In evaluation mode, without `saved`."""
    layer = layer.double().eval()
    with torch.no_grad():
        torch.testing.assert_close(layer.inverse(layer(x)), x, rtol=tolerance, atol=tolerance)


# ---- couplings -----------------------------------------------------------------------------------


@in_pieces
@in_every_layout
@pytest.mark.parametrize("per_sample", [False, True], ids=["any", "per-sample"])
def test_couplings_of_every_layout(layout, per_sample, piece_bytes):
    shape, dim, function = LAYOUTS[layout]
    make = lambda: InvertibleChain(  # noqa: E731
        [AdditiveCoupling(8, function(4), function(4), dim=dim, per_sample=per_sample), InvertibleLeakyReLU(0.5)]
    )
    assert_promise(make, values(*shape), piece_bytes=piece_bytes)
    seed(0)
    assert_inverse(make(), values(*shape))


@in_both_modes
@in_every_layout
def test_a_wrong_size_of_the_split_dimension_is_refused(layout, backward):
    shape, dim, _ = LAYOUTS[layout]
    wrong = list(shape)
    wrong[dim] = 10
    with refused("8", "10"):
        run(
            lambda: InvertibleChain([AdditiveCoupling(8, nn.Tanh(), nn.Tanh(), dim=dim)]),
            values(*wrong),
            backward=backward,
        )


@pytest.mark.parametrize("dim", [0, 5, -6], ids=str)
@in_both_modes
def test_a_dimension_that_cannot_be_split_is_refused(dim, backward):
    """The batch is none, and a fifth one is not there."""
    with refused("dim"):
        layer = lambda: AdditiveCoupling(8, nn.Tanh(), nn.Tanh(), dim=dim)  # noqa: E731
        run(lambda: InvertibleChain([layer()]), values(8, 8, 4, 4), backward=backward)


def _to(source, target):
    return nn.Conv2d(source, target, 3, padding=1)


UNEVEN = {
    "even": ((4, 4), 8),
    "uneven": ((2, 6), 8),
    "other-way": ((6, 2), 8),
    "one": ((1, 7), 8),
    "odd": ((3, 4), 7),
    "odd-three": ((1, 2), 3),
}


@in_pieces
@pytest.mark.parametrize("kind", UNEVEN)
def test_uneven_and_odd_splits(kind, piece_bytes):
    (c1, c2), channels = UNEVEN[kind]
    make = lambda: InvertibleChain(  # noqa: E731
        [
            AdditiveCoupling((c1, c2), _to(c2, c1), _to(c1, c2)),
            AdditiveCoupling((c1, c2), _to(c2, c1), _to(c1, c2), per_sample=True, scale=0.5),
        ]
    )
    assert_promise(make, images(channels=channels), piece_bytes=piece_bytes)
    seed(0)
    assert_inverse(make(), images(channels=channels))


@pytest.mark.parametrize("kind", ["uneven", "odd"])
def test_uneven_splits_with_prenorm(kind):
    (c1, c2), channels = UNEVEN[kind]
    make = lambda: InvertibleChain(  # noqa: E731
        [AdditiveCoupling((c1, c2), PreNorm(c2, _to(c2, c1)), PreNorm(c1, _to(c1, c2)))]
    )
    assert_promise(make, images(channels=channels), piece_bytes=SINGLE_IMAGES)


@pytest.mark.parametrize("channels", [(0, 4), (4, -1), (4,), (1, 2, 3), 5, (2.5, 1.5)], ids=str)
def test_splits_that_cannot_be_are_refused(channels):
    with refused("channels"):
        AdditiveCoupling(channels, nn.Tanh(), nn.Tanh())


@in_pieces
@pytest.mark.parametrize("channels", [8, (3, 5)], ids=str)
def test_one_sided_couplings(channels, piece_bytes):
    c1, c2 = channels if isinstance(channels, tuple) else (4, 4)
    make = lambda: InvertibleChain([InvertibleLeakyReLU(0.5), AdditiveCoupling(channels, _to(c2, c1))])  # noqa: E731
    assert_promise(make, images(), piece_bytes=piece_bytes)
    seed(0)
    chain = make().double()
    with torch.no_grad():
        assert torch.equal(chain.layers[1](images())[:, c1:], images()[:, c1:])
    assert_inverse(make(), images())


# ---- normalisation -------------------------------------------------------------------------------

CHANNEL_LAYOUTS = {name: LAYOUTS[name] for name in ("features", "1d", "2d", "3d")}


@in_pieces
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", CHANNEL_LAYOUTS)
def test_our_batch_norm_of_every_layout(layout, training, piece_bytes):
    shape, _, function = LAYOUTS[layout]
    make = lambda: InvertibleChain(  # noqa: E731
        [AdditiveCoupling(8, function(4), function(4)), InvertibleBatchNorm2d(8), InvertibleLeakyReLU(0.3)]
    ).train(training)
    assert_promise(make, values(*shape), piece_bytes=piece_bytes)


@pytest.mark.parametrize("layout", CHANNEL_LAYOUTS)
def test_our_batch_norm_is_torchs_in_every_layout(layout):
    shape = LAYOUTS[layout][0]
    torchs = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](8).double()
    ours = library.InvertibleBatchNorm(8, epsilon_i=0.0).double()
    torch.testing.assert_close(ours(values(*shape)), torchs(values(*shape)))
    torch.testing.assert_close(ours.running_var, torchs.running_var)


NORMS = {
    "layer-norm": ("tokens", lambda c: nn.LayerNorm(c)),
    "layer-norm-without-weights": ("tokens", lambda c: nn.LayerNorm(c, elementwise_affine=False)),
    "rms-norm": ("tokens", lambda c: nn.RMSNorm(c)),
    "group-norm": ("2d", lambda c: nn.GroupNorm(2, c)),
    "group-norm-1d": ("1d", lambda c: nn.GroupNorm(2, c)),
    "batch-norm-1d": ("1d", lambda c: nn.BatchNorm1d(c)),
    "batch-norm-2d": ("2d", lambda c: nn.BatchNorm2d(c)),
    "batch-norm-3d": ("3d", lambda c: nn.BatchNorm3d(c)),
    "batch-norm-of-features": ("features", lambda c: nn.BatchNorm1d(c)),
    "channels-1d": ("1d", lambda c: c),
    "channels-3d": ("3d", lambda c: c),
    "channels-of-features": ("features", lambda c: c),
}


@in_pieces
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", NORMS)
def test_prenorm_over_other_norms_and_layouts(kind, training, piece_bytes):
    layout, norm = NORMS[kind]
    shape, dim, function = LAYOUTS[layout]

    def make():
        functions = [PreNorm(norm(4), function(4)) for _ in range(2)]
        split = {} if dim == 1 else {"dim": dim}
        return InvertibleChain([AdditiveCoupling(8, *functions, **split), InvertibleLeakyReLU(0.5)]).train(training)

    assert_promise(make, values(*shape), piece_bytes=piece_bytes)


def test_prenorm_over_a_norm_is_that_norm_and_the_body():
    seed(0)
    function = PreNorm(nn.GroupNorm(2, 4), conv(4)).double()
    torch.testing.assert_close(function(images(channels=4)), function.body(function.norm(images(channels=4))))


# ---- pooling -------------------------------------------------------------------------------------

POOLS = {
    "1d": (3, 4, 12),
    "2d": (3, 4, 12, 6),
    "3d": (2, 4, 6, 6, 12),
}


@in_pieces
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("layout", POOLS)
@pytest.mark.parametrize("pooling", [ChannelPooling, BatchPooling])
def test_pooling_by_any_factor_in_every_layout(pooling, layout, factor, piece_bytes):
    make = lambda: InvertibleChain([InvertibleLeakyReLU(0.5), pooling(factor=factor), InvertibleLeakyReLU(0.6)])  # noqa: E731
    assert_promise(make, values(*POOLS[layout]), piece_bytes=piece_bytes)
    x = values(*POOLS[layout])
    y = pooling(factor=factor)(x)
    dimensions = len(x.shape) - 2
    assert y.shape[2:] == torch.Size(side // factor for side in x.shape[2:])
    grown = 0 if pooling is BatchPooling else 1
    assert y.shape[grown] == x.shape[grown] * factor**dimensions
    assert torch.equal(pooling(factor=factor).inverse(y), x)


@in_both_modes
@pytest.mark.parametrize("pooling", [ChannelPooling, BatchPooling])
def test_pooling_refuses_a_remainder_and_a_factor_that_cannot_be(pooling, backward):
    with refused("3"):
        run(lambda: InvertibleChain([pooling(factor=3)]), images(), backward=backward)
    for factor in (0, 1, -2):
        with refused("factor"):
            pooling(factor=factor)


# ---- vocabulary ----------------------------------------------------------------------------------

VOCABULARY = {
    "affine": lambda: library.AffineCoupling(CHANNELS, nn.Conv2d(4, 8, 3, padding=1)),
    "momentum": lambda: library.MomentumCoupling(CHANNELS, conv(4)),
    "half-swap": lambda: library.HalfSwap(1),
    "permutation": lambda: library.ChannelPermutation(CHANNELS),
    "convolution-1x1": lambda: library.InvertibleConv1x1(CHANNELS),
    "actnorm": lambda: library.ActNorm(CHANNELS),
    "haar": lambda: library.HaarPooling(),
    "batch-norm": lambda: library.InvertibleBatchNorm(CHANNELS),
}


def _away_from_the_start(chain):
    """Parameters that are not zero or one, where mistakes hide."""
    with torch.no_grad():
        for parameter in chain.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return chain


@in_pieces
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", VOCABULARY)
def test_every_word_of_the_vocabulary(kind, training, piece_bytes):
    def make():
        chain = InvertibleChain([CouplingConv2d(CHANNELS), VOCABULARY[kind](), InvertibleLeakyReLU(0.7)])
        return _away_from_the_start(chain).train(training)

    assert_promise(make, images(), piece_bytes=piece_bytes, tolerance=1e-8)


@pytest.mark.parametrize("kind", VOCABULARY)
def test_every_word_has_an_inverse(kind):
    seed(0)
    layer = VOCABULARY[kind]()
    layer.float()(images().float())  # what is set by the first batch is set
    assert_inverse(_away_from_the_start(layer), images(), tolerance=1e-8)


@pytest.mark.parametrize("kind", VOCABULARY)
def test_every_word_twice_and_over_several_steps(kind):
    def step(model, x):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            losses.append(backward_of_loss(model, x))
            optimizer.step()
        return losses

    def make():
        layer = VOCABULARY[kind]()
        last = [VOCABULARY[kind]()] if kind != "haar" else []
        return InvertibleChain([CouplingConv2d(CHANNELS), layer, *last])

    assert_promise(make, images(), step=step, tolerance=1e-7)


def test_what_the_words_compute():
    x = images()
    assert torch.equal(library.HalfSwap(1)(x), torch.cat([x[:, 4:], x[:, :4]], 1))
    permuted = library.ChannelPermutation(CHANNELS)(x)
    order = [next(i for i in range(CHANNELS) if torch.equal(permuted[:, j], x[:, i])) for j in range(CHANNELS)]
    assert sorted(order) == list(range(CHANNELS))
    haar = library.HaarPooling().double()(x)
    assert haar.shape == (4, 4 * CHANNELS, 2, 2)
    torch.testing.assert_close(haar.square().sum(), x.square().sum(), msg="orthonormal: energy is kept")
    momentum = library.MomentumCoupling(CHANNELS, nn.Identity()).double()(x)
    assert momentum.shape == x.shape and not torch.equal(momentum, x)


def test_actnorm_starts_from_its_first_batch_once():
    seed(0)
    layer = library.ActNorm(CHANNELS).double()
    y = InvertibleChain([layer])(5 * images() + 3)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(CHANNELS, dtype=y.dtype), rtol=0, atol=1e-9)
    torch.testing.assert_close(y.std((0, 2, 3), correction=0), torch.ones(CHANNELS, dtype=y.dtype), rtol=0, atol=1e-3)
    before = [p.clone() for p in layer.parameters()]
    layer(images() * 100)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


# ---- ordinary modules as steps -------------------------------------------------------------------

STEPS = {
    "strided-convolution": lambda: nn.Conv2d(CHANNELS, 12, 3, stride=2, padding=1),
    "max-pooling": lambda: nn.MaxPool2d(2),
    "batch-norm": lambda: nn.Sequential(nn.Conv2d(CHANNELS, 6, 1), nn.BatchNorm2d(6), nn.ReLU()),
    "in-place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(CHANNELS, 4, 1)),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Conv2d(CHANNELS, 4, 1)),
    "input": lambda: nn.Identity(),
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("step", ["StoredStep", "CheckpointedStep"])
@pytest.mark.parametrize("place", ["first", "middle", "last", "twice"])
def test_an_ordinary_module_as_a_step(step, kind, place):
    def make():
        stored = getattr(library, step)(STEPS[kind]())
        before = [] if place == "first" else [CouplingConv2d(CHANNELS), InvertibleLeakyReLU(0.5)]
        after = [] if place == "last" else [InvertibleLeakyReLU(0.6)]
        if place == "twice":
            after = [InvertibleLeakyReLU(0.6), getattr(library, step)(nn.Tanh()), InvertibleLeakyReLU(0.7)]
        return InvertibleChain([*before, stored, *after])

    assert_promise(make, images())


def test_a_whole_network_as_one_chain():
    """A small ResNet: stem, blocks, a strided convolution between stages, and the end."""

    def make():
        stage = lambda c: [  # noqa: E731
            AdditiveCoupling(c, nn.Sequential(conv(c // 2), nn.BatchNorm2d(c // 2), nn.ReLU()), conv(c // 2))
            for _ in range(2)
        ]
        return InvertibleChain(
            [
                library.StoredStep(nn.Conv2d(3, 8, 3, padding=1)),
                *stage(8),
                library.CheckpointedStep(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, 2, 1))),
                *stage(12),
                library.StoredStep(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))),
            ]
        )

    assert_promise(make, images(channels=3, side=8))


@pytest.mark.parametrize("step", ["StoredStep", "CheckpointedStep"])
def test_a_step_that_has_no_inverse_says_so(step):
    chain = InvertibleChain([CouplingConv2d(CHANNELS), getattr(library, step)(nn.MaxPool2d(2))]).double().eval()
    with refused(step, "inverse"):
        chain.inverse(chain(images()).detach())


def test_a_step_that_takes_a_side_input():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, CHANNELS)

        def forward(self, x, context):
            return x * self.linear(context)[:, :, None, None]

    for step in ("StoredStep", "CheckpointedStep"):
        make = lambda step=step: InvertibleChain([CouplingConv2d(CHANNELS), getattr(library, step)(Adds())])  # noqa: E731
        assert_promise(make, images(), values(4, 3))


# ---- a chain is a sequence -----------------------------------------------------------------------


def test_a_chain_is_a_sequence_of_its_layers():
    chain = ANY.chain(conv)
    layers = list(chain.layers)
    assert len(chain) == 3
    assert [chain[i] for i in range(3)] == layers == list(chain)
    assert chain[-1] is layers[-1]
    part = chain[1:]
    assert isinstance(part, InvertibleChain) and list(part) == layers[1:]
    with pytest.raises(IndexError):
        chain[3]


def test_a_chain_of_no_layers_is_not_false_in_a_condition_by_accident():
    """`len` makes an empty chain false, as an empty nn.Sequential is: its function is the identity all the same."""
    assert len(InvertibleChain([])) == len(nn.Sequential()) == 0


def test_a_part_of_a_chain_has_its_mode_and_trains_the_same_parameters():
    chain = set_backward(ANY.chain(conv), "store")
    part = chain[:2]
    assert part.backward_mode == "store"
    loss_of(part(images().float())).backward()
    assert all(p.grad is not None for p in chain.layers[1].parameters())


# ---- where nobody wants a gradient ---------------------------------------------------------------


class Counts(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.calls = conv(channels), []

    def forward(self, x):
        self.calls.append(torch.is_grad_enabled())
        return self.conv(x)


def _calls(model):
    return [len(m.calls) for m in model.modules() if isinstance(m, Counts)]


def test_the_walk_back_ends_where_nobody_upstream_wants_a_gradient():
    """Frozen leading layers are neither inverted nor recomputed."""
    chain = InvertibleChain([ANY.build(Counts) for _ in range(4)]).double()
    for layer in chain.layers[:2]:
        layer.requires_grad_(False)
    y = chain(images())
    assert _calls(chain) == [1] * 8
    loss_of(y).backward()
    assert _calls(chain) == [1] * 4 + [2] * 4


def test_the_walk_back_goes_on_for_an_input_that_wants_a_gradient():
    chain = InvertibleChain([ANY.build(Counts) for _ in range(2)]).double().requires_grad_(False)
    x = images().requires_grad_()
    loss_of(chain(x)).backward()
    assert x.grad is not None
    assert _calls(chain) == [2] * 4


@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_frozen_leading_layers_give_the_gradients_of_store(frozen):
    def make():
        chain = InvertibleChain(
            [CouplingConv2d(CHANNELS), InvertibleBatchNorm2d(CHANNELS), ANY.build(Counts), ANY.build(Counts)]
        )
        for layer in chain.layers[:frozen]:
            layer.requires_grad_(False)
        return chain

    def step(model, x):
        return backward_of_loss(model, x.detach())

    assert_promise(make, images(), step=step)
