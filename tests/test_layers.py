"""Every layer: round trip, exact gradient, the lean forms equal to the plain ones, and clear refusals."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from cases import LAYERS, compose, ids

from revtrain.core.chain import InvertibleChain
from revtrain.core.gradients import Gradients
from revtrain.errors import RevtrainError
from revtrain.kernels.norm_activation import pack_signs, unpack_signs
from revtrain.kernels.pieces import batch_pieces, few_rounds, join, rounds, set_chunk_mib
from revtrain.layers import (
    AdditiveCoupling,
    BatchPooling,
    BoundedConv2d,
    ChannelPooling,
    CouplingConv2d,
    InvertibleBatchNorm2d,
    InvertibleLeakyReLU,
    check_pooling,
    merge_sub_images,
)
from revtrain.models import build_model
from revtrain.optim import make_optimizer

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}


def make(case, dtype=torch.float64, training=True):
    torch.manual_seed(0)
    layer = case.make().to(dtype).train(training)
    for parameter in layer.parameters():  # away from the initial values, where mistakes hide
        parameter.data += 0.3 * torch.randn_like(parameter)
    for buffer in layer.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return layer, torch.randn(case.shape, dtype=dtype) * 2 + 0.5


def assert_same(actual, expected, tolerance):
    """Same shape and dtype, finite, and close."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", LAYERS, ids=ids(LAYERS))
def test_round_trip(case, training, dtype):
    layer, x = make(case, dtype, training)
    with torch.no_grad():
        y, saved = layer.forward_(x.clone())
        kept = y.clone()
        assert_same(layer.inverse(y, saved), x, TOLERANCE[dtype])
        assert torch.equal(y, kept), "inverse must leave y as it was"
        assert_same(layer.inverse_(y, saved), x, TOLERANCE[dtype])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", LAYERS, ids=ids(LAYERS))
def test_lean_forward_equals_the_plain_one(case, training):
    layer, x = make(case, training=training)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        for chain in [m for m in plain.modules() if isinstance(m, InvertibleChain)]:
            chain.backward_mode = "store"
        torch.manual_seed(1)
        expected = plain(x)
        torch.manual_seed(1)
        y, saved = layer.forward_(x.clone())
        assert_same(y, expected, 1e-11)
        for (name, a), (_, b) in zip(layer.named_buffers(), plain.named_buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=f"{name}: the lean form must update what the plain one does")
        before = [b.clone() for b in layer.buffers()]
        assert_same(layer.recompute_(x.clone(), saved), expected, 1e-11)
        assert all(torch.equal(a, b) for a, b in zip(before, layer.buffers(), strict=True)), "updates nothing"


@pytest.mark.parametrize("piece_bytes", [1, 600, 2**21], ids=lambda b: f"chunk-{b}")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", LAYERS, ids=ids(LAYERS))
def test_lean_backward_equals_autograd(case, training, piece_bytes):
    layer, x = make(case, training=training)
    set_chunk_mib(layer, piece_bytes / 2**20)
    plain = copy.deepcopy(layer)
    for chain in [m for m in plain.modules() if isinstance(m, InvertibleChain)]:
        chain.backward_mode = "store"
    leaf = x.clone().requires_grad_()
    torch.manual_seed(1)
    expected = plain(leaf)
    dy = torch.randn_like(expected)
    expected.backward(dy)

    parameters = list(layer.parameters())
    grads = Gradients(parameters)
    with torch.no_grad():
        torch.manual_seed(1)
        y, saved = layer.forward_(x.clone())
        rebuilt, dx = layer.backward_(y, dy.clone(), saved, grads)
    assert_same(rebuilt, x, 1e-10)
    assert_same(dx, leaf.grad, 1e-9)
    for (name, p), gradient in zip(plain.named_parameters(), grads.values(), strict=True):
        assert gradient is not None, name
        torch.testing.assert_close(gradient, p.grad, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("case", LAYERS, ids=ids(LAYERS))
def test_gradcheck_through_the_chain(case):
    """The gradient is exact: against finite differences in float64, inputs and parameters."""
    layer, x = make(case)
    if any(isinstance(m, torch.nn.Dropout) and m.p for m in layer.modules()):
        pytest.skip("finite differences need one mask for all evaluations; test_chain.py covers dropout")
    chain = InvertibleChain([layer]) if not isinstance(layer, InvertibleChain) else layer
    x = x[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: chain(x), (x, *chain.parameters()), fast_mode=True, atol=1e-5)


def test_kept_signs_give_the_gradient_of_autograd_at_zero():
    """torch multiplies by n there; a value is exactly its channel's mean now and then."""
    layer = InvertibleLeakyReLU(0.25)
    x = torch.tensor([-4.0, 0.0, -0.0, 3.0])
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    y, saved = layer.recompute_for_backward_(x.clone(), None)
    assert torch.equal(layer.backward_(y, torch.ones(4), saved, Gradients([]))[1], leaf.grad)


def test_leakyrelu_means_n_times_x():
    """Eq. 24 in the meaning of section 5; alpha (28c) is the same for n and 1/n, so only this test can tell."""
    layer = InvertibleLeakyReLU(0.25)
    x = torch.tensor([-4.0, 0.0, 3.0])
    assert torch.equal(layer(x), torch.tensor([-1.0, 0.0, 3.0]))
    assert torch.equal(layer.inverse(layer(x)), x)


def test_batchnorm_agrees_with_torch():
    """With epsilon_i = 0 and a positive gamma it is torch's BN, running statistics included."""
    ours, theirs = InvertibleBatchNorm2d(3, epsilon_i=0.0), torch.nn.BatchNorm2d(3)
    x = torch.randn(8, 3, 5, 5) * 3 + 1
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.no_grad():
        torch.testing.assert_close(ours.forward_(x.clone())[0], theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)


def test_batchnorm_gain_never_vanishes():
    """Eq. 23 as corrected: |gamma| + epsilon_i, where the draft's |gamma + epsilon_i| is zero at -epsilon_i."""
    layer = InvertibleBatchNorm2d(2, epsilon_i=0.1)
    layer.weight.data = torch.tensor([-0.1, 0.0])
    torch.testing.assert_close(layer.gain(), torch.tensor([0.2, 0.1]))


@pytest.mark.parametrize(("sign", "signs"), [("positive", {1.0}), ("negative", {-1.0}), ("mixed", {1.0, -1.0})])
def test_the_gains_of_a_batchnorm_have_the_sign_asked_for(sign, signs):
    torch.manual_seed(0)
    layer = InvertibleBatchNorm2d(32, epsilon_i=0.1, sign=sign)
    layer.weight.data[0] = -0.5
    assert set(torch.sign(layer.gain()).tolist()) == signs
    assert layer.gain().abs().min() > 0.1
    again = InvertibleBatchNorm2d(32, epsilon_i=0.1, sign=sign)
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again.gain(), layer.gain()), "drawn signs belong to the state"


def largest_singular_value(conv: torch.nn.Conv2d, side: int) -> float:
    """Exactly, of the whole linear map on images of side x side pixels."""
    inputs = torch.eye(conv.in_channels * side * side).view(-1, conv.in_channels, side, side)
    with torch.no_grad():
        return torch.linalg.matrix_norm(conv(inputs).flatten(1), 2).item()


def test_a_bounded_convolution_keeps_to_its_bound():
    torch.manual_seed(0)
    conv = BoundedConv2d(4, max_gain=0.8)
    conv.weight.data.mul_(10)
    conv.constrain_()
    assert largest_singular_value(conv, 8) == pytest.approx(0.8, rel=0.02)
    assert largest_singular_value(conv, 16) < 0.9, "other image sizes have nearly the same"
    small = conv.weight.data.mul_(0.1).clone()
    conv.constrain_()
    assert torch.equal(conv.weight, small), "what is below the bound stays as it is"


def test_the_optimizer_brings_convolutions_back_to_their_bound():
    cfg = compose("arch=layerwise", "width=4", "depth=1", "max_gain=0.5", "lr=0.1")
    torch.manual_seed(0)
    model = build_model(cfg, 10, 32)
    optimizer = make_optimizer(model, cfg)
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    convs = [module for module in model.modules() if isinstance(module, BoundedConv2d)]
    assert len(convs) == 2
    assert max(largest_singular_value(conv, 8) for conv in convs) < 0.65, "one iteration a step follows nearly"


def test_batchnorm_inverts_with_the_biased_deviation():
    """With the unbiased one the SNR of the inverse is capped near (2 B H W)^2, here 72 dB."""
    layer, x = InvertibleBatchNorm2d(2).double(), torch.randn(32, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        y, saved = layer.forward_(x.clone())
    torch.testing.assert_close(saved.deviation.flatten() ** 2, x.var((0, 2, 3), correction=0) + layer.eps)
    error = (layer.inverse(y, saved) - x).norm() / x.norm()
    assert error < 1e-14


def test_pooling_is_the_picture_in_its_docstring():
    image = torch.tensor([[1.0, 2, 5, 6], [3, 4, 7, 8], [9, 10, 13, 14], [11, 12, 15, 16]]).view(1, 1, 4, 4)
    parts = torch.tensor([[[1.0, 5], [9, 13]], [[2, 6], [10, 14]], [[3, 7], [11, 15]], [[4, 8], [12, 16]]])
    assert torch.equal(ChannelPooling()(image), parts.view(1, 4, 2, 2))
    assert torch.equal(BatchPooling()(image), parts.view(4, 1, 2, 2))


@pytest.mark.parametrize("layer", [ChannelPooling(), BatchPooling()], ids=["channel", "batch"])
def test_pooling_stays_in_each_images_own_storage(layer):
    x = torch.randn(5, 2, 4, 4)
    images = [set(image.flatten().tolist()) for image in x]
    with torch.no_grad():
        y, _ = layer.forward_(x)
    assert y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert [set(image.flatten().tolist()) for image in y.view(5, -1)] == images


def test_merge_takes_the_mean_over_the_parts_of_one_image():
    features = torch.arange(12.0).view(12, 1)
    assert merge_sub_images(features, 4).flatten().tolist() == [1.5, 5.5, 9.5]


def test_batch_pieces_cover_the_batch_within_the_bound():
    x = torch.zeros(10, 3, 2, 2)  # 48 bytes a sample
    slices = list(batch_pieces(x, 150))
    assert [s.stop - s.start for s in slices] == [3, 3, 3, 1]
    assert np.concatenate([np.arange(10)[s] for s in slices]).tolist() == list(range(10))
    assert len(list(batch_pieces(x, 1))) == 10, "one sample at least"


def test_loops_end_early_inside_few_rounds_and_there_alone():
    x, parts = torch.zeros(10, 3), [torch.ones(2, 3), torch.ones(2, 3)]

    def pieces() -> int:
        return len(list(batch_pieces(x, 1)))

    with ThreadPoolExecutor(1) as another, few_rounds(2):
        assert pieces() == 2
        assert list(rounds("abc")) == ["a", "b"]
        assert another.submit(pieces).result() == 10, "a run in another thread goes through all of them"
        assert join(parts, 10).shape == (10, 3)
        assert join(parts, 9, dim=1).shape == (2, 9)
        with few_rounds(1):
            assert pieces() == 1
        assert pieces() == 2
    with pytest.raises(KeyError), few_rounds(2):
        raise KeyError
    assert pieces() == 10
    assert list(rounds("abc")) == ["a", "b", "c"]
    assert torch.equal(join(parts, 4), torch.ones(4, 3))


@pytest.mark.parametrize(
    ("build", "given", "remedy"),
    [
        (lambda: InvertibleLeakyReLU(0.0), "slope=0", "0 < slope <= 1"),
        (lambda: InvertibleLeakyReLU(5.0), "slope=5", "slope=0.2"),
        (lambda: InvertibleLeakyReLU(-0.1), "slope=-0.1", "0 < slope <= 1"),
        (lambda: CouplingConv2d(5), "5 channels", "even"),
        (lambda: CouplingConv2d(0), "0 channels", "even"),
        (lambda: CouplingConv2d(4, kernel_size=2), "kernel_size=2", "odd"),
        (lambda: AdditiveCoupling(7, plain_module(), plain_module()), "7 channels", "even"),
        (lambda: InvertibleBatchNorm2d(4, epsilon_i=-1), "epsilon_i=-1", "0 or more"),
        (lambda: InvertibleBatchNorm2d(4, sign="odd"), "norm_sign=odd", "mixed"),
        (lambda: CouplingConv2d(4, max_gain=0.0), "max_gain=0.0", "above 0"),
        (lambda: check_pooling(["channel", "batch"], 30), "30x30", "data.image_size=32"),
        (lambda: ChannelPooling()(torch.zeros(1, 1, 3, 4)), "3x4", "even"),
        (lambda: BatchPooling()(torch.zeros(1, 1, 4, 5)), "4x5", "even"),
        (lambda: InvertibleChain([torch.nn.ReLU()]), "ReLU", "AdditiveCoupling"),
        (lambda: InvertibleChain([], backward="forget"), "forget", "invert, store"),
    ],
)
def test_what_cannot_be_inverted_is_refused(build, given, remedy):
    with pytest.raises(RevtrainError) as error:
        build()
    message = str(error.value)
    assert given in message
    assert remedy in message
    assert 2 <= len(message.splitlines()) <= 5


def plain_module():
    return torch.nn.Identity()


@pytest.mark.parametrize("count", [1, 8, 13, 64])
def test_packed_signs_come_back(count):
    """Eight signs a byte: what hybrid keeps while one block is walked back."""
    bits = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    packed = pack_signs(torch.where(bits, -1.0, 1.0))
    assert packed.numel() == -(-count // 8)
    assert torch.equal(unpack_signs(packed, count), bits)


def test_walking_back_uses_the_true_signs():
    """An error in y that crosses zero must not change the gradient inside a block."""
    layer = InvertibleLeakyReLU(0.25)
    x = torch.tensor([-1e-6, 2.0, -3.0, 1e-6])
    y, signs = layer.recompute_for_backward_(x.clone(), None)
    noisy = y + torch.tensor([1e-5, 0.0, 0.0, -1e-5])
    _, dx = layer.backward_(noisy, torch.ones(4), signs, Gradients([]))
    assert dx.tolist() == [0.25, 1.0, 0.25, 1.0]
