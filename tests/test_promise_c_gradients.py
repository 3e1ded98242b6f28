"""Kind C: no gradient goes missing. What cannot get one is refused by name; side inputs are handed over and do.

The chain is one node of autograd's graph: what F takes from elsewhere is not among its inputs, and autograd alone would
not notice that its gradient never comes.
"""

import copy

import pytest
import torch
from cases import LAYERS, ids
from promise import (
    ANY,
    CHANNELS,
    HOLDERS,
    INSIDE,
    NESTED,
    OWN,
    PER_SAMPLE,
    PRENORM,
    SINGLE_IMAGES,
    OwnCoupling,
    assert_equal_or_refused,
    assert_promise,
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
from torch.nn.utils import parametrizations, parametrize, prune

from revtrain.core.chain import InvertibleChain
from revtrain.core.layer import InvertibleLayer
from revtrain.errors import RevtrainError
from revtrain.layers import (
    AdditiveCoupling,
    CouplingConv2d,
    HiddenChunkCoupling,
    InvertibleBatchNorm2d,
    InvertibleLeakyReLU,
    PreNorm,
)

FOREIGN = ("asks for a gradient and is none of its parameters",)


def conv(channels):
    return nn.Conv2d(channels, channels, 3, padding=1)


# ---- tensors from outside ------------------------------------------------------------------------


class ClosesOver(nn.Module):
    """conv(x) times a number of a tensor that it was not given as a parameter or an input."""

    def __init__(self, channels, tensor):
        super().__init__()
        self.conv, self.outside = conv(channels), [tensor]

    def forward(self, x):
        return self.conv(x) * self.outside[0].sum()


def _foreign(kind):
    leaf = values(3).requires_grad_()
    return {"leaf": leaf, "result": leaf.exp(), "view": leaf[:2], "parameter": nn.Parameter(values(3))}[kind]


@in_every_holder
@pytest.mark.parametrize("kind", ["leaf", "result", "view", "parameter"])
def test_a_tensor_that_f_closes_over_is_refused(holder, kind):
    tensor = _foreign(kind)
    chain = set_backward(holder.chain(lambda c: ClosesOver(c, tensor)).double(), "invert")
    with refused("ClosesOver" if holder in (ANY, PER_SAMPLE) else "", *FOREIGN):
        loss_of(chain(images())).backward()


@in_every_holder
@in_pieces
def test_a_tensor_that_asks_for_no_gradient_may_be_closed_over(holder, piece_bytes):
    tensor = values(3)
    assert_promise(lambda: holder.chain(lambda c: ClosesOver(c, tensor)), images(), piece_bytes=piece_bytes)


def test_a_tensor_that_a_layer_closes_over_is_refused():
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    class Scales(InvertibleLayer):
        def forward(self, x):
            return x * scale

        def inverse(self, y, saved=None):
            return y / scale

    chain = InvertibleChain([CouplingConv2d(CHANNELS), Scales()]).double()
    with refused("Scales", *FOREIGN):
        loss_of(chain(images())).backward()


@pytest.mark.parametrize("holder", [ANY, PRENORM, OWN], ids=lambda holder: holder.name)
def test_a_tensor_closed_over_by_a_frozen_chain_is_not_overlooked(holder):
    """Nothing that the chain knows of asks for a gradient: a learned prompt before a frozen trunk."""

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompt = nn.Parameter(torch.randn(3))
            self.outside = nn.Parameter(torch.randn(()))
            self.chain = holder.chain(lambda c: ClosesOver(c, self.prompt)).requires_grad_(False)
            self.prompt.requires_grad_()

        def forward(self, x):
            return self.chain(x.detach()) + self.outside

    # .double() replaces no parameter object, so that both modes close over the same one
    assert_equal_or_refused(Prompted, images(), words=("gradient",))


@pytest.mark.parametrize("holder", [ANY, PRENORM, OWN], ids=lambda holder: holder.name)
def test_a_tensor_changed_in_place_between_the_passes_is_refused(holder):
    """One that asks for no gradient, but is used: autograd would refuse what it saved and finds changed."""
    tensor = values(3)
    chain = holder.chain(lambda c: ClosesOver(c, tensor)).double()
    loss = loss_of(chain(images()))
    tensor.mul_(3)
    with refused("recomputed"):
        loss.backward()


def test_a_weight_tied_to_a_module_outside_of_the_chain():
    """Registered in both: the gradient is the sum of both uses, as for tied embeddings."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = conv(CHANNELS // 2)
            self.chain = ANY.chain(lambda c: nn.Sequential(nn.Tanh(), self.stem))

        def forward(self, x):
            return self.chain(torch.cat([self.stem(half) for half in x.chunk(2, 1)], 1))

    assert_promise(Tied, images())


def test_a_module_outside_of_the_chain_that_f_uses_unregistered_is_refused():
    outside = conv(CHANNELS // 2).double()

    class Uses(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.modules_elsewhere = [outside]

        def forward(self, x):
            return self.modules_elsewhere[0](x)

    chain = ANY.chain(Uses).double()
    with refused("Uses", *FOREIGN):
        loss_of(chain(images().requires_grad_())).backward()


def test_the_input_of_the_chain_may_not_be_closed_over_either():
    """x reaches F by another way than the chain: that share of its gradient would be lost."""

    class Skip(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []
            outer = self

            class F(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.conv = conv(CHANNELS // 2)

                def forward(self, x):
                    return self.conv(x) + outer.seen[0][:, :4]

            self.chain = InvertibleChain([AdditiveCoupling(CHANNELS, F(), conv(4)), InvertibleLeakyReLU(0.5)])

        def forward(self, x):
            self.seen[:] = [x]
            return self.chain(x)

    assert_equal_or_refused(Skip, images(), words=FOREIGN)


def test_a_detached_result_and_no_grad_inside_f_cut_the_gradient_as_ever():
    class Cuts(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv, self.other = conv(channels), conv(channels)

        def forward(self, x):
            with torch.no_grad():
                weights = self.other(x)
            return self.conv(x.detach()) * weights

    for holder in HOLDERS:
        assert_promise(lambda holder=holder: holder.chain(Cuts), images())


# ---- parameters that are not where they usually are ----------------------------------------------


class Functional(nn.Module):
    """A model called with other parameters, results of a computation: a step of meta-learning."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.rate = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        changed = {name: p * self.rate + p.sin() for name, p in self.model.named_parameters()}
        return torch.func.functional_call(self.model, changed, (x,))


@in_every_holder
def test_functional_call(holder):
    assert_promise(lambda: Functional(holder.chain(conv)), images())


@pytest.mark.parametrize("case", LAYERS, ids=ids(LAYERS))
def test_functional_call_of_every_layer(case):
    assert_promise(lambda: Functional(InvertibleChain([case.make()])), values(*case.shape), tolerance=1e-8)


def test_functional_call_whose_backward_pass_comes_after_it_has_ended():
    """The parameters are back in place by then, and they are others."""

    def step(model, x):
        changed = {name: (2 * p).detach().requires_grad_() for name, p in model.named_parameters()}
        y = torch.func.functional_call(model, changed, (x,))
        loss_of(y).backward()
        return y, *(leaf.grad for leaf in changed.values())

    for holder in HOLDERS:
        assert_promise(lambda holder=holder: holder.chain(conv), images(), step=step)


def replica(module, memory=None):
    """What `DataParallel` makes of a module for another device: its weights are results, no parameters."""
    memory = {} if memory is None else memory
    if module in memory:
        return memory[module]
    copied = memory[module] = module._replicate_for_data_parallel()
    copied._former_parameters = {}
    for name, child in module._modules.items():
        copied._modules[name] = None if child is None else replica(child, memory)
        if child is not None:
            setattr(copied, name, copied._modules[name])
    for name, parameter in module._parameters.items():
        if parameter is None:
            copied._parameters[name] = None
            continue
        clone = parameter.clone()
        setattr(copied, name, clone)
        copied._former_parameters[name] = clone
    for name, buffer in module._buffers.items():
        copied._buffers[name] = buffer
    return copied


class Replicated(nn.Module):
    """A batch in two halves through two replicas."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return torch.cat([replica(self.model)(half) for half in x.chunk(2)])


@in_every_holder
def test_replicas_of_data_parallel(holder):
    assert_promise(lambda: Replicated(holder.chain(conv)), images())


@pytest.mark.parametrize("case", LAYERS, ids=ids(LAYERS))
def test_a_replica_of_every_layer(case):
    class One(Replicated):
        def forward(self, x):
            return replica(self.model)(x)

    def make():
        chain = InvertibleChain([case.make()])
        with torch.no_grad():
            chain(values(*case.shape).float())  # ActNorm takes its statistics before it is replicated
        return One(chain)

    assert_promise(make, values(*case.shape), tolerance=1e-8)


class Doubled(nn.Module):
    """A parametrisation: the weight is a function of the parameter."""

    def forward(self, weight):
        return 2 * weight + weight.sin()


def _parametrised(module, name="weight"):
    parametrize.register_parametrization(module, name, Doubled())
    return module


def _pruned(module, name="weight"):
    prune.l1_unstructured(module, name, amount=0.4)
    return module


REWRITTEN = {
    "pruned": lambda c: _pruned(conv(c)),
    "parametrised": lambda c: _parametrised(conv(c)),
    "weight-norm": lambda c: parametrizations.weight_norm(conv(c)),
    "orthogonal": lambda c: parametrizations.orthogonal(nn.Conv2d(c, c, 1, bias=False)),
    "pruned-twice": lambda c: _pruned(_pruned(conv(c))),
    "shared-weight": lambda c: nn.Sequential(*_sharing(c)),
}


def _sharing(channels):
    first, second = conv(channels), conv(channels)
    second.weight = first.weight
    return first, nn.Tanh(), second


@in_every_holder
@pytest.mark.parametrize("kind", REWRITTEN)
def test_rewritten_weights_in_f(holder, kind):
    assert_promise(lambda: holder.chain(REWRITTEN[kind]), images())


@pytest.mark.parametrize("rewrite", [_pruned, _parametrised], ids=["pruned", "parametrised"])
@pytest.mark.parametrize("place", ["conv1", "conv2", "norm"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_rewritten_weights_in_hidden_channel_chunks(rewrite, place, training):
    def make():
        layer = HiddenChunkCoupling(CHANNELS, hidden=5, hidden_chunk=2)
        for function in (layer.f, layer.g):
            rewrite(getattr(function, place))
        return InvertibleChain([layer]).train(training)

    assert_promise(make, images())


@pytest.mark.parametrize("rewrite", [_pruned, _parametrised], ids=["pruned", "parametrised"])
@in_pieces
def test_rewritten_weights_of_the_norm_of_prenorm(rewrite, piece_bytes):
    def make():
        functions = [PreNorm(4, conv(4)) for _ in range(2)]
        for function in functions:
            rewrite(function.norm)
        return InvertibleChain([AdditiveCoupling(CHANNELS, *functions)])

    assert_promise(make, images(), piece_bytes=piece_bytes)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("rewrite", [_pruned, _parametrised], ids=["pruned", "parametrised"])
def test_rewritten_weights_of_our_batch_norm(rewrite, name):
    make = lambda: InvertibleChain(  # noqa: E731
        [CouplingConv2d(CHANNELS), rewrite(InvertibleBatchNorm2d(CHANNELS), name), InvertibleLeakyReLU(0.5)]
    )
    assert_promise(make, images())


def test_rewritten_weights_of_a_coupling_convolution():
    def make():
        layer = CouplingConv2d(CHANNELS)
        _pruned(layer.f)
        _parametrised(layer.g)
        return InvertibleChain([layer])

    assert_promise(make, images())


# ---- who gets a gradient, and who does not -------------------------------------------------------


@in_every_holder
@pytest.mark.parametrize("frozen", ["weight", "bias", "f"])
def test_parameters_that_ask_for_no_gradient(holder, frozen):
    def make():
        chain = holder.chain(conv)
        for name, parameter in chain.named_parameters():
            parameter.requires_grad_(frozen not in name.split("."))
        return chain

    assert_promise(make, images())


@pytest.mark.parametrize("case", LAYERS, ids=ids(LAYERS))
def test_every_layer_with_each_parameter_frozen_in_turn(case):
    seed(0)
    names = [name for name, _ in case.make().named_parameters()]
    for frozen in names[:: max(1, len(names) // 3)]:

        def make(frozen=frozen):
            layer = case.make()
            layer.get_parameter(frozen).requires_grad_(False)
            return InvertibleChain([layer])

        assert_promise(make, values(*case.shape), tolerance=1e-8)


def test_parameters_that_are_not_used_have_no_gradient_in_both_modes():
    class Unused(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv, self.spare = conv(channels), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.conv(x)

    for holder in HOLDERS:
        assert_promise(lambda holder=holder: holder.chain(Unused), images())


def test_frozen_functions_pass_the_gradient_on_to_the_input():
    assert_promise(lambda: ANY.chain(conv).requires_grad_(False), images())


def test_a_gradient_asked_for_after_the_forward_pass_was_never_recorded():
    """As in plain autograd: `requires_grad_` after the call comes too late for this graph."""

    def step(model, x):
        frozen = model.layers[1].f.weight.requires_grad_(False)
        y = model(x)
        frozen.requires_grad_()
        loss_of(y).backward()
        return y

    assert_promise(lambda: ANY.chain(conv), images(), step=step)


def test_a_parameter_frozen_after_the_forward_pass():
    """The graph was recorded with it, so plain autograd computes its gradient and gives it to nobody, or does."""

    def step(model, x):
        y = model(x)
        model.layers[1].f.bias.requires_grad_(False)
        loss_of(y).backward()
        return y

    assert_equal_or_refused(lambda: ANY.chain(conv), images(), step=step)


def test_grad_of_some_parameters_only():
    def step(model, x):
        chosen = [model.layers[1].g.weight, x]
        return torch.autograd.grad(loss_of(model(x)), chosen)

    for holder in (ANY, PER_SAMPLE):
        assert_promise(lambda holder=holder: holder.chain(conv), images(), step=step)


def test_a_gradient_of_a_gradient_is_refused_rather_than_missing():
    def step(model, x):
        (dx,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
        dx.square().sum().backward()
        return dx

    assert_equal_or_refused(lambda: ANY.chain(conv), images(), step=step, also=(RuntimeError,))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's own tables of derivatives
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("holder", [ANY, PRENORM, OWN], ids=lambda holder: holder.name)
def test_tangents_of_forward_mode_are_right_or_refused(holder, frozen):
    from torch.autograd import forward_ad

    def step(model, x):
        with forward_ad.dual_level():
            y = model(forward_ad.make_dual(x.detach(), torch.ones_like(x)))
            value, tangent = forward_ad.unpack_dual(y)
            return value.clone(), None if tangent is None else tangent.clone()

    chain = lambda: holder.chain(conv).eval().requires_grad_(not frozen)  # noqa: E731
    assert_equal_or_refused(chain, images(), step=step, also=(RuntimeError, NotImplementedError))


@pytest.mark.parametrize("holder", [ANY, PRENORM, INSIDE, NESTED], ids=lambda holder: holder.name)
def test_a_copy_of_a_chain_has_its_own_gradients(holder):
    def step(model, x):
        copied = copy.deepcopy(model)
        loss_of(copied(x)).backward()
        assert all(p.grad is None for p in model.parameters())
        return [p.grad for p in copied.parameters()]

    assert_promise(lambda: holder.chain(conv), images(), step=step)


# ---- side inputs ---------------------------------------------------------------------------------


class Conditioned(nn.Module):
    """conv(x), shifted and scaled by a context (B, 3): a time embedding."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.linear = conv(channels), nn.Linear(3, 2 * channels)

    def forward(self, x, context):
        scale, shift = self.linear(context)[:, :, None, None].chunk(2, 1)
        return self.conv(x) * scale + shift


class TakesAnything(Conditioned):
    def forward(self, *inputs):
        return super().forward(*inputs)


CONTEXT_HOLDERS = [ANY, PER_SAMPLE, PRENORM, INSIDE, NESTED]


@in_pieces
@pytest.mark.parametrize("make", [Conditioned, TakesAnything], ids=["named", "anything"])
@pytest.mark.parametrize("holder", CONTEXT_HOLDERS, ids=lambda holder: holder.name)
def test_side_inputs_get_their_gradients(holder, make, piece_bytes):
    def inner():
        return InvertibleChain([AdditiveCoupling(4, make(2), conv(2)), InvertibleLeakyReLU(0.5)])

    def chain():
        if holder is INSIDE:
            return InvertibleChain([AdditiveCoupling(CHANNELS, inner(), inner())])
        return holder.chain(make)

    assert_promise(chain, images(), values(4, 3), piece_bytes=piece_bytes)


def test_a_side_input_of_several_layers_and_of_only_some_functions():
    make = lambda: InvertibleChain(  # noqa: E731
        [
            CouplingConv2d(CHANNELS),
            AdditiveCoupling(CHANNELS, Conditioned(4), conv(4)),
            InvertibleBatchNorm2d(CHANNELS),
            InvertibleChain([AdditiveCoupling(CHANNELS, conv(4), Conditioned(4))]),
        ]
    )
    assert_promise(make, images(), values(4, 3))


def test_a_layer_of_the_users_that_takes_a_side_input():
    class Scales(InvertibleLayer):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, CHANNELS)

        def forward(self, x, context):
            return x * self.linear(context).exp()[:, :, None, None]

        def inverse(self, y, *saved_and_context):
            *_, context = saved_and_context
            return y / self.linear(context).exp()[:, :, None, None]

    assert_promise(lambda: InvertibleChain([CouplingConv2d(CHANNELS), Scales()]), images(), values(4, 3))


def test_several_side_inputs_of_different_kinds():
    """A tensor that asks for a gradient, a mask of booleans and whole numbers."""

    class Three(Conditioned):
        def __init__(self, channels):
            super().__init__(channels)
            self.embedding = nn.Embedding(5, channels)

        def forward(self, x, context, mask, classes):
            y = super().forward(x, context) + self.embedding(classes)[:, :, None, None]
            return y * mask

    mask, classes = images()[:, :1] > 0, torch.tensor([0, 3, 3, 1])
    for holder in CONTEXT_HOLDERS[:3]:
        for piece_bytes in (None, SINGLE_IMAGES):
            assert_promise(
                lambda holder=holder: holder.chain(Three),
                images(),
                values(4, 3),
                mask,
                classes,
                piece_bytes=piece_bytes,
            )


def test_only_the_side_input_asks_for_a_gradient():
    """A frozen trunk that is trained through its condition."""

    def step(model, x, context):
        y = model(x.detach(), context)
        loss_of(y).backward()
        return y

    assert_promise(lambda: ANY.chain(Conditioned).requires_grad_(False), images(), values(4, 3), step=step)


def test_a_side_input_that_is_the_input_or_a_view_of_it():
    class Adds(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = conv(channels)

        def forward(self, x, context):
            return self.conv(x) * context.mean((1, 2, 3), keepdim=True)

    for view in (lambda x: x, lambda x: x[:, :2], lambda x: x.exp()):
        step = lambda model, x, view=view: backward_of_loss(model, x, view(x))  # noqa: E731
        assert_promise(lambda: ANY.chain(Adds), images(), step=step)


def test_a_side_input_that_is_the_sum_of_parameters_outside():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 3)
            self.chain = ANY.chain(Conditioned)

        def forward(self, x):
            return self.chain(x, self.embedding(torch.arange(len(x))))

    assert_promise(Model, images())


@in_pieces
def test_a_side_input_for_all_images_at_once(piece_bytes):
    """(1, 3) for a batch of four: not to be cut into pieces."""
    assert_equal_or_refused(lambda: PER_SAMPLE.chain(Conditioned), images(), values(1, 3), piece_bytes=piece_bytes)


def test_a_side_input_that_f_writes_into_is_refused_or_copied():
    class Writes(Conditioned):
        def forward(self, x, context):
            return super().forward(x, context.clone().mul_(2))

    assert_promise(lambda: ANY.chain(Writes), images(), values(4, 3))


def test_a_side_input_that_is_written_to_between_the_passes_is_refused():
    def step(model, x, context):
        used = context * 1
        y = model(x, used)
        with torch.no_grad():
            used.mul_(5)
        loss_of(y).backward()
        return y

    # plain autograd notices by the version of what it saved, and refuses
    with pytest.raises(Exception, match=r"in-?place|between the forward and the backward|recomputed"):
        run(lambda: ANY.chain(Conditioned), images(), values(4, 3), backward="invert", step=step)


def test_a_side_input_that_nobody_takes_is_refused_in_both_modes():
    for backward in ("store", "invert"):
        with refused("context"):
            run(lambda: ANY.chain(conv), images(), values(4, 3), backward=backward)


def test_a_missing_side_input_is_an_error_in_both_modes():
    for backward in ("store", "invert"):
        with pytest.raises((TypeError, RevtrainError), match=r"(?i)context|argument"):
            run(lambda: ANY.chain(Conditioned), images(), backward=backward)


def test_side_inputs_of_attention_among_tokens():
    """Cross-attention as F: context (B, S, C), another length than x."""

    class Cross(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.attention = nn.MultiheadAttention(channels, 2, batch_first=True)

        def forward(self, x, context):
            tokens = x.flatten(2).transpose(1, 2)
            y, _ = self.attention(tokens, context, context, need_weights=False)
            return y.transpose(1, 2).reshape(x.shape)

    for piece_bytes in (None, SINGLE_IMAGES):
        assert_promise(lambda: PER_SAMPLE.chain(Cross), images(), values(4, 3, 4), piece_bytes=piece_bytes)


def test_an_own_coupling_with_a_context_closed_over_by_a_wrapper_is_refused():
    """The way people pass a condition without side inputs: set an attribute before each call."""

    class Holds(nn.Module):
        condition = None

        def __init__(self, channels):
            super().__init__()
            self.f = Conditioned(channels)

        def forward(self, x):
            return self.f(x, self.condition)

    def step(model, x, context):
        for module in model.modules():
            if isinstance(module, Holds):
                module.condition = context
        return backward_of_loss(model, x)

    for layer in (lambda: AdditiveCoupling(CHANNELS, Holds(4), Holds(4)), lambda: OwnCoupling(Holds(4))):
        with refused(*FOREIGN):
            run(lambda layer=layer: InvertibleChain([layer()]), images(), values(4, 3), backward="invert", step=step)
