"""Kind E: what plain autograd accepts, a chain accepts; and both modes compute the same function."""

import pytest
import torch
import torch.nn.functional as F
from cases import LAYERS, ids
from promise import (
    ANY,
    CHANNELS,
    OWN,
    PER_SAMPLE,
    SINGLE_IMAGES,
    assert_equal_or_refused,
    assert_promise,
    assert_same,
    backward_of_loss,
    images,
    in_every_holder,
    in_pieces,
    loss_of,
    refused,
    run,
    seed,
    set_backward,
    values,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from revtrain.core.chain import InvertibleChain
from revtrain.layers import AdditiveCoupling, CouplingConv2d, HiddenChunkCoupling, InvertibleLeakyReLU

LAYER_CASES = pytest.mark.parametrize("case", LAYERS, ids=ids(LAYERS))


def conv(channels):
    return nn.Conv2d(channels, channels, 3, padding=1)


class Lambda(nn.Module):
    """A convolution, and what is done to the input before and to the result after."""

    def __init__(self, channels, before=lambda x: x, after=lambda y: y):
        super().__init__()
        self.conv, self.before, self.after = conv(channels), before, after

    def forward(self, x):
        return self.after(self.conv(self.before(x)))


# ---- F writes into what it is given --------------------------------------------------------------

IN_PLACE = {
    "relu": (F.relu_, F.relu),
    "add": (lambda x: x.add_(1), lambda x: x + 1),
    "index": (lambda x: _zero_corner(x), lambda x: _zero_corner(x.clone())),
    "module": (nn.ReLU(inplace=True), nn.ReLU()),
    "dropout": (nn.Dropout(0.5, inplace=True), nn.Dropout(0.5)),
    "twice": (lambda x: x.mul_(2).sigmoid_(), lambda x: (2 * x).sigmoid()),
}


def _zero_corner(x):
    x[..., 0, 0] = 0
    return x


@in_pieces
@in_every_holder
@pytest.mark.parametrize("kind", IN_PLACE)
def test_an_in_place_first_operation_is_the_function_without_it(holder, kind, piece_bytes):
    """F's input is its own: in both modes, F(relu_(x)) is F(relu(x))."""
    if kind == "dropout" and piece_bytes is not None:
        pytest.skip("pieces draw other masks than the whole batch")
    in_place, pure = IN_PLACE[kind]
    expected = run(lambda: holder.chain(lambda c: Lambda(c, pure)), images(), backward="store")
    for backward in ("store", "invert"):
        make = lambda: holder.chain(lambda c: Lambda(c, in_place))  # noqa: E731
        assert_same(run(make, images(), backward=backward, piece_bytes=piece_bytes), expected)


@in_every_holder
def test_a_result_that_is_the_input_written_to(holder):
    """No operation in between: what F returns is the memory that it was given."""
    pure = run(lambda: holder.chain(lambda c: _Only(torch.tanh)), images(), backward="store")
    for backward in ("store", "invert"):
        assert_same(run(lambda: holder.chain(lambda c: _Only(torch.tanh_)), images(), backward=backward), pure)


class _Only(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_an_in_place_function_between_the_layers_of_the_users():
    """Two couplings in a row: G's input is F's sum, which the next layer needs."""
    make = lambda inplace: InvertibleChain(  # noqa: E731
        [AdditiveCoupling(CHANNELS, *(nn.Sequential(nn.ReLU(inplace), conv(4)) for _ in range(2))) for _ in range(2)]
    )
    pure = run(lambda: make(False), images(), backward="store")
    for backward in ("store", "invert"):
        assert_same(run(lambda: make(True), images(), backward=backward), pure)


# ---- what F returns ------------------------------------------------------------------------------


class Drops(nn.Module):
    """LayerDrop: zeros instead of the function, now and then or always."""

    def __init__(self, channels, share):
        super().__init__()
        self.conv, self.share = conv(channels), share

    def forward(self, x):
        return torch.zeros_like(x) if torch.rand(()) < self.share else self.conv(x)


class Constant(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("value", torch.randn(1, channels, 1, 1))

    def forward(self, x):
        return self.value.expand_as(x)


RESULTS = {
    "zeros": lambda c: Drops(c, 1.0),
    "layer-drop": lambda c: Drops(c, 0.5),
    "constant": Constant,
    "detached": lambda c: Lambda(c, after=lambda y: y.detach()),
    "of-no-grad": lambda c: Lambda(c, before=lambda x: x.detach()),
    "of-the-parameters-alone": lambda c: Lambda(c, before=torch.zeros_like),
    "strided": lambda c: Lambda(c, after=lambda y: torch.stack([y, -y], -1)[..., 0]),
    "transposed": lambda c: Lambda(c, after=lambda y: y.transpose(2, 3)),
    "channels-last": lambda c: Lambda(c, after=lambda y: y.contiguous(memory_format=torch.channels_last)),
    "expanded": lambda c: Lambda(c, after=lambda y: y.mean((2, 3), keepdim=True).expand_as(y)),
    "narrower-type": lambda c: Lambda(c, after=lambda y: y.float()),
    "in-place-at-the-end": lambda c: Lambda(c, after=lambda y: y.mul_(2)),
}


@in_every_holder
@pytest.mark.parametrize("kind", RESULTS)
def test_whatever_f_returns(holder, kind):
    tolerance = 1e-6 if kind == "narrower-type" else 1e-9
    assert_promise(lambda: holder.chain(RESULTS[kind]), images(), tolerance=tolerance)


@pytest.mark.parametrize("kind", ["zeros", "constant", "detached"])
def test_a_whole_chain_of_functions_without_a_gradient(kind):
    """The gradient goes through unchanged; parameters that were not used have none."""
    assert_promise(lambda: InvertibleChain([ANY.build(RESULTS[kind]) for _ in range(3)]), images())


@in_every_holder
@pytest.mark.parametrize("backward", ["store", "invert"])
@pytest.mark.parametrize(
    "broadcast", [lambda y: y[:, :1], lambda y: y.mean((2, 3), keepdim=True), lambda y: y[:1]], ids=["c", "hw", "b"]
)
def test_a_result_that_would_broadcast_is_refused_in_both_modes(holder, backward, broadcast):
    if holder is OWN:
        pytest.skip("a layer of the user's adds as it likes")
    with refused("shape"):
        run(lambda: holder.chain(lambda c: Lambda(c, after=broadcast)), images(), backward=backward)


@pytest.mark.parametrize("backward", ["store", "invert"])
@pytest.mark.parametrize(
    "result", [lambda y: (y, y), lambda y: None, lambda y: {"y": y}], ids=["tuple", "none", "dict"]
)
def test_a_result_that_is_no_tensor_is_refused_in_both_modes(backward, result):
    with refused("Lambda", "tensor"):
        run(lambda: ANY.chain(lambda c: Lambda(c, after=result)), images(), backward=backward)


# ---- autograd inside F ---------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, channels, use_reentrant):
        super().__init__()
        self.inner = nn.Sequential(conv(channels), nn.Dropout(0.3), nn.SiLU(), conv(channels))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


@in_every_holder
def test_a_checkpoint_inside_f(holder):
    assert_promise(lambda: holder.chain(lambda c: Checkpointed(c, use_reentrant=False)), images())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@in_every_holder
def test_a_reentrant_checkpoint_inside_f_is_refused(holder):
    with refused("use_reentrant=False"):
        run(lambda: holder.chain(lambda c: Checkpointed(c, use_reentrant=True)), images(), backward="invert")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_the_chain(use_reentrant):
    def step(model, x):
        y = checkpoint(model, x, use_reentrant=use_reentrant)
        loss_of(y).backward()
        return y

    assert_promise(lambda: ANY.chain(conv), images(), step=step)


class Slope(nn.Module):
    """The gradient of an energy, taken inside of the forward pass: a score model."""

    def __init__(self, channels):
        super().__init__()
        self.energy = nn.Sequential(conv(channels), nn.SiLU(), conv(channels))

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).square().sum(), x, create_graph=True)[0]


@in_every_holder
def test_a_gradient_taken_inside_f(holder):
    assert_promise(lambda: holder.chain(Slope), images())


class Reversal(torch.autograd.Function):
    """Domain-adversarial training: the identity, whose gradient changes sign."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        return -dy * (1 + x.square())


@in_pieces
@in_every_holder
def test_a_function_of_the_users_inside_f(holder, piece_bytes):
    make = lambda: holder.chain(lambda c: Lambda(c, Reversal.apply, Reversal.apply))  # noqa: E731
    assert_promise(make, images(), piece_bytes=piece_bytes)


def test_saved_tensor_hooks_around_the_step():
    """torch.autograd.graph.save_on_cpu and its like."""

    def step(model, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            y = model(x)
        loss_of(y).backward()
        return y

    for reuse_output in (False, True):
        assert_promise(lambda r=reuse_output: ANY.chain(conv, reuse_output=r), images(), step=step)


def test_anomaly_detection_around_the_step():
    def step(model, x):
        with torch.autograd.detect_anomaly():
            return backward_of_loss(model, x)

    with pytest.warns(UserWarning, match="Anomaly"):
        assert_promise(lambda: ANY.chain(conv), images(), step=step)


def test_inference_mode_gives_the_output_of_store():
    def step(model, x):
        with torch.inference_mode():
            y = model(x)
        return y.clone()

    for case in LAYERS:
        assert_promise(lambda case=case: InvertibleChain([case.make()]), values(*case.shape), step=step)


def test_a_backward_pass_inside_a_hook_of_another():
    """One chain's backward pass runs inside that of another one."""

    def step(model, x):
        first, second = model
        other = loss_of(second(x.detach().requires_grad_()))
        y = first(x)
        y.register_hook(lambda gradient: other.backward())
        loss_of(y).backward()
        return y

    assert_promise(lambda: nn.ModuleList([ANY.chain(conv), ANY.chain(conv)]), images(), step=step)


# ---- sizes and devices ---------------------------------------------------------------------------


@LAYER_CASES
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_batch_of_no_images(case, training):
    """The last batch of a process that has nothing left; a mean of nothing is NaN in both modes."""
    make = lambda: InvertibleChain([case.make()]).train(training)  # noqa: E731
    assert_promise(make, values(0, *case.shape[1:]))


@in_every_holder
def test_a_batch_of_no_images_in_pieces(holder):
    assert_promise(lambda: holder.chain(conv).eval(), values(0, CHANNELS, 4, 4), piece_bytes=SINGLE_IMAGES)


@LAYER_CASES
def test_a_batch_of_one_image(case):
    assert_promise(lambda: InvertibleChain([case.make()]), values(1, *case.shape[1:]))


@LAYER_CASES
@pytest.mark.parametrize("backward", ["store", "invert"])
def test_on_the_meta_device(case, backward):
    """Shapes without values: how people count parameters and operations of large models."""
    chain = set_backward(InvertibleChain([case.make()]), backward).to("meta")
    x = torch.empty(case.shape, device="meta", requires_grad=True)
    y = chain(x)
    y.sum().backward()
    assert y.is_meta and y.shape == InvertibleChain([case.make()])(torch.empty(case.shape)).shape
    assert x.grad.is_meta and x.grad.shape == x.shape
    assert all(p.grad is not None and p.grad.is_meta and p.grad.shape == p.shape for p in chain.parameters())


def test_built_on_the_meta_device_and_filled_later():
    def make():
        with torch.device("meta"):
            chain = InvertibleChain([CouplingConv2d(CHANNELS), HiddenChunkCoupling(CHANNELS, 5), ANY.build(conv)])
        chain = chain.to_empty(device="cpu")
        seed(0)
        with torch.no_grad():
            for tensor in (*chain.parameters(), *chain.buffers()):
                tensor.copy_(torch.rand(tensor.shape) + 0.5) if tensor.is_floating_point() else tensor.zero_()
        return chain

    assert_promise(make, images(), tolerance=1e-7)  # weights of one sign: gradients are large


# ---- lazy modules --------------------------------------------------------------------------------

LAZY = {
    "convolution": lambda c: nn.LazyConv2d(c, 3, padding=1),
    "linear": lambda c: nn.Sequential(nn.Flatten(), nn.LazyLinear(c * 16), nn.Unflatten(1, (c, 4, 4))),
    "nested": lambda c: nn.Sequential(nn.SiLU(), nn.Sequential(nn.LazyConv2d(c, 1), nn.SiLU()), conv(c)),
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("kind", LAZY)
@in_every_holder
def test_lazy_modules_are_filled_at_the_first_call(holder, kind):
    if holder.name == "prenorm" and kind == "nested":
        pytest.skip("as in the others")
    step = lambda model, x: [backward_of_loss(model, x) for _ in range(2)]  # noqa: E731
    assert_promise(lambda: holder.chain(LAZY[kind]), images(), step=step)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_module_filled_without_gradients():
    def step(model, x):
        with torch.no_grad():
            model(x)
        return backward_of_loss(model, x)

    assert_promise(lambda: ANY.chain(LAZY["convolution"]), images(), step=step)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_lazy_batch_norm():
    make = lambda: ANY.chain(lambda c: nn.Sequential(conv(c), nn.LazyBatchNorm2d()))  # noqa: E731
    assert_promise(make, images())


# ---- callers -------------------------------------------------------------------------------------


def test_complex_numbers():
    class Complex(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(channels, channels, dtype=torch.complex128))

        def forward(self, x):
            return torch.einsum("oc,bchw->bohw", self.weight, x)

    def step(model, x):
        y = model(torch.complex(x, x.flip(0)))
        y.abs().square().sum().backward()
        return y

    make = lambda: InvertibleChain([ANY.build(Complex), ANY.build(Complex)])  # noqa: E731
    assert_equal_or_refused(make, images(), step=step, words=("complex",))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@in_every_holder
def test_values_that_are_not_numbers_are_seen(holder, value):
    """One image is lost: the loss says so, in both modes, and so do the gradients that it reaches."""

    def step(model, x):
        with torch.no_grad():
            x[0, 5, 1, 1] = value
        y = model(x)
        loss_of(y).backward()
        return y.isfinite(), *(p.grad.isfinite().all() for p in model.parameters())

    def finite_only(make, backward):
        left = run(make, images(), backward=backward, step=step)
        return {name: tensor for name, tensor in left.items() if name.startswith("returned")}

    make = lambda: holder.chain(conv)  # noqa: E731
    assert_same(finite_only(make, "invert"), finite_only(make, "store"))


def test_an_empty_chain_is_the_identity():
    assert_promise(lambda: InvertibleChain([]), images())
    assert_promise(
        lambda: InvertibleChain([InvertibleChain([]), InvertibleLeakyReLU(0.5), InvertibleChain([])]), images()
    )


def test_the_output_of_an_empty_chain_is_not_written_into_the_input():
    x = images()
    y = InvertibleChain([])(x.requires_grad_())
    assert torch.equal(y, x)


def test_a_chain_inside_a_compiled_or_vectorised_function_is_right_or_refused():
    """torch.func.grad and vmap see through modules; what they cannot, they must say."""

    def step(model, x):
        gradient = torch.func.grad(lambda z: model(z).square().sum())(x.detach())
        return gradient

    assert_equal_or_refused(lambda: ANY.chain(conv), images(), step=step, also=(RuntimeError,))


def test_per_sample_gradients_by_vmap_are_right_or_refused():
    def step(model, x):
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters, image):
            return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

        gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x.detach())
        return list(gradients.values())

    assert_equal_or_refused(lambda: PER_SAMPLE.chain(conv), images(), step=step, also=(RuntimeError,))


def test_moving_a_model_between_two_steps():
    """`.float()` and `.double()` replace the data of parameters and the buffers themselves."""

    def step(model, x):
        first = backward_of_loss(model, x)
        model.float()
        model.zero_grad()
        second = model(x.detach().float())
        loss_of(second).backward()
        model.double()
        model.zero_grad()
        return first, backward_of_loss(model, x)

    assert_promise(
        lambda: ANY.chain(lambda c: nn.Sequential(conv(c), nn.BatchNorm2d(c))), images(), step=step, tolerance=1e-6
    )
