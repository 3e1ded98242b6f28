"""Every architecture: built from the config, both backward modes alike, memory flat over depth, clear refusals."""

import ast
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cases import ARCHS, INVERTIBLE_TRUNKS, REVERSIBLE, compose, ids
from torch import nn

import revtrain.conf
from revtrain.core.chain import InvertibleChain
from revtrain.errors import RevtrainError
from revtrain.layers import AdditiveCoupling
from revtrain.machine.device import place
from revtrain.models import analytic_memory, architectures, build_model, for_task, spread_depth
from revtrain.models.common import StridedBlock
from revtrain.planning.plan import plan
from revtrain.planning.predict import StepPredictor, predict_step_memory

ROOT = Path(revtrain.__file__).parent


def small(case, *overrides):
    return compose(f"arch={case.arch}", *case.small, *overrides)


def batch(size=8, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)
    return images, torch.randint(10, (size,), generator=generator)


def build_twins(cfg, dtype=torch.float64, seed=0):
    """The same weights under backward=invert and backward=store."""
    torch.manual_seed(seed)
    inverting = build_model(cfg).to(dtype)
    cfg.backward = "store"
    storing = build_model(cfg).to(dtype)
    storing.load_state_dict(inverting.state_dict())
    return inverting, storing


def relative_errors(a, b):
    return {
        name: ((p.grad - q.grad).norm() / q.grad.norm()).item()
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True)
    }


def train_step(model, dtype, size=8):
    images, labels = batch(size, dtype)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    return loss.detach()


def test_the_list_of_architectures_is_complete():
    assert sorted(case.arch for case in ARCHS) == for_task("classify") == sorted(for_task("classify"))
    files = {path.stem for path in (ROOT / "models").glob("*.py")} - {"__init__", "common"}
    assert set(architectures()) == files
    assert files <= {path.stem for path in Path(revtrain.conf.__file__).parent.glob("arch/*.yaml")}


def words_of_code(path):
    """(line, identifier or string) of a file; docstrings and comments are left out."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        for _, value in ast.iter_fields(node):  # names are plain strings in the tree, whatever the kind of node
            for word in value if isinstance(value, list) else [value]:
                if isinstance(word, str):
                    yield getattr(node, "lineno", 0), word


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_but_its_own_names_an_architecture(path):
    """Architectures are found: by the registry, by their traits, by what their files offer."""
    others = [name for name in architectures() if path != ROOT / "models" / f"{name}.py"]
    name = re.compile(rf"\b({'|'.join(others)})\b")
    found = [f"{path.name}:{line}: {word!r}" for line, word in words_of_code(path) if name.search(word)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("case", ARCHS, ids=ids(ARCHS))
def test_every_parameter_receives_a_gradient(case):
    model = build_model(small(case))
    images, labels = batch()
    logits = model(images)
    assert logits.shape == (8, 10)
    F.cross_entropy(logits, labels).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("case", REVERSIBLE, ids=ids(REVERSIBLE))
def test_invert_equals_store_at_the_default_size_in_float64(case):
    """At most 1e-9 per parameter at the default depth."""
    width = ["width=16"] if case.arch in ("irevnet", "revnet") else []  # 80 M parameters would only cost time
    inverting, storing = build_twins(compose(f"arch={case.arch}", *width))
    losses = [train_step(model, torch.float64, size=4) for model in (inverting, storing)]
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)
    errors = relative_errors(inverting, storing)
    assert max(errors.values()) <= 1e-9, max(errors.items(), key=lambda e: e[1])
    for (name, p), q in zip(inverting.named_buffers(), storing.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("arch", ["revnet", "irevnet", "hybrid", "chunked"])
def test_invert_equals_store_in_float32(arch, seed):
    """At most 2e-4 per parameter, batch 64. One ReLU kink crossed can exceed it; there is none here."""
    width = 8 if arch == "irevnet" else 16  # whose three poolings make it 64 times as wide
    inverting, storing = build_twins(compose(f"arch={arch}", f"width={width}"), torch.float32, seed)
    for model in (inverting, storing):
        train_step(model, torch.float32, size=64)
    errors = relative_errors(inverting, storing)
    assert max(errors.values()) <= 2e-4, max(errors.items(), key=lambda e: e[1])


@pytest.mark.parametrize("pooling", ["[channel,batch]", "[batch,channel]", "[batch,batch]", "[channel]", "[]"])
@pytest.mark.parametrize("arch", ["layerwise", "hybrid", "irevnet"])
def test_pooling_patterns(arch, pooling):
    """Batch pooling keeps the channels; the head merges the parts, so logits stay one row an image."""
    inverting, storing = build_twins(compose(f"arch={arch}", "width=4", "depth=3", f"pooling={pooling}"))
    for model in (inverting, storing):
        train_step(model, torch.float64, size=4)
    assert max(relative_errors(inverting, storing).values()) < 1e-8
    channels = 4 * 4 ** pooling.count("channel")
    assert inverting.trunk.head.linear.in_features == channels


@pytest.mark.parametrize("case", INVERTIBLE_TRUNKS, ids=ids(INVERTIBLE_TRUNKS))
def test_the_trunk_is_invertible_from_stem_to_head(case):
    model = build_model(small(case)).double()
    with torch.no_grad():
        x = model.stem(batch(dtype=torch.float64)[0])
        y, saved = model.trunk.forward_(x.clone())
        torch.testing.assert_close(model.trunk.inverse(y, saved), x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", INVERTIBLE_TRUNKS, ids=ids(INVERTIBLE_TRUNKS))
def test_memory_is_flat_over_depth(case):
    """From depth 2 to 6: the slope of peak live bytes between batch 32 and 64 does not grow by a per mille."""
    overrides = [f"arch={case.arch}", "width=8" if case.arch == "irevnet" else "width=32", "pooling=[channel]"]
    overrides += ["chunk_mib=0.25"]  # images are small here: several chunks to a batch all the same
    shallow, deep = (predict_step_memory(compose(*overrides, f"depth={depth}"), 10, 16, 64) for depth in (2, 6))
    assert deep.bytes_per_pixel <= 1.001 * shallow.bytes_per_pixel


@pytest.mark.parametrize(
    ("overrides", "most"),
    [
        ("arch=layerwise", 280),
        ("arch=hybrid", 400),
        ("arch=chunked", 272),
        ("arch=irevnet", 660),
        ("arch=chunked precision=bf16", 150),
        ("arch=chunked precision=fp16 width=16", 80),
    ],
)
def test_bytes_per_pixel(overrides, most):
    """Between batch 256 and 512 at width 32 and the default depth; the floor is one state and one gradient."""
    cfg = compose("width=32", *overrides.split())
    floor = 2 * cfg.width * (4 if cfg.precision == "fp32" else 2)
    predict = StepPredictor(cfg, 10, 32)
    small, large = (step.forward_backward - step.buffers for step in map(predict, (256, 512)))
    assert floor < (large - small) / (256 * 32**2) <= most


def test_bytes_per_pixel_of_hybrid_in_16_bit():
    """A large batch, so that it has many chunks in every pass; two rounds of each loop tell its peak."""
    predict = StepPredictor(compose("arch=hybrid", "width=32", "precision=bf16"), 10, 32)
    small, large = (predict(batch).forward_backward for batch in (1024, 2048))
    assert 128 < (large - small) / (1024 * 32**2) <= 210


def test_resnet18_is_torchvisions_but_for_the_stem():
    ours, theirs = build_model(compose("arch=resnet18")), torchvision.models.resnet18(num_classes=10)
    stem = theirs.conv1.weight.numel() - ours[0][0].weight.numel()
    assert stem == 64 * 3 * (49 - 9)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) - stem
    for stage, layer in zip(ours[1], (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), strict=True):
        stage.load_state_dict(layer.state_dict())  # raises unless the blocks are the same
        stage.eval()
        layer.eval()
        x = torch.randn(2, stage[0].conv1.in_channels, 8, 8)
        torch.testing.assert_close(stage(x), layer(x))


def test_revnet_has_about_as_many_parameters_as_resnet18():
    ours, resnet = (
        sum(p.numel() for p in build_model(compose(f"arch={a}")).parameters()) for a in ("revnet", "resnet18")
    )
    assert 0.9 < ours / resnet < 1.1


def test_revnet_of_gomez_has_their_layers_and_parameters():
    """RevNet-38: 38 layers with weights, 0.46 million parameters in their table."""
    model = build_model(compose("arch=revnet_gomez"))
    convolutions = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
    assert len(convolutions) + 1 == 38
    units = [(32, 32)] * 3 + [(32, 64)] + [(64, 64)] * 2 + [(64, 112)] + [(112, 112)] * 2
    weights = 9 * 3 * 32 + sum(9 * (before + 3 * after) * after // 4 for before, after in units)
    norms = 2 * 32 + sum(before + 3 * after for before, after in units) - 32 + 2 * 112  # no BN before the first F
    assert sum(p.numel() for p in model.parameters()) == weights + norms + 113 * 10
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 0.46


def test_the_strided_block_of_gomez():
    torch.manual_seed(0)
    block, x = StridedBlock(4, 10).double(), torch.randn(3, 4, 6, 6, dtype=torch.float64)
    x1, x2 = x[:, :2], x[:, 2:]

    def shortcut(part):
        means = part.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
        return torch.cat([torch.zeros(3, 1, 3, 3), means, torch.zeros(3, 2, 3, 3)], dim=1)

    y1 = shortcut(x1) + block.f(x2)
    torch.testing.assert_close(block(x), torch.cat([y1, shortcut(x2) + block.g(y1)], dim=1))


def test_revnet_of_gomez_inverts_what_it_stores():
    inverting, storing = build_twins(compose("arch=revnet_gomez", "stream=plain"))
    for model in (inverting, storing):
        train_step(model, torch.float64, size=4)
    assert max(relative_errors(inverting, storing).values()) < 1e-9
    for p, q in zip(inverting.buffers(), storing.buffers(), strict=True):
        torch.testing.assert_close(p, q)
    blocks = [m for m in inverting.modules() if isinstance(m, AdditiveCoupling)]
    assert len(blocks) == 7, "all but the two that have a stride"


def test_revnet_of_gomez_is_planned_without_a_closed_form():
    cfg = compose("arch=revnet_gomez", "batch=64", "device=cpu")
    with pytest.raises(RevtrainError, match="no closed form"):
        analytic_memory(cfg)
    inverted, stored = plan(cfg), plan(compose("arch=revnet_gomez", "batch=64", "device=cpu", "backward=store"))
    assert inverted.bytes_per_pixel < 0.7 * stored.bytes_per_pixel


def test_depth_is_spread_over_the_stages():
    assert spread_depth(7, 3) == [3, 2, 2]
    assert spread_depth(2, 4) == [1, 1, 0, 0]
    for case in INVERTIBLE_TRUNKS:
        counts = [sum(1 for _ in build_model(small(case, f"depth={depth}")).trunk.layers) for depth in (3, 5)]
        assert counts[1] > counts[0]


def test_options_reach_the_layers():
    model = build_model(compose("arch=layerwise", "width=4", "slope=0.4", "epsilon_i=0.2", "chunk_mib=0.5"))
    conv, bn, activation = model.trunk.layers[:3]
    assert activation.slope == 0.4
    assert bn.epsilon_i == 0.2
    assert conv.piece_bytes == 2**19
    assert build_model(compose("arch=hybrid", "width=4", "backward=store")).trunk.backward_mode == "store"


def test_backward_mode_reaches_every_chain():
    for case in REVERSIBLE:
        for mode in ("invert", "store"):
            chains = [
                m for m in build_model(small(case, f"backward={mode}")).modules() if isinstance(m, InvertibleChain)
            ]
            assert chains
            assert all(chain.backward_mode == mode for chain in chains)


def test_classes_of_the_data_reach_the_head():
    assert build_model(compose("width=4"), classes=7)(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("overrides", "given", "remedy"),
    [
        (["arch=hybrid", "width=6"], "width=6", "multiple of four"),
        (["arch=layerwise", "width=5"], "width=5", "width=6"),
        (["arch=irevnet", "width=3"], "width=3", "width=4"),
        (["arch=revnet", "width=7"], "width=7", "width=8"),
        (["arch=hybrid", "depth=0"], "depth=0", "1 or more"),
        (["arch=layerwise", "depth=-1"], "depth=-1", "1 or more"),
        (["arch=revnet_gomez", "stage_channels=[64]"], "stage_channels=[64]", "even number for each pooling"),
        (["arch=revnet_gomez", "stage_channels=[64,33]"], "stage_channels=[64,33]", "none below"),
        (["arch=revnet_gomez", "depth=2"], "depth=2", "depth=3 or more"),
        (["arch=resnet18", "depth=20"], "depth=20", "depth=18 or depth=34"),
        (["arch=hybrid", "pooling=[stride,channel]"], "stride", "channel, batch"),
        (["arch=revnet", "pooling=[channel]"], "channel", "stride"),
        (["arch=resnet18", "pooling=[stride]"], "stride", "[stride,stride,stride]"),
        (["arch=layerwise", "slope=2"], "slope=2", "slope=0.5"),
    ],
)
def test_what_cannot_be_built_is_refused(overrides, given, remedy):
    with pytest.raises(RevtrainError) as error:
        build_model(compose(*overrides))
    message = str(error.value)
    assert given in message
    assert remedy in message
    assert 2 <= len(message.splitlines()) <= 5


@pytest.mark.parametrize("case", ARCHS, ids=ids(ARCHS))
def test_an_image_size_that_the_pooling_cannot_divide_is_refused(case):
    with pytest.raises(RevtrainError, match="27x27"):
        build_model(small(case), image_size=27)


def test_unknown_architecture_lists_the_known_ones():
    cfg = compose()
    cfg.arch = "resnext"
    with pytest.raises(RevtrainError, match="hybrid, irevnet, layerwise, resnet18, revnet"):
        build_model(cfg)


def test_weights_are_placed_as_the_inputs_that_they_meet():
    """A convolution turns weights that lie otherwise at each call."""
    for arch, expected in (("hybrid", True), ("chunked", True), ("layerwise", True), ("resnet18", False)):
        model = place(build_model(compose(f"arch={arch}", "width=8"), 10, 32), torch.device("cpu"))
        convolutions = [each for name, each in model.named_parameters() if each.dim() == 4 and "stem" not in name]
        inside = [each for each in convolutions if each.shape[-1] > 1]  # those of one pixel lie either way
        assert inside and all(each.is_contiguous(memory_format=torch.channels_last) is expected for each in inside)
