"""The number formats of a residual stream: exact where they promise it, and never silent where they cannot keep it."""

import pytest
import torch
from cases import compose, prenorm
from torch import nn

from revtrain.core.chain import InvertibleChain, observe
from revtrain.core.state_format import STATE_FORMATS, StateFormat
from revtrain.errors import RevtrainError
from revtrain.layers import AdditiveCoupling, ChannelPooling, InvertibleLeakyReLU
from revtrain.models import build_model
from revtrain.numerics.snr import probe_snr, stream_overflows

INTEGERS = ["int32", "int16"]
CHUNK = 2**20


def values(scale=1.0, dtype=torch.float32):
    return scale * torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", [*INTEGERS, "float32"])
def test_values_are_rounded_to_the_grid_and_read_back(name):
    stream = StateFormat(name)
    state = stream.encode(stream.snap(values()), CHUNK)
    read = stream.decode(state)
    assert read.dtype == torch.float32
    assert (read - values()).abs().max() <= 2.0 ** -(stream.bits + 1)
    assert torch.equal(read * 2**stream.bits, (read * 2**stream.bits).round())


@pytest.mark.parametrize(("name", "element_bytes"), [("float32", 4), ("int32", 4), ("int16", 2)])
def test_a_state_takes_the_bytes_of_its_format(name, element_bytes):
    assert StateFormat(name).encode(values(), CHUNK).element_size() == element_bytes


@pytest.mark.parametrize("name", INTEGERS)
def test_sums_are_undone_to_the_last_bit_even_where_they_leave_the_range(name):
    stream = StateFormat(name)
    start = stream.encode(values(), CHUNK)
    state, lost = start.clone(), torch.zeros((), dtype=torch.int64)
    residuals = [values(scale) for scale in (1.0, 0.7 * stream.range, 3.0, 0.9 * stream.range)]
    for residual in residuals:
        stream.add_(state, residual, 1.0, CHUNK, lost)
    assert lost > 0
    for residual in reversed(residuals):
        stream.add_(state, residual, -1.0, CHUNK)
    assert torch.equal(state, start)


@pytest.mark.parametrize("name", INTEGERS)
def test_what_leaves_the_range_is_counted_one_by_one(name):
    stream = StateFormat(name)
    inside, outside = stream.range - 1, stream.range + 1
    state = torch.zeros(1, 1, 1, 6, dtype=stream.dtype)
    residual = torch.tensor([inside, -inside, outside, -outside, float("nan"), float("inf")]).view(1, 1, 1, 6)
    lost = torch.zeros((), dtype=torch.int64)
    stream.add_(state, residual, 1.0, CHUNK, lost)
    assert int(lost) == 4
    assert stream.decode(state)[..., :2].flatten().tolist() == [inside, -inside]
    stream.encode(residual, CHUNK, lost.zero_())
    assert int(lost) == 4


def chain_of(name, blocks=3, scale=0.3):
    state_format = StateFormat(name)
    torch.manual_seed(0)
    layers = [
        AdditiveCoupling(4, prenorm(2), prenorm(2), scale=scale, state_format=state_format) for _ in range(blocks)
    ]
    return InvertibleChain([*layers, ChannelPooling()], state_format=state_format)


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_stream_is_the_same_function_in_both_modes(name):
    outputs, gradients = [], []
    for mode in ("invert", "store"):
        chain = chain_of(name)
        chain.backward_mode = mode
        x = values().requires_grad_()
        y = chain(x)
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append([x.grad, *(p.grad for p in chain.parameters())])
    torch.testing.assert_close(*outputs)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["float32", "int16"])
def test_overflows_are_counted_where_they_happen(name):
    chain = chain_of(name)
    chain(values())
    assert stream_overflows(nn.Sequential(chain)) == {}
    with torch.no_grad():
        chain.layers[1].f.body[3].weight.mul_(1e4)
    chain(values()).sum().backward()  # the way back counts nothing twice
    counts = stream_overflows(nn.Sequential(chain))
    assert next(iter(counts)) == "0/01_AdditiveCoupling"
    once = counts["0/01_AdditiveCoupling"]
    chain(values(1e3))
    after = stream_overflows(nn.Sequential(chain))
    assert after["0 (input)"] > 0
    assert after["0/01_AdditiveCoupling"] > once


def test_a_floating_point_stream_is_exact_up_to_its_range_and_no_further():
    stream = StateFormat("float32")
    below, beyond = torch.tensor([stream.range - 1.0]), torch.tensor([2 * stream.range])
    step = torch.tensor([2.0**-stream.bits])
    for state, exact in ((below, True), (beyond, False)):
        before = state.clone()
        lost = torch.zeros((), dtype=torch.int64)
        stream.add_(state, step, 1.0, CHUNK, lost)
        assert bool(state - before == step) is exact
        assert int(lost) == (not exact)
    lost.zero_()
    stream.add_(torch.zeros(3), torch.tensor([float("nan"), float("-inf"), 0.0]), 1.0, CHUNK, lost)
    assert int(lost) == 2


@pytest.mark.parametrize("arch", ["revnet", "irevnet", "hybrid", "chunked"])
@pytest.mark.parametrize("name", ["float32", *INTEGERS])
def test_a_hundred_blocks_are_rebuilt_to_the_last_bit_after_a_training_step(arch, name):
    """Inputs of every block, through the real backward pass, before and after a step of SGD."""
    width, depth = (8, 100 if name == "int16" else 25) if arch == "hybrid" else (4, 100)
    cfg = compose(
        f"arch={arch}", f"width={width}", f"depth={depth}", "pooling=[]", f"stream={name}", "residual_scale=0.2"
    )
    model = build_model(cfg, image_size=8)
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        inputs = {k: v for k, v in probe_snr(model, images, labels).items() if k.count("/") == 1 or arch == "revnet"}
        blocks = {k: v for k, v in inputs.items() if k.rpartition("/")[2].endswith("AdditiveCoupling")}
        assert len(blocks) == depth
        assert set(blocks.values()) == {320.0}
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


class Equal:
    """Whether what the backward pass rebuilds is, bit by bit, what went into every coupling of a trunk."""

    def __init__(self):
        self.true, self.compared, self.unequal = {}, 0, 0

    def on_input(self, layer, x):
        if isinstance(layer, AdditiveCoupling) and layer.residual_sum.state_format.bits is not None:
            self.true[layer] = x.detach().clone()

    def on_reconstructed(self, layer, x):
        if layer in self.true:
            self.compared += 1
            self.unequal += not torch.equal(self.true.pop(layer), x.detach())


def extreme_images(stream):
    """Images that are ordinary, nothing, constant, tiny, alternating and large (as large as a float grid can hold)."""
    torch.manual_seed(1)
    ordinary = torch.randn(4, 3, 8, 8)
    sign = torch.tensor([1.0, -1.0]).repeat(4, 3, 8, 4)
    large = 60.0 if stream == "float32" else 1e6
    return {
        "ordinary": ordinary,
        "zeros": torch.zeros_like(ordinary),
        "constant": torch.full_like(ordinary, 2.7),
        "tiny": ordinary * 1e-40,
        "alternating": 3.0 * sign,
        "large": ordinary * large,
    }


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["revnet", "irevnet", "hybrid", "chunked"])
@pytest.mark.parametrize("stream", ["float32", *INTEGERS])
def test_a_hundred_blocks_are_rebuilt_to_the_last_bit_after_a_hundred_steps(arch, stream):
    """In float32 and bfloat16 convolutions, on one and on two threads, on ordinary and on extreme images."""
    width = 8 if arch == "hybrid" else 4
    cfg = compose(f"arch={arch}", f"width={width}", "depth=100", "pooling=[]", f"stream={stream}", "residual_scale=0.2")
    torch.manual_seed(0)
    model = build_model(cfg, 10, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for step in range(100):
        images = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(step % 4))
        loss = nn.functional.cross_entropy(model(images), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]), "the steps train"
    trained, threads = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for kind, images in extreme_images(stream).items():
                for dtype in (torch.float32, torch.bfloat16):
                    equal = Equal()
                    model.load_state_dict(trained)
                    for name, buffer in model.named_buffers():
                        if name.endswith("overflows"):
                            buffer.zero_()
                    with observe(model, equal), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                        nn.functional.cross_entropy(model(images).float(), torch.arange(4)).backward()
                    assert (equal.compared, equal.unequal) == (100, 0), (kind, dtype, count)
                    overflows = stream_overflows(model)
                    if stream != "int16":  # whose range of 128 single values leave after so many blocks
                        assert not overflows or kind == "large", (kind, dtype, overflows)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_streams_hold_states_and_gradients_in_16_bit(precision):
    model = build_model(compose("arch=chunked", "width=4", "depth=3", f"precision={precision}"))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    seen = set()

    class Recorder:
        def on_input(self, layer, x):
            seen.add(x.dtype)

        def on_reconstructed(self, layer, x):
            seen.add(x.dtype)

    model.trunk.observer = Recorder()
    stem = {}
    model.stem.register_forward_hook(
        lambda module, images, y: y.register_hook(lambda dy: stem.update(dtype=dy.dtype)) and None
    )
    with torch.autocast("cpu", dtype):
        loss = model(torch.randn(4, 3, 32, 32).to(dtype)).float().square().sum()
    loss.backward()
    assert seen == {torch.int16}
    assert stem["dtype"] == dtype
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


def test_a_plain_stream_stays_in_float32_under_autocast():
    model = build_model(compose("arch=layerwise", "width=4", "depth=3", "precision=bf16"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model.trunk.encode(model.stem(torch.randn(2, 3, 32, 32))).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "given", "expected"),
    [
        (lambda: StateFormat("int8"), "int8", ", ".join(STATE_FORMATS)),
        (lambda: StateFormat("int16", 15), "grid_bits=15", "1 to 14"),
        (lambda: StateFormat("plain", 8), "grid_bits=8", "null"),
        (
            lambda: InvertibleChain([InvertibleLeakyReLU()], state_format=StateFormat("int16")),
            "InvertibleLeakyReLU",
            "float32",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, given, expected):
    with pytest.raises(RevtrainError) as error:
        make()
    assert given in str(error.value)
    assert expected in str(error.value)
