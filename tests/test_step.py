"""The step of training as one piece of work on the device: captured and replayed, fed from there or from the host,
never waiting. On the CPU stand-ins take the place of CUDA's graph."""

from __future__ import annotations

import logging
import random
from typing import ClassVar

import pytest
import torch
from cases import ARCHS, compose, ids
from conftest import TINY, assert_same_state, read_checkpoint, read_metrics
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import revtrain.data
import revtrain.models
import revtrain.training.step
from revtrain.config import read
from revtrain.core.chain import InvertibleChain
from revtrain.kernels import cpu_kernels
from revtrain.kernels.operator import planning_for
from revtrain.layers import AdditiveCoupling
from revtrain.machine import graph as graphs
from revtrain.memory.live import LiveStorages
from revtrain.planning.predict import StepPredictor
from revtrain.step.feed import FromHost, OnDevice
from revtrain.training import run as train
from revtrain.training.evaluate import batches_at_once, evaluate
from revtrain.training.step import WARM_UP, HostState, Step

CPU = torch.device("cpu")
RECIPE = ("ema_decay=0.6", "data.augment.alternate_flip=true", "label_smoothing=0.1")
LONG = ("data.train_images=84", "data.test_images=10", "epochs=2", "probe.every=0")  # 5 steps an epoch


@pytest.fixture(autouse=True)
def only_operations_of_torch(monkeypatch):
    """A tape sees these; the passes compiled for a CPU, which have no part in a graph, round sums in another way."""
    monkeypatch.setattr(cpu_kernels, "library", lambda: None)


# ---- stand-ins for CUDA's graph ---------------------------------------------------------------------


class Again:
    """Remembers the work and does it again."""

    made: ClassVar[list[Again]] = []

    def __init__(self, device):
        self.warmed = self.captures = self.replays = 0
        self.work = None
        self.made.append(self)

    def warm_up(self, work):
        self.warmed += 1
        work()

    def capture(self, work):
        self.captures, self.work = self.captures + 1, work

    def replay(self):
        self.replays += 1
        self.work()

    def release(self):
        self.work = None


class Tape(TorchDispatchMode):
    """What a graph does: the operations of one run with the tensors that they read and wrote. Python is left out.

    CUDA's records without doing; here the tensors that the run wrote get back what they held.
    """

    def __init__(self, device):
        super().__init__()
        self.entries, self.captures, self.replays = [], 0, 0

    def warm_up(self, work):
        work()

    def capture(self, work):
        self.entries, self.captures = [], self.captures + 1
        self.before = {}
        with self:
            work()
        for tensor, values in self.before.values():
            tensor.copy_(values)

    def release(self):
        self.entries = []

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, outputs in self.entries:
            again = tree_leaves(function(*args, **kwargs))
            for old, new in zip(outputs, again, strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket is torch.ops.aten._local_scalar_dense:
            raise RuntimeError("a value was asked for within a capture")
        plain = tree_map(lambda each: each.detach() if isinstance(each, Tensor) else each, (args, kwargs))
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(value):
                    whole = tensor.detach()
                    self.before.setdefault((whole.data_ptr(), whole.shape), (whole, whole.clone()))
        with torch.no_grad():
            result = function(*args, **kwargs)
        if function.overloadpacket is not torch.ops.aten.detach:
            self.entries.append((function, *plain, [each.detach() if isinstance(each, Tensor) else each
                                                    for each in tree_leaves(result)]))  # fmt: skip
        return result


@pytest.fixture
def again(monkeypatch):
    """Runs on the CPU use `Again`; those that were made."""
    monkeypatch.setattr(Again, "made", [])
    monkeypatch.setitem(graphs.GRAPHS, "cpu", Again)
    return Again.made


def run(folder, *overrides):
    return train.train(compose(*TINY, *LONG, *overrides), folder, list(overrides))


def dataset_of(config):
    return revtrain.data.load_data(config.data)


def step_of(*words, model=None, base=(*TINY, *LONG)):
    """A step of a small network on the CPU."""
    config = read(compose(*base, *words))
    dataset = dataset_of(config)
    torch.manual_seed(0)
    if model is None:
        images = revtrain.models.Images(len(dataset.classes), dataset.image_size)
        model = revtrain.models.build(config.network, images)
    return Step(model.train(), config, 16, dataset, CPU)


def batches(count):
    order = torch.randperm(84, generator=torch.Generator().manual_seed(1))
    return [order[start : start + 16] for start in range(0, 16 * count, 16)]


def losses_of(step, count=5):
    """Of steps with a rate that falls."""
    picked = [*batches(count), None]
    return [step(picked[k], 0.1 / (k + 1), picked[k + 1])[0].item() for k in range(count)]


# ---- captured and replayed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words", [(), ("precision=bf16", "arch=chunked"), ("accumulate=2", "clip_grad_norm=0.5"), RECIPE]
)
def test_a_run_from_the_graph_is_the_run_without(tmp_path, again, words):
    run(tmp_path / "graph", *words)
    assert [(each.warmed, each.captures, each.replays) for each in again] == [(WARM_UP, 1, 10 - WARM_UP)]
    run(tmp_path / "eager", "graph=off", *words)
    assert len(again) == 1
    one, other = (read_checkpoint(tmp_path / name) for name in ("graph", "eager"))
    for state in (one, other):
        del state["config"]
    assert_same_state(one, other)
    assert_same_state(*(read_metrics(tmp_path / name) for name in ("graph", "eager")))


def test_a_run_that_resumes_within_an_epoch_goes_on_from_a_graph_of_its_own(tmp_path, again, monkeypatch):
    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        draw, calls = revtrain.data.draw_augmentation, []

        def count(*args):
            calls.append(1)
            return draw(*args)

        patch.setattr(revtrain.data, "draw_augmentation", count)
        patch.setattr(train.sigterm, "asked", lambda: len(calls) >= 7)
        with pytest.raises(train.sigterm.Terminated):
            run(tmp_path / "stopped")
    assert read_checkpoint(tmp_path / "stopped")["partial"]["step"] == 2
    run(tmp_path / "resumed", f"resume={tmp_path / 'stopped'}")
    assert again[-1].captures == 0 and again[-1].warmed == 3  # three steps were left
    assert_same_state(*(read_checkpoint(tmp_path / name) for name in ("whole", "resumed")))


@pytest.fixture
def fused(monkeypatch):
    """The optimizer as on CUDA: one kernel, which reads the rate where it lies."""
    make = revtrain.training.step.make_optimizer

    def make_fused(model, training):
        optimizer = make(model, training)
        optimizer.defaults["fused"] = True
        for group in optimizer.param_groups:
            group["fused"] = True
        return optimizer

    monkeypatch.setattr(revtrain.training.step, "make_optimizer", make_fused)


@pytest.mark.parametrize(
    "words", [("precision=bf16",), ("clip_grad_norm=0.5",), ("max_gain=0.5", "accumulate=2"), RECIPE]
)
def test_operations_alone_are_the_step(fused, monkeypatch, words):
    """Rate, images, draws and labels are read where they lie: none is a number of Python's that a replay would keep."""
    eager = step_of(*words)
    expected = losses_of(eager)
    monkeypatch.setitem(graphs.GRAPHS, "cpu", Tape)
    taped = step_of(*words)
    assert losses_of(taped) == expected
    assert (taped.graph.captures, taped.graph.replays) == (1, 5 - WARM_UP)
    assert_same_state(eager.model.state_dict(), taped.model.state_dict())
    assert_same_state(eager.optimizer.state_dict(), taped.optimizer.state_dict())
    if eager.average is not None:
        assert_same_state(eager.average.state_dict(), taped.average.state_dict())


def test_a_released_graph_is_captured_anew(monkeypatch, fused):
    monkeypatch.setitem(graphs.GRAPHS, "cpu", Tape)
    monkeypatch.setattr(revtrain.training.step.devices, "reserved_bytes", lambda device: 100)
    step, expected = step_of(), losses_of(step_of("graph=off"))
    picked, found = batches(5), []
    for k in range(5):
        found.append(step(picked[k], 0.1 / (k + 1))[0].item())
        step.make_room(199 if k == 3 else 200)
        assert step.is_captured == (k >= WARM_UP and k != 3)
    assert found == expected and step.graph.captures == 2


class Odd(nn.Module):
    """A network with something that a graph cannot hold."""

    def __init__(self, what):
        super().__init__()
        self.conv, self.what, self.calls = nn.Conv2d(3, 10, 3), what, 0
        if what == "hook":
            self.conv.register_forward_hook(lambda *_: None)
        if what == "gradient hook":
            self.conv.weight.register_hook(lambda gradient: None)

    def forward(self, x):
        if self.what == "counts":
            self.calls += 1
        if self.what == "draws":
            x = x * random.random()
        y = self.conv(x).mean((2, 3))
        return y * y.abs().max().item() if self.what == "waits" else y


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("hook", "conv has a hook, which a replay would not call"),
        ("gradient hook", "conv has a hook"),
        ("counts", "calls changes with each step, in Python"),
        ("draws", "draws random numbers outside of the GPU"),
        ("waits", "RuntimeError: a value was asked for within a capture"),
    ],
)
def test_what_a_graph_cannot_hold_runs_as_it_is_and_is_told_once(monkeypatch, caplog, what, reason):
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(graphs.GRAPHS, "cpu", Tape)
    random.seed(0)
    expected = losses_of(step_of("graph=off", model=seeded(what)))
    assert not caplog.messages
    random.seed(0)
    step = step_of(model=seeded(what))
    assert losses_of(step) == expected and step.graph is None
    (message,) = caplog.messages
    assert message.startswith("graph      none: ") and reason in message


def seeded(what):
    torch.manual_seed(0)
    return Odd(what)


@pytest.mark.parametrize("case", ARCHS, ids=ids(ARCHS))
def test_nothing_stands_in_the_way_of_the_architectures(case):
    words = (f"arch={case.arch}", *case.small, "data.image_size=16", "data.train_images=32", "batch=16", "device=cpu")
    step = step_of(*words, base=())
    watched = HostState(step.model)
    step(torch.arange(16), 0.1)
    assert watched.obstacle() is None


def test_loss_scaling_goes_on_after_a_capture_that_failed(monkeypatch):
    class Failing(Again):
        def capture(self, work):
            step.scaler.scale(torch.ones(()))
            step.scaler._per_optimizer_states[id(step.optimizer)]["stage"] = None  # half a step
            raise RuntimeError("no capture here")

    expected = losses_of(step_of("graph=off", "precision=fp16"))
    monkeypatch.setitem(graphs.GRAPHS, "cpu", Failing)
    step = step_of("precision=fp16")
    assert losses_of(step) == expected


# ---- nothing waits ----------------------------------------------------------------------------------

WAITS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "repeat_interleave",
}
ASKED = [
    *((torch, name) for name in ("get_rng_state", "set_rng_state", "nonzero")),
    *((torch.cuda, name) for name in ("get_rng_state", "set_rng_state", "synchronize", "current_stream")),
    *((Tensor, name) for name in ("item", "tolist", "numpy", "nonzero", "cpu", "__bool__", "__int__", "__float__")),
    *((random, name) for name in ("getstate", "setstate")),
]  # fmt: skip


class Waits(TorchDispatchMode):
    """Operations whose result Python has to know: on a GPU it would wait for them."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in WAITS:
            self.found.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def waits_of_a_step(monkeypatch, config, build):
    """What a step as on CUDA asks for that it would have to wait for, on fake tensors in the place of a GPU's."""
    found = []
    with FakeTensorMode(), planning_for("cuda"):
        split = revtrain.data.Split(torch.empty(8, 3, 16, 16, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
        dataset = revtrain.data.Dataset(split, split, tuple("0123456789"), torch.zeros(3), torch.ones(3))
        step = Step(build().train(), config, 4, dataset, CPU)
        with monkeypatch.context() as patch, Waits(found):
            for owner, name in ASKED:
                patch.setattr(owner, name, _noting(found, name, getattr(owner, name)), raising=False)
            try:
                step.work()
            except DataDependentOutputException as error:
                found.append(str(error))
    return found


def _noting(found, name, function):
    def noted(*args, **kwargs):
        found.append(name)
        return function(*args, **kwargs)

    return noted


@pytest.mark.parametrize("case", ARCHS, ids=ids(ARCHS))
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_step_waits_for_nothing_and_reads_no_generator(monkeypatch, case, precision):
    words = (f"arch={case.arch}", *case.small, f"precision={precision}", "clip_grad_norm=1", "batch=4", "ema_decay=0.9")
    config = read(compose(*words, "data.image_size=16"))
    images = revtrain.models.Images(10, 16)
    assert waits_of_a_step(monkeypatch, config, lambda: revtrain.models.build(config.network, images)) == []


def drawing():
    dropout = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Dropout(0.5))
    chain = InvertibleChain([AdditiveCoupling(4, dropout, nn.Conv2d(2, 2, 1))])
    return nn.Sequential(nn.Conv2d(3, 4, 1), chain, nn.Conv2d(4, 10, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(("build", "what"), [(lambda: Odd("waits"), "item"), (drawing, "get_rng_state")])
def test_what_waits_is_found(monkeypatch, build, what):
    assert what in waits_of_a_step(monkeypatch, read(compose("batch=4")), build)


# ---- images -----------------------------------------------------------------------------------------


def test_images_come_from_the_host_as_from_the_device(monkeypatch):
    on_device = step_of("accumulate=2")
    assert isinstance(on_device.feed, OnDevice)
    monkeypatch.setattr(revtrain.training.step, "make_feed", lambda split, batch, *_: FromHost(split, batch, CPU))
    from_host = step_of("accumulate=2")
    assert losses_of(from_host) == losses_of(on_device)
    first, second, third = batches(3)
    found = [(step(first, 0.1, second)[0].item(), step(third, 0.1)[0].item()) for step in (from_host, on_device)]
    assert found[0] == found[1]  # also where another batch follows than was announced


# ---- evaluation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [2, 3, 9])
def test_evaluation_at_a_batch_of_its_own_gives_the_same_figures(at_once):
    step, split = step_of(), revtrain.data.load_data(read(compose(*TINY, "data.test_images=50")).data).test
    prepare = lambda images: revtrain.data.normalise(images, step.mean, step.std)  # noqa: E731
    taken = []
    step.model.register_forward_pre_hook(lambda module, inputs: taken.append(len(inputs[0])))
    loss, accuracy = evaluate(step.model, split, 8, prepare, "fp32", CPU)
    assert taken == [8] * 6 + [2]
    taken.clear()
    found = evaluate(step.model, split, 8, prepare, "fp32", CPU, at_once=at_once)
    assert found == (pytest.approx(loss, rel=1e-6), accuracy)
    assert taken[0] == min(50, 8 * at_once) and sum(taken) == 50


def test_as_many_batches_as_a_step_has_memory_for():
    line = lambda images: 100 + 5 * images  # noqa: E731
    assert [batches_at_once(line, 10, 1000, peak) for peak in (10, 150, 199, 200, 251, 10**6)] == [1, 1, 1, 2, 3, 8]
    assert batches_at_once(line, 10, 25, 10**6) == 3


def test_the_memory_of_an_evaluation_is_that_of_one(monkeypatch):
    words = ("arch=resnet18", "width=4", "device=cpu")
    predict = StepPredictor(read(compose(*words)), 10, 16)
    live, images = LiveStorages(), 6
    with live:
        model = revtrain.models.build_model(compose(*words), 10, 16).eval()
        momentum = [torch.zeros_like(each) for each in model.parameters()]
        live.reset_peak()
        with torch.no_grad():
            model(torch.empty(images, 3, 16, 16).normal_())
    assert predict.evaluation(images) == pytest.approx(live.peak_bytes, rel=0.01) and momentum
    assert predict(images).peak > predict.evaluation(images)  # and the step is as it was
