"""`revtrain.verify` finds the faults of kinds B, C and F when they are planted, and says nothing of sound models."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import ARCHS, LAYERS, compose, ids
from promise import ANY, CHANNELS, HOLDERS, INSIDE, NESTED, PRENORM, OwnCoupling, assert_promise, images, seed, values
from test_promise_b_recomputation import NORMS, RANDOM, STATEFUL
from test_promise_c_gradients import ClosesOver, Conditioned, Functional, Replicated, conv
from torch import nn

import revtrain
from revtrain import InvertibleChain, InvertibleLayer, RevtrainError, verify
from revtrain.layers import (
    AdditiveCoupling,
    ChannelPooling,
    CouplingConv2d,
    InvertibleBatchNorm2d,
    InvertibleLeakyReLU,
    PreNorm,
)
from revtrain.models import build_model
from revtrain.numerics.verify import Verification, linear_loss

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # the old spectral norm says that it is old


class Naive(InvertibleLayer):
    """A coupling without a guard: it runs F once more on the way back and trusts that it is the same function."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x, *context):
        x1, x2 = x.chunk(2, dim=1)
        return torch.cat([x1 + self.f(x2, *context), x2], dim=1)

    def forward_(self, x, *context):
        with torch.no_grad():
            return self.forward(x, *context), None

    def wanted(self, grads):
        return grads.wanted(self.f.parameters())

    def backward_(self, y, dy, saved, grads, *context):
        y1, y2 = (each.clone() for each in y.chunk(2, dim=1))
        leaf, parameters = y2.requires_grad_(), self.wanted(grads)
        with torch.enable_grad():
            residual = self.f(leaf, *context)
            dy1, dy2 = dy.chunk(2, dim=1)
            dx2, *gradients = torch.autograd.grad(residual, [leaf, *parameters], dy1, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            grads.add(parameter, gradient)
        return torch.cat([y1 - residual.detach(), y2.detach()], 1), torch.cat([dy1, dy2 + dx2], 1)


def in_naive(f) -> InvertibleChain:
    """F in a layer without guards, between two others."""
    return InvertibleChain([InvertibleLeakyReLU(0.7), Naive(f), InvertibleLeakyReLU(0.6)]).double()


def is_sound(make, *inputs) -> bool:
    """What the tests of the promise say of it: a chain may restore for a layer what the layer itself does not."""
    try:
        assert_promise(make, *inputs)
    except (AssertionError, RevtrainError):
        return False
    return True


def kinds(report: Verification) -> set[str]:
    return {each.kind for each in report.findings}


def found(report: Verification, kind: str, place: str) -> bool:
    return any(each.kind == kind and place in each.module for each in report.findings)


# ---- kind B: the second run is another one -------------------------------------------------------


@pytest.mark.parametrize("kind", STATEFUL)
def test_state_that_f_changes_is_found(kind):
    seed(0)
    report = verify(in_naive(STATEFUL[kind](CHANNELS // 2)), images())
    if kind == "replaced-counter" and is_sound(lambda: in_naive(STATEFUL[kind](CHANNELS // 2)), images()):
        assert report
        return
    assert not report
    assert found(report, "gradient", "layers.1.f") or found(report, "rebuild", "layers.1"), report
    if kind != "running-maximum":  # which a second look at the same batch leaves where it is
        assert found(report, "state", "layers.1.f"), report


@pytest.mark.parametrize("kind", ["instance-norm", "batch-norm", "cumulative-batch-norm", "batch-norm-twice"])
def test_a_norm_that_is_updated_more_than_once_is_found(kind):
    seed(0)
    report = verify(in_naive(NORMS[kind](CHANNELS // 2)), images())
    assert kinds(report) == {"statistics"}, report
    assert found(report, "statistics", "layers.1.f")
    if kind == "batch-norm":
        assert "num_batches_tracked: BatchNorm2d: it moves 2 times as far" in str(report)


@pytest.mark.parametrize("kind", ["batch-norm-without-statistics", "batch-norm-in-eval"])
def test_a_norm_without_running_statistics_is_sound(kind):
    seed(0)
    assert verify(in_naive(NORMS[kind](CHANNELS // 2)).train(), images())


@pytest.mark.parametrize("kind", RANDOM)
def test_random_numbers_that_are_drawn_anew_are_found(kind):
    seed(0)
    report = verify(in_naive(RANDOM[kind](CHANNELS // 2)), images())
    assert found(report, "gradient", "layers.1.f"), report
    assert "state" in kinds(report), "the generators go on from elsewhere"


class Drifts(nn.Module):
    """Something out of sight takes part."""

    def __init__(self, channels):
        super().__init__()
        self.conv, generator = conv(channels), np.random.default_rng(1)
        self.draw = generator.random

    def forward(self, x):
        return self.conv(x) * self.draw()


def test_what_nobody_can_restore_is_non_determinism():
    report = verify(in_naive(Drifts(4)), images())
    assert "non-determinism" in kinds(report), report
    report = verify(ANY.chain(Drifts).double(), images())
    assert kinds(report) == {"non-determinism", "error"}, report
    assert found(report, "error", "layers.1.f") or found(report, "error", "layers.1.g")
    assert "computed something else" in str(report)


class StepsOnTheWay(nn.Module):
    """Its weight moves with every call, as a memory that learns does."""

    def __init__(self, channels):
        super().__init__()
        self.conv = conv(channels)

    def forward(self, x):
        y = self.conv(x)
        with torch.no_grad():
            self.conv.bias.copy_(self.conv.bias + 0.1)
        return y


def test_weights_that_change_on_the_way_are_found_and_put_back():
    seed(0)
    model = in_naive(StepsOnTheWay(4))
    before = model.layers[1].f.conv.bias.clone()
    report = verify(model, images())
    assert found(report, "rebuild", "layers.1") or "changed between the forward and the backward" in str(report), report
    assert torch.equal(model.layers[1].f.conv.bias, before)


class ReplacesWeights(Naive):
    """Leaves stand-ins in the place of parameters."""

    def backward_(self, y, dy, saved, grads):
        result = super().backward_(y, dy, saved, grads)
        self.f._parameters["weight"] = nn.Parameter(self.f.weight.detach().clone())
        return result


def test_parameters_that_are_replaced_for_good_are_found():
    chain = InvertibleChain([ReplacesWeights(conv(4))]).double()
    weight = chain.layers[0].f.weight
    report = verify(chain, images())
    assert found(report, "state", "layers.0.f.weight") and "another tensor" in str(report)
    assert chain.layers[0].f.weight is weight, "put back"


class SwitchesMode(Naive):
    def backward_(self, y, dy, saved, grads):
        self.f.eval()
        return super().backward_(y, dy, saved, grads)


def test_a_mode_that_is_switched_on_the_way_is_found():
    seed(0)
    chain = InvertibleChain([SwitchesMode(nn.Sequential(conv(4), nn.BatchNorm2d(4)))]).double()
    report = verify(chain, images())
    assert found(report, "state", "training") and found(report, "gradient", "layers.0.f"), report
    assert chain.layers[0].f.training


# ---- kind C: gradients that go missing -----------------------------------------------------------


@pytest.mark.parametrize("make", [lambda t: t, torch.exp, lambda t: t[:2]], ids=["leaf", "result", "view"])
def test_a_tensor_that_f_closes_over_is_found(make):
    leaf = values(3).requires_grad_()
    tensor = make(leaf)
    report = verify(in_naive(ClosesOver(4, tensor)), images())
    assert kinds(report) == {"missing gradient"} and "tensor 0 from outside, (3,)" in str(report), report
    report = verify(ANY.chain(lambda c: ClosesOver(c, tensor)).double(), images())
    assert kinds(report) == {"error"} and found(report, "error", "layers.1"), report
    tensor.sum().backward()  # its graph is as it was
    assert leaf.grad is not None


def test_a_tensor_of_another_module_is_found():
    outside = conv(4).double()
    f = nn.Sequential(nn.Tanh(), conv(4))
    vars(f[0])["hidden"] = [outside]
    f[0].forward = lambda x: outside(x)
    report = verify(in_naive(f), images())
    assert len([each for each in report.findings if each.kind == "missing gradient"]) == 2, report


class Uses(nn.Module):
    """Two chains; the second closes over what the first was given."""

    def __init__(self):
        super().__init__()
        self.f = ClosesOver(4, torch.zeros(()))
        self.chain = InvertibleChain([Naive(self.f)])

    def forward(self, x):
        self.f.outside[:] = [x]
        return self.chain(x)


def test_an_input_that_reaches_f_by_another_way_is_found():
    report = verify(Uses().double(), images())
    assert found(report, "gradient", "input 0"), report


@pytest.mark.parametrize("wrap", [Functional, Replicated])
def test_weights_that_are_results_are_found(wrap):
    """A functional call and a replica: the gradient of the weights that were used goes nowhere."""
    report = verify(wrap(in_naive(conv(4))).double(), images())
    if is_sound(lambda: wrap(in_naive(conv(4))), images()):
        assert report
        return
    assert found(report, "missing gradient", "layers.1.f.weight"), report


class ReadsWeight(Naive):
    """Asks for the gradient of `f.weight`, which is no parameter once f is pruned."""

    def wanted(self, grads):
        return grads.wanted([self.f.weight, self.f.bias])


def test_rewritten_weights_are_found():
    f = nn.utils.prune.l1_unstructured(conv(4), "weight", amount=0.4)
    report = verify(InvertibleChain([ReadsWeight(f)]).double(), images())
    assert [(each.kind, each.module) for each in report.findings] == [("missing gradient", "layers.0.f.weight_orig")]
    assert report.gradients["layers.0.f.weight_orig"] == float("inf") and "missing" in str(report)
    assert report.gradients["layers.0.f.bias"] < 1e-9


def test_a_side_input_without_its_gradient_is_found():
    report = verify(in_naive(Conditioned(4)), images(), values(4, 3))
    assert [(each.kind, each.module) for each in report.findings] == [("missing gradient", "input 1")]


class Forgets(Naive):
    """Passes the gradient on, but not all of it."""

    def backward_(self, y, dy, saved, grads):
        x, dx = super().backward_(y, dy, saved, grads)
        return x, dy if self.training else dx


def test_a_wrong_gradient_is_found_below_the_layer_that_gives_it():
    report = verify(InvertibleChain([CouplingConv2d(CHANNELS), Forgets(conv(4))]).double(), images())
    assert kinds(report) == {"gradient"}
    assert {each.module.split(".")[1] for each in report.findings if each.module != "input 0"} == {"0"}


# ---- kind F: what cannot be right ----------------------------------------------------------------


class Wrong(OwnCoupling):
    def inverse(self, y, saved=None):
        y1, y2 = y.chunk(2, dim=1)
        return torch.cat([y1 + self.f(y2), y2], dim=1)


def test_a_wrong_inverse_is_blamed_and_none_of_those_before_it():
    layers = [CouplingConv2d(CHANNELS), CouplingConv2d(CHANNELS), Wrong(conv(4)), InvertibleLeakyReLU(0.5)]
    report = verify(InvertibleChain(layers).double(), images())
    rebuild = [each for each in report.findings if each.kind == "rebuild"]
    assert [each.module for each in rebuild] == ["layers.2"] and "Wrong" in rebuild[0].text
    assert report.layers["layers.3"] < 1e-12 < 0.01 < report.layers["layers.2"]
    assert found(report, "gradient", "layers.1")


def test_a_wrong_inverse_deep_inside_is_blamed_in_its_own_chain():
    inner = InvertibleChain([CouplingConv2d(4), Wrong(conv(2)), CouplingConv2d(4)])
    model = nn.Sequential(conv(CHANNELS), InvertibleChain([AdditiveCoupling(CHANNELS, inner, nn.Tanh())])).double()
    report = verify(model, images())
    assert next(each.module for each in report.findings if each.kind == "rebuild") == "1.layers.0.f.layers.1", report


def test_a_function_that_mixes_samples_in_pieces_is_placed():
    class Mixes(nn.Module):
        def forward(self, x):
            return torch.tanh(x - x.mean(0, keepdim=True))

    middle = AdditiveCoupling(CHANNELS, Mixes(), conv(4), per_sample=True)
    chain = InvertibleChain([CouplingConv2d(CHANNELS), middle, CouplingConv2d(CHANNELS)]).double()
    assert verify(chain, images()), "the batch is one piece"
    middle.piece_bytes = 1
    report = verify(chain, images())
    assert found(report, "output", "layers.1"), report


class Unlike(Naive):
    """Its lean form passes channels by that its forward uses."""

    def forward_(self, x):
        with torch.no_grad():
            y = self.forward(x)
            y[:, 0] = x[:, 0]
            return y, None


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_layer_that_computes_another_function_in_place_is_placed(position):
    layers = [CouplingConv2d(CHANNELS) for _ in range(3)]
    layers[position] = Unlike(conv(4))
    report = verify(nn.Sequential(nn.Tanh(), InvertibleChain(layers)).double(), images())
    assert found(report, "output", f"1.layers.{position}"), report


REFUSED = {
    "channels": (lambda: AdditiveCoupling(4, nn.Tanh(), nn.Tanh()), (4, 6, 4, 4)),
    "result": (lambda: AdditiveCoupling(CHANNELS, nn.Conv2d(4, 2, 1), nn.Tanh()), (4, 8, 4, 4)),
    "pooling": (ChannelPooling, (4, 8, 3, 4)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_both_modes_refuse_is_one_finding_with_its_place(kind):
    make, shape = REFUSED[kind]
    report = verify(nn.Sequential(conv(shape[1]), InvertibleChain([make()])).double(), values(*shape))
    assert [(each.kind, each.module.startswith("1.layers.0")) for each in report.findings] == [("error", True)], report
    assert report.store.seconds is None and report.invert.peak_bytes is None and "-" in str(report)


def test_what_only_invert_refuses_is_a_finding():
    """A reentrant checkpoint in F: torch's own autograd.grad refuses it, too."""

    class Reentrant(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv = conv(channels)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.conv, x, use_reentrant=True)

    with pytest.warns():
        report = verify(ANY.chain(Reentrant).double(), images())
    assert "error" in kinds(report) and "use_reentrant=False" in str(report)


# ---- sound models --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LAYERS, ids=ids(LAYERS))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_every_layer_is_sound(case, training):
    seed(0)
    report = verify(InvertibleChain([case.make()]).double().train(training), values(*case.shape))
    assert report, report
    assert max([*report.layers.values(), *report.gradients.values()]) < 1e-9


@pytest.mark.parametrize("kind", ["dropout", "all", "counter", "spectral-norm", "running-maximum"])
@pytest.mark.parametrize("holder", [*HOLDERS, NESTED], ids=lambda holder: holder.name)
def test_what_the_engine_restores_is_sound(holder, kind):
    seed(0)
    assert verify(holder.chain((RANDOM | STATEFUL)[kind]).double(), images())


@pytest.mark.parametrize("case", ARCHS, ids=lambda case: case.arch)
def test_every_architecture_is_sound_in_float32(case):
    seed(0)
    model = build_model(compose(f"arch={case.arch}", *case.small), 5, 16)
    x, labels = torch.randn(4, 3, 16, 16), torch.arange(4)
    if not case.reversible:
        with pytest.raises(RevtrainError, match="InvertibleChain"):
            verify(model, x)
        return
    report = verify(model, x, loss=lambda y: F.cross_entropy(y, labels))
    assert report, report


def test_side_inputs_and_results_of_several_tensors():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.chain = PRENORM.chain(Conditioned)

        def forward(self, x, sides):
            y = self.chain(x, sides["context"])
            return {"y": y, "mean": [y.mean(), sides["count"]]}

    report = verify(Model().double(), images(), {"context": values(4, 3), "count": torch.tensor(3)})
    assert report and {"input 0", "input 1"} <= set(report.gradients), report


def test_a_layer_that_stands_in_a_chain_twice_and_a_chain_that_is_called_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            layer = CouplingConv2d(CHANNELS)
            self.chain = InvertibleChain([layer, InvertibleBatchNorm2d(CHANNELS), layer])

        def forward(self, x):
            return self.chain(self.chain(x))

    assert verify(Twice().double(), images())


def test_a_lazy_model_and_a_model_under_autocast():
    lazy = InvertibleChain([AdditiveCoupling(CHANNELS, nn.LazyConv2d(4, 1), nn.LazyConv2d(4, 1))])
    assert verify(lazy, images().float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        report = verify(ANY.chain(conv), images().float())
    assert report and report.tolerance == 0.2


def test_gradients_that_are_zero_but_for_rounding_are_no_fault():
    """The bias in front of a batch norm: both are noise."""
    f = nn.Sequential(conv(4), nn.BatchNorm2d(4), nn.GELU(), conv(4))
    report = verify(InvertibleChain([AdditiveCoupling(CHANNELS, f, conv(4))]).double(), images())
    assert report and report.gradients["layers.0.f.0.bias"] < 1e-9


def test_numbers_that_are_not_finite_are_never_passed_over():
    chain = InvertibleChain([CouplingConv2d(CHANNELS)]).double()
    x = images()
    x[0, 0, 0, 0] = float("nan")
    report = verify(chain, x)
    assert not report and kinds(report) <= {"numbers", "error"}


# ---- the report, and what is left behind ---------------------------------------------------------


def test_depth_shows_in_the_memory_of_store_alone():
    body = lambda: nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 4, 3, padding=1))  # noqa: E731
    peaks = {}
    for depth in (4, 12):
        chain = InvertibleChain([AdditiveCoupling(CHANNELS, body(), body()) for _ in range(depth)])
        report = verify(chain, torch.randn(8, CHANNELS, 16, 16))
        weights = sum(p.numel() * p.element_size() for p in chain.parameters())
        peaks[depth] = (report.store.peak_bytes - weights, report.invert.peak_bytes - weights)
        assert report.store.seconds > 0 and report.invert.seconds > 0
    assert peaks[12][0] > 2.5 * peaks[4][0]
    assert peaks[12][1] < 1.1 * peaks[4][1] < 0.5 * peaks[4][0]


def test_the_table_names_every_layer_and_both_costs():
    text = str(verify(INSIDE.chain(conv).double(), images()))
    assert text.startswith("invert is store, to rounding\n")
    for words in (
        "layers.0 InvertibleLeakyReLU",
        "layers.1.layers.0 AdditiveCoupling",
        "store",
        "time",
        "memory",
        "MiB",
    ):
        assert words in text
    deep = str(verify(InvertibleChain([CouplingConv2d(2, 1) for _ in range(30)]).double(), images(channels=2)))
    assert "... and 14 layers" in deep and len(deep.splitlines()) < 30


def test_many_findings_of_one_kind_are_cut_short():
    layers = [*(CouplingConv2d(CHANNELS) for _ in range(6)), Wrong(conv(4))]
    text = str(verify(InvertibleChain(layers).double(), images()))
    assert "more of the kind: gradient" in text and len(text.splitlines()) < 30


def state_of(model: nn.Module) -> list:
    state = [(name, value.clone()) for name, value in model.state_dict().items()]
    attributes = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in model.modules()]
    return [state, attributes, torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]


def test_the_model_is_left_as_it_was():
    seed(0)
    parts = [ANY.chain(RANDOM["all"]), INSIDE.chain(STATEFUL["counter"]), PRENORM.chain(conv)]
    model = nn.Sequential(*parts, ANY.chain(NORMS["batch-norm"], backward="store")).double()
    loss = model(images()).sum()
    loss.backward()
    parameters, gradients = list(model.parameters()), [p.grad.clone() for p in model.parameters()]
    model[0].eval()
    faulty = nn.Sequential(*model[:2], in_naive(Drifts(4)))
    before = state_of(model)
    assert verify(model, images()) and not verify(faulty, images())
    after = state_of(model)
    for (name, a), (again, b) in zip(before[0], after[0], strict=True):
        assert name == again and torch.equal(a, b), name
    assert before[1] == after[1]
    assert torch.equal(before[2], after[2]) and before[3:] == after[3:]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_the_model_is_left_as_it_was_when_it_fails():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError("out of luck")

    chain = ANY.chain(NORMS["batch-norm"]).double()
    chain.layers.append(InvertibleLeakyReLU(0.5))
    model = nn.Sequential(chain, Fails())
    before = state_of(model)
    with pytest.raises(ValueError, match="out of luck"):
        verify(model, images())
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(before[0], state_of(model)[0], strict=True))


def test_inputs_are_neither_changed_nor_given_a_gradient():
    x = images().requires_grad_()
    before = x.detach().clone()
    verify(nn.Sequential(nn.ReLU(inplace=True), ANY.chain(conv)).double(), x)
    assert torch.equal(x, before) and x.grad is None


def test_a_loss_of_ones_own_and_one_that_depends_on_nothing():
    chain = ANY.chain(conv).double()
    assert verify(chain, images(), loss=lambda y: y.square().mean())
    report = verify(chain, images(), loss=lambda y: torch.ones(()))
    assert "depends on no parameter" in str(report)


def test_a_model_without_a_chain_is_refused():
    with pytest.raises(RevtrainError, match="without an InvertibleChain"):
        verify(nn.Linear(2, 2), torch.ones(2))


def test_the_default_loss_weighs_no_two_values_alike():
    y = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    linear_loss([y, torch.arange(3)]).backward()
    assert y.grad.unique().numel() == 50


def test_prenorm_and_the_public_name():
    assert revtrain.verify is verify
    assert verify(
        InvertibleChain([AdditiveCoupling(CHANNELS, PreNorm(4, conv(4)), PreNorm(4, conv(4)))]), images().float()
    )
