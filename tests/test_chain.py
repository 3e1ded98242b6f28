"""The chain against plain autograd, in every situation in which people use autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import everything, inner_chain, plain, prenorm
from torch import nn

from revtrain.core.chain import InvertibleChain, observe
from revtrain.core.layer import InvertibleLayer
from revtrain.core.repeats import without_repeats
from revtrain.core.state_format import StateFormat
from revtrain.layers import (
    AdditiveCoupling,
    BatchPooling,
    ChunkedCoupling,
    CouplingConv2d,
    Head,
    HiddenChunkCoupling,
    InvertibleBatchNorm2d,
    InvertibleLeakyReLU,
    Readout,
    WideResidual,
)


def small_chain(**options):
    torch.manual_seed(0)
    layers = [CouplingConv2d(4), InvertibleBatchNorm2d(4), InvertibleLeakyReLU(0.3)]
    return InvertibleChain([*layers, AdditiveCoupling(4, plain(2), plain(2))], **options).double()


def twins(make=small_chain):
    """The same chain twice: one that inverts, one that stores."""
    torch.manual_seed(0)
    inverting = make()
    storing = copy.deepcopy(inverting)
    for chain in [m for m in storing.modules() if isinstance(m, InvertibleChain)]:
        chain.backward_mode = "store"
    return inverting, storing


def images(batch=6, dtype=torch.float64):
    return torch.randn(batch, 4, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(3))


def assert_same_gradients(a, b, rtol=1e-9, atol=1e-10):
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert p.grad is not None, name
        torch.testing.assert_close(p.grad, q.grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_buffers(a, b):
    for (name, p), q in zip(a.named_buffers(), b.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def both(step, make=small_chain, **tolerances):
    """Run `step(chain)` on both twins with the same random numbers; everything must agree."""
    inverting, storing = twins(make)
    results = []
    for chain in (inverting, storing):
        torch.manual_seed(5)
        results.append(step(chain))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
    assert_same_gradients(inverting, storing, **tolerances)
    assert_same_buffers(inverting, storing)


def test_gradient_of_everything_with_dropout():
    both(lambda chain: chain(images()).square().sum().backward(), lambda: everything().double())


def test_relu_right_before_the_chain():
    """The ReLU saves its output, which is the chain's input: the chain must not write into it."""

    def step(chain):
        x = images().requires_grad_()
        chain(F.relu(x)).square().sum().backward()
        return x.grad

    both(step)


def test_gradient_accumulation_over_two_batches():
    def step(chain):
        for batch in images(12).chunk(2):
            (chain(batch).square().mean() / 2).backward()

    both(step)


def test_autograd_grad_of_the_input_alone():
    inverting, storing = twins()
    results = []
    for chain in (inverting, storing):
        x = images().requires_grad_()
        results.append(torch.autograd.grad(chain(x).square().sum(), x)[0])
        assert all(p.grad is None for p in chain.parameters())
    torch.testing.assert_close(*results)


def test_chain_used_twice_in_one_graph():
    both(lambda chain: chain(chain(images())).square().sum().backward(), rtol=1e-7, atol=1e-9)


def test_output_used_by_two_branches():
    def step(chain):
        y = chain(images())
        (y.square().sum() + y.sin().sum()).backward()

    both(step)


def test_output_may_be_read_after_the_backward_pass():
    chain = small_chain()
    y = chain(images())
    kept = y.detach().clone()
    y.square().sum().backward()
    assert torch.equal(y, kept)


def test_reused_output_gives_the_same_gradients_and_refuses_a_second_backward():
    both(lambda chain: (chain(images()).sum((2, 3)) ** 2).sum().backward(), lambda: small_chain(reuse_output=True))
    chain = small_chain(reuse_output=True)
    loss = chain(images()).sum((2, 3)).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()


def test_second_backward_through_a_retained_graph():
    chain = small_chain()
    loss = chain(images()).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in chain.parameters()]
    chain.zero_grad()
    loss.backward()
    for a, p in zip(first, chain.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_eval_mode_normalises_with_the_running_statistics():
    def step(chain):
        chain(images())  # one training pass moves the running statistics
        chain.eval()
        y = chain(images())
        y.square().sum().backward()
        return y.detach()

    both(step)


def test_no_grad_gives_the_same_output_without_a_graph():
    inverting, storing = twins()
    with torch.no_grad():
        y = inverting(images())
        torch.testing.assert_close(y, storing(images()))
    assert y.grad_fn is None
    assert_same_buffers(inverting, storing)


def test_frozen_parameters_get_no_gradient_and_the_others_do():
    inverting, storing = twins()
    for chain in (inverting, storing):
        chain.layers[0].f.weight.requires_grad_(False)
        chain(images()).square().sum().backward()
    assert inverting.layers[0].f.weight.grad is None
    torch.testing.assert_close(inverting.layers[0].g.weight.grad, storing.layers[0].g.weight.grad)


def test_parameter_hooks_see_the_gradient():
    chain = small_chain()
    seen = []
    weight = chain.layers[0].f.weight
    weight.register_hook(lambda gradient: seen.append(gradient.clone()))
    chain(images()).square().sum().backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], weight.grad)


def test_running_statistics_are_updated_exactly_once_a_step():
    """MemCNN updates up to three times a step, RevTorch and torch's checkpoint twice."""
    torch.manual_seed(0)
    chain = InvertibleChain([AdditiveCoupling(4, plain(2), plain(2)), InvertibleBatchNorm2d(4)]).double()
    inner, own = chain.layers[0].f[1], chain.layers[1]
    x = images()
    chain(x).square().sum().backward()
    assert inner.num_batches_tracked.item() == 1
    conv = chain.layers[0].f[0]
    mean = conv(x[:, 2:]).mean((0, 2, 3)).detach()
    torch.testing.assert_close(inner.running_mean, 0.1 * mean)
    with torch.no_grad():
        mean = chain.layers[0](x).mean((0, 2, 3))
    torch.testing.assert_close(own.running_mean, 0.1 * mean)
    assert inner.track_running_stats, "the chain leaves the module as it found it"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("backward_inside", [False, True], ids=["backward-outside", "backward-inside"])
def test_autocast(dtype, backward_inside):
    """Recomputation rounds as the forward pass did, so both twins agree far below 16-bit precision."""

    def step(chain):
        with torch.autocast("cpu", dtype=dtype):
            loss = chain(images(dtype=torch.float32)).square().mean()
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        return loss.detach()

    inverting, storing = twins(lambda: small_chain().float())
    losses = [step(chain) for chain in (inverting, storing)]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    for (name, p), q in zip(inverting.named_parameters(), storing.parameters(), strict=True):
        error = (p.grad - q.grad).norm() / q.grad.norm()
        assert error < 0.02, f"{name}: {error}"


def test_dropout_leaves_the_random_numbers_as_plain_autograd_does():
    inverting, storing = twins(lambda: everything().double())
    draws = []
    for chain in (inverting, storing):
        torch.manual_seed(9)
        chain(images()).sum().backward()
        draws.append(torch.rand(3))
    assert torch.equal(*draws)


def test_no_activation_survives_the_forward_pass_but_the_output():
    """Counted in live storages: depth adds a few numbers a layer, never an activation."""
    from revtrain.memory.live import LiveStorages

    def survivors(depth):
        torch.manual_seed(0)
        unit = [lambda: CouplingConv2d(4), lambda: InvertibleBatchNorm2d(4), lambda: InvertibleLeakyReLU(0.2)]
        chain = InvertibleChain([make() for _ in range(depth) for make in unit])
        x = torch.randn(32, 4, 8, 8)
        with LiveStorages() as counter:
            y = chain(x)
            live = counter.live_bytes
        return live, y.numel() * y.element_size()

    shallow, output = survivors(2)
    deep, _ = survivors(8)
    assert output <= shallow < 1.1 * output
    assert deep - shallow < 0.05 * output


class Doubling(InvertibleLayer):
    """A layer of somebody else: forward and inverse are all that it needs."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return 2 * x + self.shift

    def inverse(self, y, saved=None):
        return (y - self.shift) / 2


def test_a_layer_with_only_forward_and_inverse_trains():
    both(
        lambda chain: chain(images()).square().sum().backward(),
        lambda: InvertibleChain([CouplingConv2d(4), Doubling(), InvertibleLeakyReLU(0.5), Doubling()]).double(),
    )


def test_observer_sees_every_layer_and_is_gone_afterwards():
    chain = everything().double()

    class Recorder:
        def __init__(self):
            self.inputs, self.rebuilt = [], []

        def on_input(self, layer, x):
            self.inputs.append(layer)

        def on_reconstructed(self, layer, x):
            self.rebuilt.append(layer)

    recorder = Recorder()
    with observe(chain, recorder):
        chain(images()).sum().backward()
    layers = {layer for m in chain.modules() if isinstance(m, InvertibleChain) for layer in m.layers}
    assert set(recorder.inputs) == set(recorder.rebuilt) == layers
    assert len(recorder.inputs) == len(recorder.rebuilt) == len(layers), "each layer once: recomputation does not count"
    chain(images()).sum().backward()
    assert len(recorder.inputs) == len(layers)


@pytest.mark.parametrize(
    "make",
    [plain, inner_chain, prenorm, lambda channels: WideResidual(channels, 6)],
    ids=["plain", "chain", "prenorm", "wide"],
)
def test_coupling_on_a_grid_is_inverted_bit_by_bit_at_any_depth(make):
    """Multiples of 2^-b add without rounding; without a grid 40 blocks lose digits."""

    def rebuilt_exactly(name):
        torch.manual_seed(0)
        grid = StateFormat(name)
        chain = InvertibleChain(
            [AdditiveCoupling(4, make(2), make(2), state_format=grid) for _ in range(40)], state_format=grid
        )
        with torch.no_grad():
            x = chain.encode(grid.snap(images(dtype=torch.float32)))
            y, saved = chain.forward_(x.clone())
            return torch.equal(chain.inverse(y, saved), x)

    for name in ("float32", "int32", "int16"):
        assert rebuilt_exactly(name), name
    assert not rebuilt_exactly("plain")


@pytest.mark.parametrize("make", [prenorm, lambda channels: InvertibleBatchNorm2d(channels)], ids=["prenorm", "ours"])
def test_our_batch_norms_inside_any_module_are_updated_once(make):
    """In a Sequential they are a module like any other, which the backward pass computes again."""
    chain = InvertibleChain([AdditiveCoupling(4, nn.Sequential(make(2)), nn.Sequential(make(2)))]).double()
    norm = chain.layers[0].f[0]
    norm = getattr(norm, "norm", norm)
    chain(images()).square().sum().backward()
    expected = 0.1 * images()[:, 2:].mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, expected)


def test_the_grid_is_the_same_function_in_both_modes():
    def make():
        grid = StateFormat("float32", grid_bits=12)
        return InvertibleChain(
            [AdditiveCoupling(4, plain(2), plain(2), scale=0.3, state_format=grid) for _ in range(3)], state_format=grid
        )

    inverting, storing = twins(make)
    outputs = []
    for chain in (inverting, storing):
        y = chain(images(dtype=torch.float32))
        y.square().sum().backward()
        outputs.append(y.detach())
    assert torch.equal(*outputs)
    assert torch.equal(outputs[0] * 2**12, (outputs[0] * 2**12).round()), "all values lie on the grid"
    assert_same_gradients(inverting, storing, rtol=1e-4, atol=1e-5)


def test_former_names_serve_as_before():
    grid, head = StateFormat("int32"), Head(4, 10)
    coupling = AdditiveCoupling(4, plain(2), plain(2), stream=grid)
    chain = InvertibleChain([coupling], stream=grid, readout=head)
    assert coupling.residual_sum.state_format is chain.state_format is grid and chain.head is head
    assert HiddenChunkCoupling(4, 3, stream=grid).passes_integers
    assert (ChunkedCoupling, Readout) == (HiddenChunkCoupling, Head)
    with pytest.raises(TypeError, match="both head and its former name readout"):
        InvertibleChain([coupling], head=head, readout=head)


def test_a_network_saved_under_former_names_loads():
    def make():
        return nn.Sequential(InvertibleChain([CouplingConv2d(4)], head=Head(4, 10, slope=0.2)))

    network, again = make(), make()
    former = {key.replace("0.head.", "0.readout."): value for key, value in network.state_dict().items()}
    assert "0.readout.linear.weight" in former
    again.load_state_dict(former)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), again.parameters(), strict=True))


class Counting(CouplingConv2d):
    """A coupling that counts the times it works."""

    worked = 0

    def forward_(self, x):
        self.worked += 1
        return super().forward_(x)


def test_of_equal_layers_the_first_works_for_all_inside_without_repeats():
    """Equal in kind, weights and shape of the state; each gets gradients, and afterwards each works again."""
    inner = InvertibleChain([Counting(2), Counting(2)])
    layers = [Counting(4), Counting(4), BatchPooling(), BatchPooling(), Counting(4), Counting(4, kernel_size=1)]
    chain = InvertibleChain([*layers, AdditiveCoupling(4, inner, nn.Conv2d(2, 2, 1))]).double()
    before = list(chain.layers)
    with without_repeats(nn.Sequential(chain)):
        y = chain(images())
        y.sum().backward()
    assert y.shape == (96, 4, 1, 1), "both poolings: their states differ in shape"
    assert [layer.worked for layer in layers if isinstance(layer, Counting)] == [1, 0, 1, 1]
    assert [layer.worked for layer in inner.layers] == [1, 1], "a chain inside a layer stays whole"
    assert all(parameter.grad is not None for parameter in chain.parameters())
    assert list(chain.layers) == before
    chain(images())
    assert layers[1].worked == 1
