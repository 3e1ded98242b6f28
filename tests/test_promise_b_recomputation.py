"""Kind B: F is run twice as if once. What a run depends on is restored; what cannot be is checked and refused.

The backward pass rebuilds the input of F and runs F on it once more. Buffers, random numbers, weights, modes: whatever
differs the second time makes another function of it, and gradients of something else.
"""

import functools
import random
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from promise import (
    ANY,
    CHANNELS,
    INSIDE,
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
    in_whole_batch_holders,
    loss_of,
    refused,
    run,
    seed,
)
from torch import nn

from revtrain.core.chain import InvertibleChain
from revtrain.core.recompute import draws_nothing
from revtrain.layers import AdditiveCoupling, InvertibleBatchNorm2d, InvertibleLeakyReLU

# the old spectral norm and weight norm say that they are old
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def conv(channels):
    return nn.Conv2d(channels, channels, 3, padding=1)


# ---- state that F changes ------------------------------------------------------------------------


class Counts(nn.Module):
    """Its result depends on how often it was called, which a buffer counts in place."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.calls += 1
        return self.conv(x) * torch.cos(self.calls)


class ReplacesBuffer(Counts):
    """As `Counts`, but by a new tensor each time."""

    def forward(self, x):
        self.calls = self.calls + 1
        return self.conv(x) * torch.cos(self.calls)


class RunningMaximum(nn.Module):
    """Scales by the largest value ever seen, as an observer of quantisation does."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels)
        self.register_buffer("largest", torch.tensor(0.1))

    def forward(self, x):
        y = self.conv(x)
        result = y / self.largest.clone()
        self.largest.copy_(torch.maximum(self.largest, y.detach().abs().max()))
        return result


class CountsInAttribute(nn.Module):
    """As `Counts`, in an ordinary number."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.conv(x) * self.calls


class LateBuffer(nn.Module):
    """Registers its buffer when it is first called, and normalises by what came before from then on."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels)

    def forward(self, x):
        y = self.conv(x)
        if not hasattr(self, "mean"):
            self.register_buffer("mean", torch.zeros_like(y.detach().mean()))
        result = y - 3 * self.mean
        self.mean.lerp_(y.detach().mean(), 0.5)
        return result


class DelayedScale(nn.Module):
    """Scales by the mean of the batch before: a feedback through a buffer of several submodules."""

    def __init__(self, channels):
        super().__init__()
        self.inner = nn.Sequential(conv(channels), nn.Sequential(RunningMaximum(channels), Counts(channels)))

    def forward(self, x):
        return self.inner(x)


STATEFUL = {
    "spectral-norm": lambda c: nn.utils.parametrizations.spectral_norm(conv(c)),
    "old-spectral-norm": lambda c: nn.utils.spectral_norm(conv(c)),
    "counter": Counts,
    "replaced-counter": ReplacesBuffer,
    "running-maximum": RunningMaximum,
    "attribute": CountsInAttribute,
    "late-buffer": LateBuffer,
    "several": DelayedScale,
}
NORMS = {
    "instance-norm": lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True),
    "batch-norm": lambda c: nn.Sequential(conv(c), nn.BatchNorm2d(c)),
    "cumulative-batch-norm": lambda c: nn.Sequential(conv(c), nn.BatchNorm2d(c, momentum=None)),
    "batch-norm-twice": lambda c: (lambda norm: nn.Sequential(norm, conv(c), norm))(nn.BatchNorm2d(c)),
    "batch-norm-without-statistics": lambda c: nn.Sequential(conv(c), nn.BatchNorm2d(c, track_running_stats=False)),
    "batch-norm-in-eval": lambda c: nn.Sequential(conv(c), _Evaluating(c)),
}


class _Evaluating(nn.BatchNorm2d):
    """Frozen statistics in training, as detectors have them."""

    def train(self, mode=True):
        return super().train(False)


@in_every_holder
@pytest.mark.parametrize("kind", STATEFUL)
def test_state_that_f_changes(holder, kind):
    assert_promise(lambda: holder.chain(STATEFUL[kind]), images())


@in_whole_batch_holders
@pytest.mark.parametrize("kind", NORMS)
def test_running_statistics_inside_f_are_updated_once(holder, kind):
    assert_promise(lambda: holder.chain(NORMS[kind]), images())


def steps(model, x, count=3):
    """Several steps of an optimizer: what one leaves behind, the next depends on."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)  # the loss is a sum: larger steps diverge
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = loss_of(model(x))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


@pytest.mark.parametrize("kind", STATEFUL)
def test_state_over_several_steps(kind):
    assert_promise(lambda: ANY.chain(STATEFUL[kind]), images() / 4, step=steps, tolerance=1e-7)


@pytest.mark.parametrize("kind", STATEFUL)
def test_two_forward_passes_before_their_two_backward_passes(kind):
    """The state has moved on when the first is recomputed; afterwards it is that of two passes."""

    def step(model, x):
        first, second = model(x), model(x.flip(0))
        loss_of(second).backward()
        loss_of(first).backward()
        return first, second

    assert_promise(lambda: ANY.chain(STATEFUL[kind]), images(), step=step)


@pytest.mark.parametrize("kind", ["counter", "running-maximum", "old-spectral-norm"])
def test_a_retained_graph_runs_the_same_function_again(kind):
    def step(model, x):
        loss = loss_of(model(x))
        loss.backward(retain_graph=True)
        loss.backward()
        return loss

    assert_promise(lambda: ANY.chain(STATEFUL[kind]), images(), step=step)


@pytest.mark.parametrize("kind", ["counter", "running-maximum", "old-spectral-norm", "attribute"])
@pytest.mark.parametrize("holder", [PER_SAMPLE, PRENORM], ids=lambda holder: holder.name)
def test_state_that_changes_from_piece_to_piece(holder, kind):
    """In pieces such an F would be called, and count, more often than in `store`."""
    assert_equal_or_refused(lambda: holder.chain(STATEFUL[kind]), images(), piece_bytes=SINGLE_IMAGES)


def test_one_stateful_module_as_f_and_g():
    def make():
        f = Counts(CHANNELS // 2)
        return InvertibleChain([AdditiveCoupling(CHANNELS, f, f), InvertibleLeakyReLU(0.5), AdditiveCoupling(8, f, f)])

    assert_promise(make, images())


def test_a_state_dict_taken_between_the_passes_is_that_of_store():
    def step(model, x):
        y = model(x)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        loss_of(y).backward()
        return [state[name] for name in sorted(state)]

    assert_promise(lambda: ANY.chain(Counts), images(), step=step)


# ---- random numbers ------------------------------------------------------------------------------


class Random(nn.Module):
    """Scales each value by a random number of one of many generators."""

    def __init__(self, channels, draw, **attributes):
        super().__init__()
        self.conv, self.draw = conv(channels), draw
        vars(self).update(attributes)

    def forward(self, x):
        return self.conv(x) * self.draw(self)


RANDOM = {
    "dropout": lambda c: nn.Sequential(conv(c), nn.Dropout(0.5)),
    "torch": lambda c: Random(c, lambda m: torch.rand(())),
    "python": lambda c: Random(c, lambda m: random.random()),
    "numpy": lambda c: Random(c, lambda m: np.random.rand()),
    "own-torch": lambda c: Random(
        c, lambda m: torch.rand((), generator=m.generator), generator=torch.Generator().manual_seed(1)
    ),
    "own-numpy": lambda c: Random(c, lambda m: m.generator.random(), generator=np.random.default_rng(1)),
    "own-old-numpy": lambda c: Random(c, lambda m: m.generator.rand(), generator=np.random.RandomState(1)),
    "own-python": lambda c: Random(c, lambda m: m.generator.random(), generator=random.Random(1)),
    "all": lambda c: nn.Sequential(
        Random(c, lambda m: random.gauss(0, 1)), Random(c, lambda m: np.random.randn()), nn.Dropout(0.3)
    ),
}


@in_every_holder
@pytest.mark.parametrize("kind", RANDOM)
def test_random_numbers_that_f_draws(holder, kind):
    assert_promise(lambda: holder.chain(RANDOM[kind]), images())


@pytest.mark.parametrize("kind", RANDOM)
def test_random_numbers_of_two_passes_and_a_retained_graph(kind):
    def step(model, x):
        first, second = model(x), model(x)
        loss_of(first).backward(retain_graph=True)
        random.random(), np.random.rand(), torch.rand(3)
        loss_of(second).backward()
        loss_of(first).backward()
        return first, second

    assert_promise(lambda: ANY.chain(RANDOM[kind]), images(), step=step)


def test_seeds_set_between_the_passes_stay_set():
    def step(model, x):
        y = model(x)
        seed(77)
        loss_of(y).backward()
        return y

    assert_promise(lambda: ANY.chain(RANDOM["all"]), images(), step=step)


@in_every_holder
def test_a_generator_that_nobody_can_see_is_refused(holder):
    """In a closure: it cannot be restored, but the result of the second run tells."""
    generator = np.random.default_rng(1)
    make = lambda: holder.chain(lambda c: Random(c, lambda m: generator.random()))  # noqa: E731
    with refused("computed something else", "recomputed"):
        run(make, images(), backward="invert")


@pytest.mark.parametrize("hidden", ["list", "dict", "closure"])
def test_a_counter_out_of_sight_is_restored_or_refused(hidden):
    def make_function(channels):
        calls = [0]

        class Hidden(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = conv(channels)
                if hidden == "list":
                    self.calls = calls
                elif hidden == "dict":
                    self.cache = {"calls": calls}

            def forward(self, x):
                calls[0] += 1
                return self.conv(x) * calls[0]

        return Hidden()

    assert_equal_or_refused(lambda: ANY.chain(make_function), images(), words=("Hidden",))


def test_a_cache_of_the_first_call_is_the_same_function():
    """A mask that is computed once and kept, as attention layers do."""

    class Caches(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv, self.mask = conv(channels), None

        def forward(self, x):
            if self.mask is None:
                self.mask = torch.tril(torch.ones(x.shape[-2:], dtype=x.dtype))
            return self.conv(x) * self.mask

    assert_promise(lambda: ANY.chain(Caches), images(), step=lambda m, x: [backward_of_loss(m, x) for _ in range(2)])


# ---- a second run that is another one ------------------------------------------------------------


class Differs(nn.Module):
    """Computes `first` in its first run, and `again` in all others."""

    def __init__(self, channels, first, again):
        super().__init__()
        self.conv = conv(channels)
        self.functions = iter([first])
        self.again = again

    def forward(self, x):
        return next(self.functions, self.again)(self.conv(x))


SECOND_RUNS = {
    "more-operations": lambda y: y.sin().cos(),
    "fewer-operations": lambda y: y,
    "another-type": lambda y: y.exp().float(),
    "another-shape": lambda y: y.exp().flatten(1),
    "a-little-noise": lambda y: y.exp() * 1.01,
    "one-image-only": lambda y: torch.cat([y[:1], y[1:].exp()]),
}


@pytest.mark.parametrize("kind", SECOND_RUNS)
@pytest.mark.parametrize("holder", [ANY, PER_SAMPLE, PRENORM, INSIDE, OWN], ids=lambda holder: holder.name)
def test_a_second_run_that_computes_something_else_is_refused(holder, kind):
    make = lambda: holder.chain(lambda c: Differs(c, torch.exp, SECOND_RUNS[kind]))  # noqa: E731
    if holder is OWN and kind == "another-shape":  # the layer's own sum of two parts fails, which is as loud
        with pytest.raises(RuntimeError, match="size of tensor"):
            run(make, images(), backward="invert")
        return
    with refused("recomputed"):
        run(make, images(), backward="invert")


def test_the_refusal_names_the_module_and_leaves_the_chain_usable():
    """After an error no stand-in is left in the place of a parameter, and the next step trains."""
    chain = ANY.chain(lambda c: Differs(c, torch.exp, torch.sin)).double()
    parameters = list(chain.parameters())
    y = chain(images())
    with refused("Differs"):
        loss_of(y).backward()
    assert [id(p) for p in chain.parameters()] == [id(p) for p in parameters]
    assert all(p.is_leaf and p.requires_grad for p in chain.parameters())
    loss_of(chain(images())).backward()  # both runs compute the sine now
    assert all(p.grad is not None for p in parameters)


def test_an_error_inside_the_second_run_leaves_everything_as_it_was():
    class Fails(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv, self.runs = conv(channels), []
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.runs.append(1)
            if len(self.runs) == 2:
                raise ValueError("out of luck")
            return self.conv(x)

    chain = ANY.chain(Fails).double()
    parameters, buffers = list(chain.parameters()), list(chain.buffers())
    y = chain(images())
    with pytest.raises(ValueError, match="out of luck"):
        loss_of(y).backward()
    assert [id(p) for p in chain.parameters()] == [id(p) for p in parameters]
    assert [id(b) for b in chain.buffers()] == [id(b) for b in buffers]
    assert [b.item() for b in chain.buffers()] == [1, 1]


# ---- weights and modes ---------------------------------------------------------------------------


def _stepped(model, x):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = loss_of(model(x))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return loss


@in_every_holder
def test_weights_stepped_between_forward_and_backward_are_refused(holder):
    """As plain autograd does."""
    chain = holder.chain(conv).double()
    loss = _stepped(chain, images())
    with refused("between the forward and the backward pass"):
        loss.backward()


@pytest.mark.parametrize(
    "layer", [InvertibleBatchNorm2d(CHANNELS), OwnCoupling(conv(4))], ids=lambda layer: type(layer).__name__
)
def test_weights_of_the_layers_themselves_are_checked(layer):
    chain = InvertibleChain([layer, InvertibleLeakyReLU(0.5)]).double()
    loss = _stepped(chain, images())
    with refused("between the forward and the backward pass"):
        loss.backward()


def test_weights_loaded_between_forward_and_backward_are_refused():
    chain = ANY.chain(conv).double()
    loss = loss_of(chain(images()))
    chain.load_state_dict({name: value * 2 for name, value in chain.state_dict().items()})
    with refused("between the forward and the backward pass"):
        loss.backward()


def test_frozen_weights_that_change_are_refused_too():
    """A moving average copied into a frozen F: its values are needed again."""
    chain = ANY.chain(conv).double()
    frozen = chain.layers[1].f.requires_grad_(False)
    loss = loss_of(chain(images()))
    with torch.no_grad():
        frozen.weight.mul_(2)
    with refused("between the forward and the backward pass"):
        loss.backward()


@in_whole_batch_holders
@pytest.mark.parametrize("kind", ["batch-norm", "dropout"])
def test_a_switch_to_eval_between_the_passes_is_refused(holder, kind):
    chain = holder.chain({**NORMS, **RANDOM}[kind]).double()
    loss = loss_of(chain(images()))
    chain.eval()
    with refused("eval()", "between the forward and the backward pass"):
        loss.backward()


def test_a_switch_to_train_and_of_one_submodule_are_refused():
    chain = ANY.chain(RANDOM["dropout"]).double().eval()
    loss = loss_of(chain(images()))
    chain.layers[1].f[1].train()
    with refused("Dropout", "train()"):
        loss.backward()


@pytest.mark.parametrize("kind", ["batch-norm", "dropout", "running-maximum"])
def test_a_validation_between_the_passes_is_legal(kind):
    def step(model, x):
        y = model(x)
        model.eval()
        with torch.no_grad():
            validated = model(x.flip(0))
        model.train()
        loss_of(y).backward()
        return y, validated

    assert_promise(lambda: ANY.chain({**STATEFUL, **NORMS, **RANDOM}[kind]), images(), step=step)


@in_every_holder
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_autocast_of_the_forward_pass_is_that_of_the_recomputation(holder, where):
    """Entered for one of the two passes alone; torch recommends the first. F tells which state it is run in."""

    class Tells(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = conv(channels)

        def forward(self, x):
            return self.conv(x) * (2 if torch.is_autocast_enabled("cpu") else 1)

    def step(model, x):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "forward"):
            y = model(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "backward"):
            loss_of(y).backward()
        return y

    assert_promise(lambda: holder.chain(Tells), images(), step=step)


# ---- layers of the user's own --------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["batch-norm", "cumulative-batch-norm", "dropout", "counter", "spectral-norm", "numpy"]
)
def test_a_layer_with_only_forward_and_inverse(kind):
    make_function = {**STATEFUL, **NORMS, **RANDOM}[kind]
    make = lambda: InvertibleChain([OwnCoupling(make_function(4)), OwnCoupling(make_function(4))])  # noqa: E731
    assert_promise(make, images())


def test_a_layer_that_counts_in_an_attribute():
    class Turns(OwnCoupling):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    def step(model, x):
        y = backward_of_loss(model, x)
        return y, *(torch.tensor(layer.calls) for layer in model.layers)

    assert_promise(lambda: InvertibleChain([Turns(conv(4)), Turns(conv(4))]), images(), step=step)


# ---- threads -------------------------------------------------------------------------------------


class Slow(nn.Module):
    """Lets other threads run in the middle of it."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels)

    def forward(self, x):
        time.sleep(0.003)
        y = self.conv(x)
        time.sleep(0.003)
        return y.sin()


@pytest.mark.parametrize("holder", [ANY, PER_SAMPLE, PRENORM, INSIDE, OWN], ids=lambda holder: holder.name)
def test_several_threads_on_one_chain(holder):
    """Gradients as with one thread after the other; the parameters are the very objects they were."""
    seed(0)
    chain = holder.chain(Slow).double().eval()
    parameters = list(chain.parameters())
    inputs = [images() * (i + 1) for i in range(3)]

    def gradients(x):
        return torch.autograd.grad(loss_of(chain(x)), parameters)

    expected = [gradients(x) for x in inputs]
    results, errors = [None] * len(inputs), []

    def work(i):
        try:
            results[i] = gradients(inputs[i])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(a is b for a, b in zip(chain.parameters(), parameters, strict=True)), "a stand-in has been left behind"
    for got, wanted in zip(results, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_a_forward_pass_in_another_thread_sees_the_true_parameters():
    """One thread is in the middle of its backward pass while another one calls the chain."""

    class SlowAgain(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = conv(channels)

        def forward(self, x):
            if torch.is_grad_enabled():
                time.sleep(0.02)
            return self.conv(x)

    seed(0)
    chain = ANY.chain(SlowAgain).double()
    parameters = list(chain.parameters())
    loss = loss_of(chain(images()))
    thread = threading.Thread(target=loss.backward)
    thread.start()
    outputs = []
    while thread.is_alive():
        outputs.append(chain(images(1)))
        time.sleep(0.001)
    thread.join()
    assert [id(p) for p in chain.parameters()] == [id(p) for p in parameters]
    gradients = torch.autograd.grad(sum(y.sum() for y in outputs), parameters, allow_unused=True)
    torch.testing.assert_close(gradients, torch.autograd.grad(len(outputs) * chain(images(1)).sum(), parameters))


def test_a_chain_inside_f_of_itself_does_not_wait_for_itself():
    """F runs another chain, forwards and backwards, inside its own forward: a lock would wait for its own thread."""

    class Gradient(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = conv(channels)
            self.chain = InvertibleChain([AdditiveCoupling(channels, conv(channels // 2), nn.Tanh())])

        def forward(self, x):
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.chain(z).square().sum(), z)
            return self.conv(x) + slope

    assert_promise(lambda: ANY.chain(Gradient), images())


def test_both_modes_draw_the_same_random_numbers_in_functions_that_are_partly_random():
    """Drawn only now and then, by a number that is itself random (stochastic depth)."""

    class Skips(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = conv(channels)

        def forward(self, x):
            return self.conv(x) if random.random() < 0.5 else F.dropout(self.conv(x), 0.5)

    step = functools.partial(steps, count=4)
    assert_promise(
        lambda: InvertibleChain([ANY.build(Skips) for _ in range(3)]), images() / 4, step=step, tolerance=1e-7
    )


class Noisy(nn.Conv2d):
    """A subclass of a module that draws nothing, which draws."""

    def forward(self, x):
        return super().forward(x) + torch.rand_like(x)


@pytest.mark.parametrize(
    ("module", "known"),
    [
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU()), True),
        (nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout(0.5)), False),
        (nn.Sequential(Noisy(2, 2, 1)), False),
    ],
    ids=["convolutions", "dropout", "a subclass"],
)
def test_generators_are_looked_at_but_where_it_is_known_that_none_is_drawn_from(module, known):
    assert all(map(draws_nothing, module.modules())) == known
    module[0].register_forward_hook(lambda module, inputs, result: result + torch.rand_like(result))
    assert not all(map(draws_nothing, module.modules())), "a hook may draw"


def test_a_subclass_of_a_quiet_module_draws_the_same_numbers_again():
    def build(backward):
        torch.manual_seed(0)
        return InvertibleChain([AdditiveCoupling(4, Noisy(2, 2, 1), Noisy(2, 2, 1))], backward).double()

    gradients = []
    for backward in ("store", "invert"):
        chain = build(backward)
        torch.manual_seed(1)
        x = torch.randn(3, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        chain(x).square().sum().backward()
        gradients.append([each.grad for each in chain.parameters()])
    for stored, inverted in zip(*gradients, strict=True):
        torch.testing.assert_close(inverted, stored, rtol=1e-9, atol=1e-9)
