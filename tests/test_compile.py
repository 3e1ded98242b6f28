"""torch.compile of a model with chains: the gradients of the eager model, and one break of the graph a chain."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cases import LAYERS, inner_chain, plain, prenorm
from promise import CHANNELS, assert_same, images, run
from torch import nn

from revtrain import AdditiveCoupling, InvertibleBatchNorm2d, InvertibleChain, InvertibleLeakyReLU, verify

# what the compiler itself says while it looks at tensors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
dynamo = pytest.importorskip("torch._dynamo")


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    dynamo.reset()
    yield
    dynamo.reset()


class Shifted(nn.Module):
    """F with a side input (B, 3)."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(channels, channels, 3, padding=1), nn.Linear(3, channels)

    def forward(self, x, context):
        return torch.tanh(self.conv(x)) + self.linear(context)[:, :, None, None]


class Model(nn.Module):
    """Stem, two chains, head: batch norms, dropout, pieces, a nested chain and a side input."""

    def __init__(self):
        super().__init__()
        half = CHANNELS // 2
        self.stem = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.first = InvertibleChain(
            [
                AdditiveCoupling(CHANNELS, plain(half, 0.3), Shifted(half)),
                InvertibleBatchNorm2d(CHANNELS),
                InvertibleLeakyReLU(0.3),
            ]
        )
        self.second = InvertibleChain([AdditiveCoupling(CHANNELS, prenorm(half, 0.3), inner_chain(half))])
        self.head = nn.Linear(CHANNELS, 5)

    def forward(self, x, context):
        x = self.first(torch.tanh(self.stem(x)), context)
        return self.head(torch.relu(self.second(x * 2)).mean((2, 3)))


def compiled(make):
    return lambda: torch.compile(make(), backend="aot_eager")


def names_of(make):
    """What a step leaves behind by the names of the model itself."""
    left = run(make, images(), images()[:, :3, 0, 0], backward="invert")
    return {name.replace("_orig_mod.", ""): value for name, value in left.items()}


def test_a_compiled_model_has_the_gradients_of_the_eager_one():
    assert_same(names_of(compiled(Model)), names_of(Model))


def test_one_break_of_the_graph_a_chain():
    torch.manual_seed(0)
    model = Model().double()
    explained = dynamo.explain(model)(images(), images()[:, :3, 0, 0])
    assert explained.graph_break_count == 2, explained.break_reasons
    assert explained.graph_count == 3, "stem, between, head"


def test_no_break_in_store():
    model = Model().double()
    for chain in (model.first, model.second):
        chain.backward_mode = "store"
    explained = dynamo.explain(model.first)(images(), images()[:, :3, 0, 0])
    assert explained.graph_break_count == 0, explained.break_reasons


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", [each for each in LAYERS if each.name in ("coupling-plain", "chain-of-everything")])
def test_a_compiled_chain_of_a_layer(case, training):
    x = torch.randn(case.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    make = lambda: InvertibleChain([case.make()]).train(training)  # noqa: E731
    left = run(compiled(make), x, backward="invert")
    assert_same(
        {name.replace("_orig_mod.", ""): value for name, value in left.items()}, run(make, x, backward="invert")
    )


def test_functions_that_are_compiled_themselves():
    """What torch.compile(model) leaves alone: F and G as modules that are compiled."""

    def make():
        f, g = (torch.compile(plain(CHANNELS // 2), backend="aot_eager") for _ in range(2))
        return InvertibleChain([AdditiveCoupling(CHANNELS, f, g)])

    assert verify(make().double(), images())


def test_several_steps_do_not_compile_again():
    torch.manual_seed(0)
    model = torch.compile(Model().double(), backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    compilations = []
    for _ in range(4):
        optimizer.zero_grad()
        model(images(), images()[:, :3, 0, 0]).square().sum().backward()
        optimizer.step()
        compilations.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert compilations[1] == compilations[-1], compilations


def test_a_chain_needs_no_compiler():
    """Which takes seconds to import."""
    code = (
        "import sys, torch\nfrom torch import nn\nfrom revtrain import AdditiveCoupling, InvertibleChain\n"
        "chain = InvertibleChain([AdditiveCoupling(4, nn.Tanh(), nn.Linear(2, 2))])\n"
        "chain(torch.randn(2, 4)).sum().backward()\nassert 'torch._dynamo' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
