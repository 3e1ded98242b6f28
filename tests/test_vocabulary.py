"""The layers that users of MemCNN, RevTorch, revlib and normalising flows bring: in every layout, and by hand.

tests/test_layers.py holds them to what every layer is held to, through their rows in tests/cases.py.
"""

from __future__ import annotations

import copy
import math
import os

import pytest
import torch
from cases import scale_and_shift
from torch import nn

from revtrain.core.chain import InvertibleChain
from revtrain.errors import RevtrainError
from revtrain.layers import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    ChannelPermutation,
    CouplingConv2d,
    HaarPooling,
    HalfSwap,
    InvertibleConv1x1,
    MomentumCoupling,
)

LAYOUTS = {
    "features": ((5, 4), 1),
    "1-D": ((3, 4, 5), 1),
    "2-D": ((3, 4, 3, 2), 1),
    "3-D": ((2, 4, 2, 3, 2), 1),
    "tokens": ((3, 5, 4), -1),
}


class ByChannel(nn.Module):
    """A function for any layout: a learned mixture of the channels at `dim`, then a nonlinearity."""

    def __init__(self, channels: int, result: int, dim: int, dropout: float = 0.0):
        super().__init__()
        self.linear, self.dropout, self.dim = nn.Linear(channels, result), nn.Dropout(dropout), dim

    def forward(self, x):
        return self.dropout(torch.sin(self.linear(x.movedim(self.dim, -1)))).movedim(-1, self.dim)


MAKERS = {
    "affine": lambda dim: AffineCoupling(4, ByChannel(2, 4, dim), dim),
    "affine-uneven": lambda dim: AffineCoupling((3, 1), ByChannel(1, 6, dim), dim, max_log_scale=2.0),
    "momentum": lambda dim: MomentumCoupling(4, ByChannel(2, 2, dim), 0.7, dim),
    "swap": HalfSwap,
    "swap-uneven": lambda dim: HalfSwap(dim, (1, 3)),
    "permutation": lambda dim: ChannelPermutation(4, dim),
    "conv1x1": lambda dim: InvertibleConv1x1(4, dim),
    "actnorm": lambda dim: ActNorm(4, dim),
}


def store(module: nn.Module) -> nn.Module:
    """A copy of `module` whose chains run under ordinary autograd."""
    twin = copy.deepcopy(module)
    for chain in [m for m in twin.modules() if isinstance(m, InvertibleChain)]:
        chain.backward_mode = "store"
    return twin


def step(chain, x, seed=3):
    """Output, input gradient, parameter gradients and state after one step."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = chain(x)
    (y.sin() * torch.linspace(0.5, 2, y.numel()).view(y.shape).to(y)).sum().backward()
    gradients = {name: p.grad for name, p in chain.named_parameters()}
    return y.detach(), x.grad, gradients, dict(chain.named_buffers())


def assert_as_store(chain, x, tolerance=1e-9):
    inverting, storing = step(chain, x), step(store(chain), x)
    assert all(gradient is not None for gradient in storing[2].values()), "the test is to reach every parameter"
    torch.testing.assert_close(inverting, storing, rtol=tolerance, atol=tolerance)


def moved(layer):
    """Parameters away from the initial values, where mistakes hide."""
    for parameter in layer.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return layer


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MAKERS)
def test_gradients_are_those_of_store_in_every_layout(name, layout):
    torch.manual_seed(0)
    shape, dim = LAYOUTS[layout]
    layers = [moved(MAKERS[name](dim)), HalfSwap(dim), moved(MAKERS[name](dim))]
    assert_as_store(InvertibleChain(layers).double(), torch.randn(shape, dtype=torch.float64) + 0.3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", MAKERS)
def test_inverse_without_saved_in_evaluation_mode(name, layout, dtype):
    torch.manual_seed(0)
    shape, dim = LAYOUTS[layout]
    layer, x = moved(MAKERS[name](dim)).to(dtype), torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        layer(2 * x - 1)  # what the first batch sets is set
        layer.eval()
        y = layer(x)
        kept = y.clone()
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(layer.inverse(y), x, rtol=tolerance, atol=tolerance)
    assert y.shape == x.shape
    assert torch.equal(y, kept), "inverse leaves y as it was"


@pytest.mark.parametrize("piece_bytes", [1, 100, 2**21])
@pytest.mark.parametrize("name", MAKERS)
def test_pieces_of_any_size_give_the_same(name, piece_bytes):
    torch.manual_seed(0)
    layer = moved(MAKERS[name](1)).double()
    layer.piece_bytes = piece_bytes
    assert_as_store(InvertibleChain([layer]), torch.randn(7, 4, 3, dtype=torch.float64))


def test_a_flow_of_all_of_them_trains_as_store():
    """Three steps of SGD, dropout and batch norms inside: parameters, statistics and losses stay together."""
    torch.manual_seed(0)
    chain = InvertibleChain(
        [
            ActNorm(4),
            InvertibleConv1x1(4),
            AffineCoupling(4, scale_and_shift(2, 4, dropout=0.5)),
            HalfSwap(),
            AffineCoupling((1, 3), scale_and_shift(3, 2)),
            HaarPooling(),
            ChannelPermutation(16),
            MomentumCoupling(16, scale_and_shift(8, 8, dropout=0.5)),
            ActNorm(16),
        ]
    ).double()
    x, losses = torch.randn(6, 4, 4, 4, dtype=torch.float64), []
    twins = chain, store(chain)
    for model in twins:
        torch.manual_seed(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            loss = model(x).square().mean() + model(x).sin().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-9)
    assert losses[0] != losses[2]
    for (name, a), b in zip(chain.state_dict().items(), twins[1].state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("name", MAKERS)
def test_one_layer_twice_in_one_chain(name):
    torch.manual_seed(0)
    layer = moved(MAKERS[name](1)).double()
    assert_as_store(InvertibleChain([layer, HalfSwap(), layer]), torch.randn(6, 4, 3, dtype=torch.float64))


@pytest.mark.parametrize("make", [lambda f: AffineCoupling(4, f), lambda f: MomentumCoupling(4, f)])
@pytest.mark.parametrize(
    "kind", ["in-place", "constant", "frozen", "identity", "learned map", "used twice"], ids=lambda kind: kind
)
def test_functions_of_every_kind(make, kind):
    """What plain autograd accepts as f; `in-place` also writes into what it is given."""
    result = 4 if isinstance(make(nn.Identity()), AffineCoupling) else 2

    class Function(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.map = nn.Linear(2, result), nn.Parameter(torch.randn(1, result))
            self.linear.requires_grad_(kind != "frozen")

        def forward(self, x):
            if kind == "in-place":
                x.mul_(2).add_(1)
            y = self.linear(x) + 0 * self.map
            if kind == "constant":
                return torch.ones_like(y)
            if kind == "identity":
                return x if result == 2 else torch.cat([x, x], 1)
            if kind == "learned map":
                return y + self.map
            return y + self.linear(x.tanh()) if kind == "used twice" else y

    torch.manual_seed(0)
    chain = InvertibleChain([make(Function()), HalfSwap(), make(Function())]).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    inverting, storing = step(chain, x), step(store(chain), x)
    for name, gradient in storing[2].items():  # None and zero say the same
        ours = inverting[2][name]
        expected = torch.zeros_like(chain.get_parameter(name)) if gradient is None else gradient
        torch.testing.assert_close(torch.zeros_like(expected) if ours is None else ours, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverting[:2], storing[:2], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MAKERS)
def test_autocast_is_undone_in_float32(name):
    """16-bit functions, float32 states: the rebuilt input is as good as without autocast."""
    torch.manual_seed(0)
    layer, x = moved(MAKERS[name](1)), torch.randn(6, 4, 8)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y, saved = layer.forward_(x.clone())
        torch.testing.assert_close(y, layer(x), rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(layer.inverse(y, saved), x, rtol=1e-5, atol=1e-5)


def test_affine_coupling_by_hand():
    class LogScaleAndShift(nn.Module):
        def forward(self, x2):
            return torch.cat([x2, 10 * x2], 1)

    layer = AffineCoupling(2, LogScaleAndShift(), max_log_scale=0.5)
    x = torch.tensor([[3.0, 0.0], [3.0, 1.0], [1.0, -1e3]])
    scale = math.exp(0.5 * math.tanh(1))
    expected = torch.tensor([[3.0, 0.0], [3 * scale + 10, 1.0], [math.exp(-0.5) - 1e4, -1e3]])
    torch.testing.assert_close(layer(x), expected)


def test_momentum_coupling_by_hand():
    layer = MomentumCoupling(2, nn.ReLU(), momentum=0.75)
    state = torch.tensor([[4.0, 8.0], [-2.0, 1.0]])  # x, v
    expected = torch.tensor([[11.0, 7.0], [-1.25, 0.75]])  # v' = 0.75 v + 0.25 F(x), x' = x + v'
    assert torch.equal(layer(state), expected)
    assert torch.equal(layer.inverse(expected), state)


def test_swaps_and_permutations_by_hand():
    x = torch.tensor([[1, 2, 3, 4]])
    assert HalfSwap()(x).tolist() == [[3, 4, 1, 2]]
    assert HalfSwap(channels=(1, 3))(x).tolist() == [[2, 3, 4, 1]]
    permutation = ChannelPermutation(4)
    permutation.order.copy_(torch.tensor([2, 0, 3, 1]))
    assert permutation(x).tolist() == [[3, 1, 4, 2]]
    assert permutation.inverse(torch.tensor([[3, 1, 4, 2]])).tolist() == [[1, 2, 3, 4]]


def test_a_permutation_is_drawn_from_its_generator_and_belongs_to_the_state():
    def make(seed):
        return ChannelPermutation(64, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(make(5).order, make(5).order)
    assert sorted(make(5).order.tolist()) == list(range(64))
    other = make(6)
    assert not torch.equal(other.order, make(5).order)
    other.load_state_dict(make(5).state_dict())
    x = torch.randn(2, 64)
    assert torch.equal(other(x), make(5)(x))
    assert torch.equal(other.inverse(other(x)), x), "the way back uses the order that was loaded"


def test_integer_states_pass_swaps_and_permutations():
    from revtrain.core.state_format import StateFormat

    torch.manual_seed(0)
    stream = StateFormat("int32")
    chain = InvertibleChain(
        [AdditiveCoupling(4, nn.Linear(2, 2), nn.Linear(2, 2), stream=stream), HalfSwap(), ChannelPermutation(4)],
        stream=stream,
    )
    with torch.no_grad():
        x = chain.encode(torch.randn(3, 4))
        y, saved = chain.forward_(x.clone())
        assert torch.equal(chain.inverse(y, saved), x)


def test_conv1x1_begins_orthogonal_and_mixes_the_channels_of_each_position():
    torch.manual_seed(0)
    layer = InvertibleConv1x1(5)
    torch.testing.assert_close(layer.weight @ layer.weight.T, torch.eye(5))
    moved(layer)
    x = torch.randn(2, 5, 3, 4)
    torch.testing.assert_close(layer(x), torch.conv2d(x, layer.weight[:, :, None, None]))


def test_conv1x1_loses_no_more_digits_than_its_condition_number():
    """At 1e4, float32 keeps three digits of x or more; with W^-1 from float32 the error is six times as large."""
    torch.manual_seed(0)
    layer = InvertibleConv1x1(64)
    u, _, v = torch.linalg.svd(torch.randn(64, 64, dtype=torch.float64))
    layer.weight.data = (u * torch.logspace(0, -4, 64, dtype=torch.float64) @ v).float()
    assert torch.linalg.cond(layer.weight).item() == pytest.approx(1e4, rel=1e-2)
    x = torch.randn(512, 64)
    with torch.no_grad():
        assert (layer.inverse(layer(x)) - x).norm() / x.norm() < 2e-4  # 1.1e-4; a solution in float64 has 0.9e-4


def test_a_parametrised_conv1x1_gets_the_gradients_of_store():
    """Its weight is no parameter then, but a function of one."""
    torch.manual_seed(0)
    layer = torch.nn.utils.parametrizations.orthogonal(InvertibleConv1x1(4))
    assert_as_store(InvertibleChain([layer, HalfSwap()]).double(), torch.randn(6, 4, 3, dtype=torch.float64))


def test_a_parametrised_actnorm_gets_the_gradients_of_store():
    class Halved(nn.Module):
        def forward(self, x):
            return x / 2

    layer = ActNorm(4)
    torch.nn.utils.parametrize.register_parametrization(layer, "log_scale", Halved())
    assert_as_store(InvertibleChain([moved(layer)]).double(), torch.randn(6, 4, 3, dtype=torch.float64))


@pytest.mark.parametrize("backward", ["invert", "store"])
def test_actnorm_is_set_by_the_first_batch_and_never_again(backward):
    torch.manual_seed(0)
    layer = ActNorm(3)
    chain = InvertibleChain([layer, layer], backward=backward)  # the second meets it when it is set already
    first, second = 5 * torch.randn(64, 3, 4) + 7, torch.randn(64, 3, 4)
    y = chain(first)
    y.square().sum().backward()
    with torch.no_grad():
        once = layer(first)
    torch.testing.assert_close(once.mean((0, 2)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(once.var((0, 2), correction=0), torch.ones(3))
    torch.testing.assert_close(y, layer(once))
    set_to = layer.centre.clone(), layer.spread.clone()
    chain(second).square().sum().backward()
    assert torch.equal(layer.centre, set_to[0])
    assert torch.equal(layer.spread, set_to[1])


def test_actnorm_waits_for_training_and_remembers_across_checkpoints():
    torch.manual_seed(0)
    layer, x = ActNorm(3), 5 * torch.randn(16, 3) + 7
    layer.eval()
    assert torch.equal(layer(x), x), "evaluation sets nothing"
    layer.train()
    layer(x[:0])
    assert not layer.initialised, "an empty batch says nothing"
    assert not torch.equal(layer(x), x)
    loaded = ActNorm(3)
    loaded.load_state_dict(layer.state_dict())
    assert torch.equal(loaded(x + 1), layer(x + 1)), "what was loaded is not set again"


def test_actnorm_survives_a_constant_channel_and_a_shrinking_scale():
    layer, x = ActNorm(2, eps=1e-4), torch.tensor([[1.0, 3.0], [2.0, 3.0]])
    layer(x)
    torch.testing.assert_close(layer.spread, torch.tensor([math.sqrt(0.2501), 0.01]))
    layer.log_scale.data.fill_(-20.0)
    with torch.no_grad():
        torch.testing.assert_close(layer.inverse(layer(x)), x)


@pytest.mark.parametrize("backward", ["invert", "store"])
def test_actnorm_inside_a_function_is_set_once(backward):
    """There it is a module like any other, which the backward pass computes again."""
    torch.manual_seed(0)
    chain = InvertibleChain(
        [AdditiveCoupling(4, nn.Sequential(ActNorm(2), nn.Linear(2, 2)), nn.Linear(2, 2))], backward=backward
    ).double()
    x = 3 * torch.randn(8, 4, dtype=torch.float64)
    chain(x).square().sum().backward()
    norm = chain.layers[0].f[0]
    torch.testing.assert_close(norm.centre, x[:, 2:].mean(0))
    assert norm.log_scale.grad.abs().min() > 0


def test_a_chain_of_them_as_a_residual_function():
    """It is walked back layer by layer; the leading ActNorm is computed again rather than inverted."""
    torch.manual_seed(0)

    def inner():
        return InvertibleChain([ActNorm(2), moved(InvertibleConv1x1(2)), moved(ActNorm(2)), HalfSwap()])

    chain = InvertibleChain([AdditiveCoupling(4, inner(), inner())]).double()
    assert_as_store(chain, torch.randn(6, 4, 3, dtype=torch.float64))


def first_batch_of_one_process(rank, folder):
    from torch import distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    layer, x = ActNorm(3), torch.randn(8, 3, generator=torch.Generator().manual_seed(rank)) * (1 + rank) + rank
    layer(x if rank else x[:5])  # shares of unequal size
    torch.save((layer.centre, layer.spread), folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that Python takes down


def test_actnorm_takes_the_first_batch_of_all_processes(tmp_path):
    torch.multiprocessing.spawn(first_batch_of_one_process, (tmp_path,), nprocs=2)
    shares = [torch.randn(8, 3, generator=torch.Generator().manual_seed(rank)) * (1 + rank) + rank for rank in (0, 1)]
    alone = ActNorm(3)
    alone(torch.cat([shares[0][:5], shares[1]]))
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), (alone.centre, alone.spread))


def test_haar_pooling_by_hand_and_length_preserving():
    layer = HaarPooling()
    image = torch.tensor([[1.0, 2.0], [5.0, 10.0]]).view(1, 1, 2, 2)
    assert layer(image).flatten().tolist() == [9.0, -3.0, -6.0, 2.0]
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = layer(x)
    assert y.shape == (2, 12, 2, 3)
    torch.testing.assert_close(y.norm(), x.norm())
    torch.testing.assert_close(y[:, ::4], 2 * nn.functional.avg_pool2d(x, 2))
    with torch.no_grad():
        pooled, _ = layer.forward_(x)
    assert pooled.untyped_storage().data_ptr() == x.untyped_storage().data_ptr(), "in the images' own storage"


def test_the_inverse_of_a_function_that_draws_needs_saved_in_training_mode():
    torch.manual_seed(0)
    for layer in (
        AffineCoupling(4, ByChannel(2, 4, 1, dropout=0.5)),
        MomentumCoupling(4, ByChannel(2, 2, 1, dropout=0.5)),
    ):
        x = torch.randn(5, 4)
        with torch.no_grad():
            y, saved = layer.forward_(x.clone())
            torch.testing.assert_close(layer.inverse(y, saved), x, rtol=1e-5, atol=1e-5)
            with pytest.raises(RevtrainError, match="eval"):
                layer.inverse(y)


def test_a_chain_of_them_keeps_no_activation_with_depth():
    from revtrain.memory.live import LiveStorages

    def survivors(depth):
        torch.manual_seed(0)
        kinds = [lambda: ActNorm(4), lambda: InvertibleConv1x1(4), lambda: HalfSwap(), lambda: ChannelPermutation(4)]
        kinds += [lambda: AffineCoupling(4, nn.Conv2d(2, 4, 1)), lambda: MomentumCoupling(4, nn.Conv2d(2, 2, 1))]
        chain = InvertibleChain([make() for _ in range(depth) for make in kinds])
        x = torch.randn(32, 4, 8, 8)
        with LiveStorages() as counter:
            y = chain(x)
            return counter.live_bytes, y.numel() * y.element_size()

    (shallow, output), (deep, _) = survivors(2), survivors(8)
    assert output <= shallow < 1.1 * output
    assert deep - shallow < 0.05 * output


def replica(layer):
    return layer._replicate_for_data_parallel()


@pytest.mark.parametrize(
    ("build", "given", "remedy"),
    [
        (lambda: AffineCoupling(5, nn.Identity()), "channels=5", "even"),
        (lambda: AffineCoupling((4, 0), nn.Identity()), "(4, 0)", "both parts"),
        (lambda: AffineCoupling((1, 2, 3), nn.Identity()), "(1, 2, 3)", "both parts"),
        (lambda: AffineCoupling(4, nn.Identity(), dim=0), "dim=0", "tokens"),
        (lambda: AffineCoupling(4, nn.Identity(), max_log_scale=0.0), "max_log_scale=0.0", "above 0"),
        (lambda: AffineCoupling(4, nn.Identity())(torch.zeros(2, 6)), "(2, 6)", "4 channels"),
        (lambda: AffineCoupling(4, nn.Identity())(torch.zeros(4)), "(4,)", "4 channels"),
        (lambda: AffineCoupling(4, nn.Identity())(torch.zeros(2, 4)), "(2, 2)", "(2, 4)"),
        (lambda: AffineCoupling(4, nn.Identity()).forward_(torch.zeros(2, 4)), "Identity", "(2, 4)"),
        (lambda: MomentumCoupling(4, nn.Identity(), momentum=0.0), "momentum=0.0", "0 < momentum < 1"),
        (lambda: MomentumCoupling(4, nn.Identity(), momentum=1.0), "momentum=1.0", "0.9"),
        (lambda: MomentumCoupling((1, 3), nn.Identity()), "(1, 3)", "even"),
        (lambda: MomentumCoupling(4, nn.Linear(2, 1))(torch.zeros(2, 4)), "(2, 1)", "not broadcast"),
        (lambda: MomentumCoupling(4, nn.Linear(2, 1)).forward_(torch.zeros(2, 4)), "(2, 1)", "not broadcast"),
        (lambda: HalfSwap()(torch.zeros(2, 3)), "(2, 3)", "even"),
        (lambda: HalfSwap(2)(torch.zeros(2, 4)), "dimension 2", "even"),
        (lambda: HalfSwap(-2)(torch.zeros(2, 4)), "(2, 4)", "behind the batch"),
        (lambda: ChannelPermutation(0), "channels=0", "1 or more"),
        (lambda: ChannelPermutation(4)(torch.zeros(2, 3, 4)), "(2, 3, 4)", "dim=-1"),
        (lambda: InvertibleConv1x1(0), "channels=0", "1 or more"),
        (lambda: InvertibleConv1x1(4)(torch.zeros(2, 3, 4)), "(2, 3, 4)", "dim=-1"),
        (lambda: singular().inverse(torch.zeros(2, 3)), "3x3", "orthogonal"),
        (lambda: ActNorm(0), "channels=0", "1 channel or more"),
        (lambda: ActNorm(2, eps=0.0), "eps=0.0", "above 0"),
        (lambda: ActNorm(4)(torch.zeros(2, 3)), "(2, 3)", "4 channels"),
        (lambda: replica(ActNorm(2))(torch.zeros(2, 2)), "DataParallel", "before you wrap"),
        (lambda: HaarPooling()(torch.zeros(1, 1, 3, 4)), "(1, 1, 3, 4)", "even"),
        (lambda: HaarPooling()(torch.zeros(1, 4, 4)), "(1, 4, 4)", "(B, C, H, W)"),
        (lambda: HaarPooling().forward_(torch.zeros(1, 1, 4, 5)), "(1, 1, 4, 5)", "even"),
        (lambda: HaarPooling().inverse(torch.zeros(1, 6, 2, 2)), "(1, 6, 2, 2)", "four channels"),
    ],
)
def test_refusals_say_what_was_given_and_what_to_do(build, given, remedy):
    with pytest.raises(RevtrainError) as error:
        build()
    message = str(error.value)
    assert given in message
    assert remedy in message
    assert 2 <= len(message.splitlines()) <= 5


def singular():
    layer = InvertibleConv1x1(3)
    layer.weight.data.fill_(1.0)
    return layer


def test_the_vocabulary_mixes_with_the_layers_of_before():
    torch.manual_seed(0)
    chain = InvertibleChain([CouplingConv2d(4), ActNorm(4), AffineCoupling(4, nn.Conv2d(2, 4, 3, padding=1))])
    assert_as_store(chain.double(), torch.randn(3, 4, 4, 4, dtype=torch.float64))
