"""Kind A: the chain's own buffers never reach autograd or the caller, and it writes into nobody else's.

Autograd may hand back the very tensor that it was handed: the gradient of p in y = x + p is dy itself. Whoever goes on
writing into dy then changes the gradient of p.
"""

import functools

import pytest
import torch
from cases import LAYERS, ids
from promise import (
    ANY,
    CHANNELS,
    SINGLE_IMAGES,
    assert_equal_or_refused,
    assert_promise,
    images,
    in_every_holder,
    in_pieces,
    loss_of,
    values,
)
from torch import nn

from revtrain.core.chain import InvertibleChain
from revtrain.core.layer import InvertibleLayer
from revtrain.layers import AdditiveCoupling, CouplingConv2d, InvertibleBatchNorm2d, InvertibleLeakyReLU


class LearnedMap(nn.Module):
    """conv(x) + p, p of shape (batch, C, H, W): a position embedding."""

    def __init__(self, channels, batch=1, maps=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.maps = nn.ParameterList(torch.randn(batch, channels, 4, 4) for _ in range(maps))

    def forward(self, x):
        return self.conv(x) + sum(self.maps)


class Shift(InvertibleLayer):
    """y = x + p: the gradient of p is the gradient of y."""

    def __init__(self, batch=1):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(batch, CHANNELS, 4, 4))

    def forward(self, x):
        return x + self.shift

    def inverse(self, y, saved=None):
        return y - self.shift


@in_pieces
@in_every_holder
@pytest.mark.parametrize("batch", [1, 4])
def test_a_learned_map_added_to_the_result_of_f(holder, batch, piece_bytes):
    assert_promise(lambda: holder.chain(LearnedMap), images(batch), piece_bytes=piece_bytes)


@in_every_holder
def test_several_learned_maps_have_one_and_the_same_gradient(holder):
    """Autograd returns one tensor for all of them; to gather into one must not change the others."""
    assert_promise(lambda: holder.chain(lambda c: LearnedMap(c, maps=3)), images(1))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_learned_map_for_each_image(batch):
    assert_promise(lambda: ANY.chain(lambda c: LearnedMap(c, batch)), images(batch))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_layer_that_adds_a_learned_map(batch):
    def make():
        return InvertibleChain([InvertibleLeakyReLU(0.5), Shift(batch), InvertibleBatchNorm2d(CHANNELS)])

    assert_promise(make, images(batch))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_layer_that_stands_in_the_chain_twice(batch):
    """The second gradient is added to the first: not to a tensor that the chain works in."""

    def make():
        shift = Shift(batch)
        return InvertibleChain([shift, InvertibleLeakyReLU(0.5), shift, CouplingConv2d(CHANNELS)])

    assert_promise(make, images(batch))


@in_pieces
def test_one_module_as_f_and_g_of_two_couplings(piece_bytes):
    def make():
        f = LearnedMap(CHANNELS // 2)
        return InvertibleChain([AdditiveCoupling(CHANNELS, f, f, per_sample=True) for _ in range(2)])

    assert_promise(make, images(3), piece_bytes=piece_bytes)


@in_every_holder
def test_one_parameter_in_two_layers(holder):
    def make():
        shared = nn.Parameter(torch.randn(1, CHANNELS // 2, 1, 1))

        class Tied(nn.Module):
            def __init__(self, channels):
                super().__init__()
                self.shared = shared

            def forward(self, x):
                return x.sin() + self.shared[:, : x.shape[1]]

        return InvertibleChain([holder.build(Tied), holder.build(Tied)])

    assert_promise(make, images(1))


class ReturnsParameter(nn.Module):
    """The result is (a view of) a parameter: a chain that scales results in place would train it by accident."""

    def __init__(self, channels):
        super().__init__()
        self.value = nn.Parameter(torch.randn(1, channels, 4, 4))

    def forward(self, x):
        return self.value if len(x) == 1 else self.value.expand_as(x)


@in_every_holder
@pytest.mark.parametrize("batch", [1, 4])
def test_f_returns_a_parameter(holder, batch):
    assert_promise(lambda: holder.chain(ReturnsParameter), images(batch))


class ReturnsInput(nn.Module):
    def forward(self, x):
        return x


@in_pieces
@in_every_holder
@pytest.mark.parametrize("view", [ReturnsInput, nn.Identity, lambda: nn.Flatten(0, 0)], ids=["input", "id", "view"])
def test_f_returns_its_own_input(holder, view, piece_bytes):
    assert_promise(lambda: holder.chain(lambda _: view()), images(), piece_bytes=piece_bytes)


def test_a_layer_that_returns_its_own_input():
    class Same(InvertibleLayer):
        def forward(self, x):
            return x

        def inverse(self, y, saved=None):
            return y

    assert_promise(lambda: InvertibleChain([Same(), CouplingConv2d(CHANNELS), Same(), Same()]), images())


class KeepsGradient(nn.Module):
    """A hook on the result keeps the gradient that arrives, as tools that plot gradients do."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)
        self.kept = []

    def forward(self, x):
        y = self.conv(x)
        if y.requires_grad:
            y.register_hook(self.kept.append)
        return y


@in_every_holder
def test_gradients_that_a_hook_inside_f_keeps_stay_what_they_were(holder):
    def step(model, x):
        loss_of(model(x)).backward()
        return [gradient for m in model.modules() if isinstance(m, KeepsGradient) for gradient in m.kept]

    assert_promise(lambda: holder.chain(KeepsGradient), images(), step=step)


@in_every_holder
def test_what_f_keeps_of_its_input_and_result_stays_what_it_was(holder):
    class Keeps(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = nn.Conv2d(channels, channels, 1)

        def forward(self, x):
            self.kept = x, self.conv(x)
            return self.kept[1]

    def step(model, x):
        y = model(x)
        kept = [m.kept for m in model.modules() if isinstance(m, Keeps)]
        loss_of(y).backward()
        return [tensor for pair in kept for tensor in pair]

    assert_promise(lambda: holder.chain(Keeps), images(), step=step)


class PassesGradientOn(torch.autograd.Function):
    """x + y, whose backward pass returns the very tensor that it is given, twice."""

    @staticmethod
    def forward(ctx, x, y):
        return x + y

    @staticmethod
    def backward(ctx, dz):
        return dz, dz


@in_pieces
@in_every_holder
def test_a_function_of_the_users_whose_backward_returns_what_it_was_given(holder, piece_bytes):
    class Adds(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.value = nn.Parameter(torch.randn(1, channels, 4, 4))

        def forward(self, x):
            # Broadcasting is autograd's; for one image the two shapes are equal.
            return PassesGradientOn.apply(x, self.value.expand(len(x), -1, -1, -1))

    assert_promise(lambda: holder.chain(Adds), images(3), piece_bytes=piece_bytes)


def test_hooks_of_parameters_may_keep_the_gradient():
    def step(model, x):
        kept = {}  # hooks of different parameters fire in any order
        for name, parameter in model.named_parameters():
            parameter.register_hook(functools.partial(kept.__setitem__, name))
        loss_of(model(x)).backward()
        return [kept[name] for name, _ in model.named_parameters()]

    assert_promise(lambda: ANY.chain(lambda c: LearnedMap(c, maps=2)), images(1), step=step)


def test_no_two_gradients_share_memory():
    """To zero one, as optimizers do in place, leaves the others as they are."""

    def step(model, x):
        y = model(x)
        y.retain_grad()
        loss_of(y).backward()
        tensors = [x, y, *model.parameters()]
        for tensor in tensors:
            kept = [other.grad.clone() for other in tensors if other is not tensor]
            saved = tensor.grad.clone()
            tensor.grad.zero_()
            assert all(
                torch.equal(a, b.grad) for a, b in zip(kept, (o for o in tensors if o is not tensor), strict=True)
            )
            tensor.grad.copy_(saved)
        return y, y.grad

    make = lambda: InvertibleChain([Shift(), ANY.build(lambda c: LearnedMap(c, maps=2))])  # noqa: E731
    assert_promise(make, images(1), step=step)


LAYER_CASES = pytest.mark.parametrize("case", LAYERS, ids=ids(LAYERS))
GRADIENTS = {
    "expanded": lambda y: torch.randn(1, *y.shape[1:], dtype=y.dtype).expand_as(y),
    "strided": lambda y: torch.randn(*y.shape, 2, dtype=y.dtype)[..., 0],
}


@LAYER_CASES
@pytest.mark.parametrize("kind", GRADIENTS)
def test_the_gradient_that_the_caller_hands_in_is_only_read(case, kind):
    def step(model, x):
        y = model(x)
        dy = GRADIENTS[kind](y)
        kept = dy.clone()
        y.backward(dy)
        assert torch.equal(dy, kept)
        return y

    assert_promise(lambda: InvertibleChain([case.make()]), values(*case.shape), step=step)


@LAYER_CASES
def test_an_input_with_any_strides_is_only_read(case):
    def step(model, x):
        strided = torch.stack([x, -x], dim=-1)[..., 0].transpose(2, 3)
        kept = strided.detach().clone()
        y = model(strided)
        loss_of(y).backward()
        assert torch.equal(strided, kept)
        return y

    assert_promise(lambda: InvertibleChain([case.make()]), values(*case.shape), step=step)


@LAYER_CASES
def test_an_expanded_input_is_only_read(case):
    def step(model, x):
        y = model(x[:1].expand_as(x))
        loss_of(y).backward()
        return y

    assert_promise(lambda: InvertibleChain([case.make()]), values(*case.shape), step=step)


@pytest.mark.parametrize("in_place", [lambda y: y.relu_(), lambda y: y.add_(1), lambda y: y.mul_(y.detach().clone())])
@pytest.mark.parametrize("reuse_output", [False, True], ids=["kept", "reused"])
def test_an_output_that_is_used_in_place_gives_the_same_gradients_or_is_refused(in_place, reuse_output):
    """autograd's own refusal is one, too: it says that a value was modified in place."""

    def step(model, x):
        y = model(x)
        in_place(y)
        loss_of(y).backward()
        return y

    chain = lambda: ANY.chain(LearnedMap, reuse_output=reuse_output)  # noqa: E731
    assert_equal_or_refused(chain, images(1), step=step, also=(RuntimeError,))


def test_an_input_that_is_written_to_after_the_call():
    """The chain keeps its output alone: the caller may reuse the input's memory."""

    def step(model, x):
        copy = x.detach().clone()
        y = model(copy)
        copy.zero_()
        loss_of(y).backward()
        return y

    # Plain autograd refuses this where a layer saved its input: a first layer that does not.
    make = lambda: InvertibleChain([Shift(), InvertibleLeakyReLU(0.5), ANY.build(LearnedMap)])  # noqa: E731
    assert_promise(make, images(1), step=step)


def test_an_input_that_is_a_view_of_a_parameter():
    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompt = nn.Parameter(torch.randn(2, CHANNELS, 4, 4))
            self.chain = InvertibleChain([Shift(), ANY.build(LearnedMap)])

        def forward(self):
            return self.chain(self.prompt[:1])

    assert_promise(Prompted)


def test_small_pieces_do_not_change_where_gradients_are_gathered():
    """Gradients of the second image are added to those of the first."""
    assert_promise(lambda: ANY.chain(lambda c: LearnedMap(c, maps=2)), images(5), piece_bytes=SINGLE_IMAGES)
