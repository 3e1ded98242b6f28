"""Kind D: every module is called, so that what is attached to a call works: hooks, weight averaging, sharding.

Hooks are counted at the end of the forward pass: the backward pass runs F a second time, through its hooks, since some
of them are part of the function (pruning, spectral norm).
"""

import pytest
import torch
import torch.distributed as dist
from promise import (
    ANY,
    CHANNELS,
    HOLDERS,
    INSIDE,
    NESTED,
    OWN,
    PER_SAMPLE,
    PRENORM,
    assert_equal_or_refused,
    assert_promise,
    backward_of_loss,
    images,
    in_every_holder,
    loss_of,
    refused,
    run,
    seed,
    set_backward,
)
from torch import nn

from revtrain.core.chain import InvertibleChain
from revtrain.errors import RevtrainError
from revtrain.layers import (
    AdditiveCoupling,
    BatchPooling,
    ChannelPooling,
    CouplingConv2d,
    HiddenChunkCoupling,
    InvertibleBatchNorm2d,
    InvertibleLeakyReLU,
    PreNorm,
)


def conv(channels):
    return nn.Conv2d(channels, channels, 3, padding=1)


def body(channels):
    return nn.Sequential(conv(channels), nn.SiLU(), conv(channels))


# ---- hooks that look on --------------------------------------------------------------------------


def recorded(model, x, attach):
    """The step with hooks on all modules of `model`; what they saw in the forward pass, by module and in order."""
    seen = []

    def keep(name, value):
        value = value[0] if isinstance(value, tuple) else value
        seen.append((name, value.detach().clone()))

    for name, module in model.named_modules():
        attach(name, module, keep)
    y = model(x)
    order, seen_forward = [name for name, _ in seen], [value for _, value in seen]
    loss_of(y).backward()
    return y, order, *seen_forward


def before(name, module, keep):
    module.register_forward_pre_hook(lambda m, inputs: keep(f"before {name}", inputs))


def after(name, module, keep):
    module.register_forward_hook(lambda m, inputs, output: keep(f"after {name}", output))


@in_every_holder
@pytest.mark.parametrize("attach", [before, after], ids=["before", "after"])
def test_forward_hooks_of_every_module_fire_once_with_the_values_of_store(holder, attach):
    assert_promise(lambda: holder.chain(body), images(), step=lambda m, x: recorded(m, x, attach))


LAYERS = {
    "batchnorm": lambda: InvertibleBatchNorm2d(CHANNELS),
    "leakyrelu": lambda: InvertibleLeakyReLU(0.5),
    "convolution": lambda: CouplingConv2d(CHANNELS),
    "hidden-chunks": lambda: HiddenChunkCoupling(CHANNELS, hidden=5, hidden_chunk=2),
    "channel-pooling": ChannelPooling,
    "batch-pooling": BatchPooling,
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("attach", [before, after], ids=["before", "after"])
def test_forward_hooks_of_every_layer_fire_once_with_the_values_of_store(kind, attach):
    def step(model, x):
        # on the layer alone: what happens inside a chunked one is its own affair
        seen = []
        attach("layer", model.layers[1], lambda name, value: seen.append(_first(value).detach().clone()))
        y = model(x)
        count, values = len(seen), list(seen)
        loss_of(y).backward()
        return y, count, *values

    make = lambda: InvertibleChain([InvertibleLeakyReLU(0.7), LAYERS[kind](), InvertibleLeakyReLU(0.6)])  # noqa: E731
    assert_promise(make, images(), step=step)


def _first(value):
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.parametrize("place", ["f", "f.norm", "f.body"])
def test_hooks_of_prenorm_its_norm_and_its_body(place):
    def step(model, x):
        seen = []
        module = model.layers[1].get_submodule(place)
        module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].detach().clone()))
        module.register_forward_hook(lambda m, inputs, output: seen.append(output.detach().clone()))
        y = model(x)
        values = list(seen)
        loss_of(y).backward()
        return y, len(values), *values

    assert_promise(lambda: PRENORM.chain(body), images(), step=step)


def test_hooks_may_keep_the_tensors_themselves():
    """The chain works in place: what a hook was given may not change under its hands."""

    def step(model, x):
        seen = []
        for module in model.layers:
            module.register_forward_hook(lambda m, inputs, output: seen.extend([inputs[0], output]))
        y = model(x)
        loss_of(y).backward()
        return y, *seen

    for holder in (ANY, OWN, NESTED):
        assert_promise(lambda holder=holder: holder.chain(body), images(), step=step)


def test_a_hook_with_keywords_and_one_that_is_always_called():
    def step(model, x):
        seen = []
        f = model.layers[1].f
        f.register_forward_pre_hook(lambda m, inputs, named: seen.append(inputs[0].mean()), with_kwargs=True)
        f.register_forward_hook(lambda m, inputs, output: seen.append(output.mean()), always_call=True, prepend=True)
        y = model(x)
        values = list(seen)
        loss_of(y).backward()
        return y, *values

    assert_promise(lambda: ANY.chain(body), images(), step=step)


def test_global_hooks_fire_for_layers_and_functions():
    """torch.nn.modules.module.register_module_forward_hook: what profilers and FLOP counters use."""

    def step(model, x):
        seen = []
        handle = nn.modules.module.register_module_forward_hook(lambda m, inputs, output: seen.append(type(m).__name__))
        y = model(x)
        names = list(seen)
        handle.remove()
        loss_of(y).backward()
        return y, names

    for holder in (ANY, PRENORM, INSIDE):
        assert_promise(lambda holder=holder: holder.chain(body), images(), step=step)


def test_a_removed_hook_is_gone():
    def step(model, x):
        seen = []
        handles = [m.register_forward_hook(lambda *_: seen.append(1)) for m in model.layers]
        for handle in handles:
            handle.remove()
        return backward_of_loss(model, x), len(seen)

    assert_promise(lambda: PRENORM.chain(body), images(), step=step)


# ---- hooks that change something -----------------------------------------------------------------


@pytest.mark.parametrize("holder", [ANY, PER_SAMPLE, PRENORM, OWN], ids=lambda holder: holder.name)
@pytest.mark.parametrize("kind", ["input", "output"])
def test_a_hook_on_f_that_returns_another_value_is_part_of_f(holder, kind):
    def make():
        chain = holder.chain(body)
        for function in [m for m in chain.modules() if isinstance(m, PreNorm | nn.Sequential)]:
            if kind == "input":
                function.register_forward_pre_hook(lambda m, inputs: (inputs[0].sin(),))
            else:
                function.register_forward_hook(lambda m, inputs, output: output.cos())
        return chain

    assert_equal_or_refused(make, images(), words=("hook",))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("where", ["input", "output"])
def test_a_hook_on_a_layer_that_returns_another_value_is_refused(kind, where):
    """The layer's inverse knows nothing of it."""

    def make():
        layer = LAYERS[kind]()
        chain = InvertibleChain([InvertibleLeakyReLU(0.7), layer])
        if where == "input":
            layer.register_forward_pre_hook(lambda m, inputs: (inputs[0] * 2,))
        else:
            layer.register_forward_hook(lambda m, inputs, output: output + 1)
        return chain

    with refused("hook", type(LAYERS[kind]()).__name__):
        run(make, images(), backward="invert")


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_backward_hooks_on_a_layer_are_refused(kind, register):
    def make():
        layer = LAYERS[kind]()
        chain = InvertibleChain([InvertibleLeakyReLU(0.7), layer])
        getattr(layer, register)(lambda *_: None)
        return chain

    with refused("hook", type(LAYERS[kind]()).__name__):
        run(make, images(), backward="invert")


@pytest.mark.parametrize("holder", [ANY, PER_SAMPLE, PRENORM, INSIDE], ids=lambda holder: holder.name)
def test_backward_hooks_on_functions_see_the_gradients_of_store(holder):
    """F is run by autograd: they work, on a body and on PreNorm as on any module, or are refused."""

    def step(model, x):
        seen = []
        for module in model.modules():
            if isinstance(module, PreNorm | nn.Sequential):
                module.register_full_backward_hook(lambda m, dx, dy: seen.extend([dx[0].clone(), dy[0].clone()]))
        return backward_of_loss(model, x), len(seen), *seen

    assert_equal_or_refused(lambda: holder.chain(body), images(), words=("hook",), step=step)


def test_backward_hooks_on_the_chain_itself():
    """A chain is called as a whole: it is a module like any other there."""

    def step(model, x):
        seen = []
        model.register_full_backward_hook(lambda m, dx, dy: seen.extend([dx[0].clone(), dy[0].clone()]))
        return backward_of_loss(model, x), *seen

    assert_promise(lambda: ANY.chain(body), images(), step=step)


def test_tensor_hooks_on_input_and_output():
    def step(model, x):
        seen = []
        scaled = x * 1
        scaled.register_hook(lambda gradient: seen.append(gradient.clone()))
        y = model(scaled)
        y.register_hook(lambda gradient: 2 * gradient)
        loss_of(y).backward()
        return y, *seen

    for holder in HOLDERS:
        assert_promise(lambda holder=holder: holder.chain(body), images(), step=step)


def test_an_overridden_call_and_a_replaced_forward():
    """Wrappers that people put around a module of a finished model: `f.forward = wrapped(f.forward)`."""

    def make():
        chain = PRENORM.chain(body)
        for module in [m for m in chain.modules() if isinstance(m, PreNorm)]:
            original = module.body.forward
            module.body.forward = lambda x, original=original: 2 * original(x)
        return chain

    assert_promise(make, images())


def test_a_subclass_of_prenorm_with_another_forward():
    class Scaled(PreNorm):
        def forward(self, x):
            return 0.3 * super().forward(x).sin()

    make = lambda: InvertibleChain([AdditiveCoupling(CHANNELS, Scaled(4, body(4)), Scaled(4, body(4)))])  # noqa: E731
    assert_promise(make, images())


def test_a_subclass_of_a_layer_with_another_forward_only_is_refused_or_right():
    """Its lean forms would still be those of the class above."""

    class Shifted(InvertibleLeakyReLU):
        def forward(self, x):
            return super().forward(x) + 1

    assert_equal_or_refused(lambda: InvertibleChain([CouplingConv2d(CHANNELS), Shifted(0.5)]), images())


def test_another_norm_inside_prenorm():
    """`prenorm.norm = ...`, as conversions of a whole model do."""

    def make():
        chain = PRENORM.chain(body)
        for module in [m for m in chain.modules() if isinstance(m, PreNorm)]:
            module.norm = nn.GroupNorm(2, 4)
        return chain

    assert_equal_or_refused(make, images(), words=("GroupNorm",))


# ---- tools of torch's ----------------------------------------------------------------------------

NORMS = {
    "ours": lambda: InvertibleBatchNorm2d(CHANNELS),
    "in-f": lambda: ANY.build(lambda c: nn.Sequential(conv(c), nn.BatchNorm2d(c))),
    "prenorm": lambda: PRENORM.build(conv),
    "hidden-chunks": lambda: HiddenChunkCoupling(CHANNELS, hidden=5, hidden_chunk=2),
}
BATCHES = [images(8)[i::3][:2] for i in range(3)]


def _statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("backward", ["store", "invert"])
@pytest.mark.parametrize("kind", NORMS)
def test_update_bn_takes_the_average_over_all_batches(kind, backward):
    """The mean of what each batch alone gives, whatever was there before."""
    seed(0)
    chain = set_backward(InvertibleChain([NORMS[kind]()]).double(), backward)
    single = []
    for batch in BATCHES:
        for module in chain.modules():
            if hasattr(module, "running_mean"):
                module.running_mean.zero_(), module.running_var.zero_()
                module.momentum = 1.0
        chain(batch)
        single.append(_statistics(chain))
    for module in chain.modules():
        if hasattr(module, "running_mean"):
            module.momentum = 0.1
    torch.optim.swa_utils.update_bn(BATCHES, chain)
    assert single[0]
    for name, value in _statistics(chain).items():
        torch.testing.assert_close(value, sum(each[name] for each in single) / 3, rtol=1e-9, atol=1e-9, msg=name)
    assert all(m.momentum == 0.1 for m in chain.modules() if hasattr(m, "running_mean"))


def test_our_batch_norm_with_a_cumulative_average_is_torchs():
    ours, theirs = InvertibleBatchNorm2d(CHANNELS, epsilon_i=0.0, momentum=None).double(), nn.BatchNorm2d(CHANNELS)
    theirs = theirs.double()
    theirs.momentum = None
    chain = InvertibleChain([ours])
    for batch in BATCHES:
        chain(batch).sum().backward()
        theirs(batch)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("kind", ["in-f", "prenorm", "hidden-chunks"])
def test_a_cumulative_average_in_both_modes(kind):
    def make():
        chain = InvertibleChain([NORMS[kind]()])
        for module in chain.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        return chain

    step = lambda model, x: [backward_of_loss(model, x * (i + 1)) for i in range(3)]  # noqa: E731
    assert_promise(make, images(), step=step)


@pytest.fixture
def one_process(tmp_path):
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["in-f", "prenorm", "hidden-chunks"])
def test_converted_to_torchs_synchronised_batch_norms(kind):
    """Of one process they are ordinary batch norms; they must be called, which is where they wait for the others."""

    def make():
        return nn.SyncBatchNorm.convert_sync_batchnorm(InvertibleChain([NORMS[kind]()]))

    assert_equal_or_refused(make, images(), words=("SyncBatchNorm",))


@pytest.mark.parametrize("kind", ["in-f", "prenorm", "hidden-chunks"])
def test_a_converted_batch_norm_is_called(kind, monkeypatch):
    """Where a chain reads the weights of a SyncBatchNorm instead, it uses the statistics of one process, silently."""
    calls = []
    forward = nn.SyncBatchNorm.forward
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", lambda self, x: calls.append(1) or forward(self, x))
    chain = nn.SyncBatchNorm.convert_sync_batchnorm(InvertibleChain([NORMS[kind]()]))
    try:
        chain(images().float())
    except RevtrainError as error:
        assert "SyncBatchNorm" in str(error)
    else:
        assert calls


def test_our_batch_norm_is_converted_or_says_that_it_is_not(one_process):
    """convert_sync_batchnorm goes by torch's class, so it would pass ours by without a word."""
    chain = InvertibleChain([InvertibleBatchNorm2d(CHANNELS), InvertibleLeakyReLU(0.5)])
    try:
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(chain, one_process)
        converted(images().float())
    except RevtrainError as error:
        assert "synchronise_batch_norms" in str(error)
    else:
        assert converted.layers[0].group is not None


def shard_f(model):
    from torch.distributed.fsdp import fully_shard

    for module in [m for m in model.modules() if isinstance(m, nn.Sequential)]:
        fully_shard(module)


def shard_layers(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        if any(True for _ in layer.parameters()):
            fully_shard(layer)


def shard_chain(model):
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", [shard_f, shard_layers, shard_chain], ids=["f", "layers", "chain"])
@pytest.mark.parametrize("holder", [ANY, PER_SAMPLE, PRENORM], ids=lambda holder: holder.name)
def test_fully_sharded(one_process, holder, shard):
    """FSDP2 gathers a module's weights in a hook before its forward: whoever does not call the module has none."""

    def gradients(backward, sharded):
        seed(0)
        model = set_backward(holder.chain(body).double(), backward)
        if sharded:
            shard(model)
        loss_of(model(images())).backward()
        return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]

    torch.testing.assert_close(gradients("invert", True), gradients("store", False), rtol=1e-9, atol=1e-9)


def test_names_of_the_model_are_those_of_store():
    """state_dict, named_parameters and named_modules are the same during and after a step in both modes."""

    def step(model, x):
        y = backward_of_loss(model, x)
        return y, list(model.state_dict()), [name for name, _ in model.named_modules()]

    for holder in HOLDERS:
        assert_promise(lambda holder=holder: holder.chain(body), images(), step=step)
