"""The compiled passes on a CPU against the specifications in plain torch, and what happens without a compiler."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from revtrain.conf import compose
from revtrain.kernels import cpu_kernels, pieces
from revtrain.kernels.cpu_kernels import build
from revtrain.layers import BatchPooling, ChannelPooling
from revtrain.models import build_model

# the modules, whose names the package gives to their functions
read, add, activation, statistics, gradient = (
    importlib.import_module(f"revtrain.kernels.{name}")
    for name in ("read_part", "add_to_part", "norm_activation", "channel_statistics", "norm_gradient")
)
needs_compiler = pytest.mark.skipif(build.library() is None, reason="no C compiler")
CASES = 60
RULE = (1.0, 0.0, True, 0.0, None)  # of add_to_part_: a sum without a factor and a grid


def draw(case: int, *, signs: bool = False, tile: bool = False):
    """(generator, part of a state (B, C, H, W), C values of a channel): odd sizes, one value, more than a vector.

    Of a `tile` the rows lie apart.
    """
    generator = torch.Generator().manual_seed(case)

    def size(most: int) -> int:
        return int(torch.randint(1, most, (1,), generator=generator))

    batch, channels, height, width = size(5), size(20), size(20), size(24)
    width = 8 * (1 + width // 8) if signs else width
    state = torch.randn(batch, 2 * channels, height + 3 * tile, width + 5 * tile, generator=generator)
    part = state[:, channels:]
    return generator, inside(part) if tile else part, torch.randn(channels, generator=generator)


def inside(x):
    """(B, C, H, W) without two rows before, one behind, one column before, four behind."""
    return x[:, :, 2:-1, 1:-4]


def like(part, generator, last: bool = False, tile: bool = False):
    x = torch.randn(*part.shape[:2], part.shape[2] + 3 * tile, part.shape[3] + 5 * tile, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    return inside(x) if tile else x


@needs_compiler
@pytest.mark.parametrize("tile", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_reading_is_the_specification_to_the_bit(last, tile):
    for case in range(CASES):
        generator, part, scale = draw(case, tile=tile)
        shift = torch.randn(len(scale), generator=generator)
        for of_norm, unit in (((None, None), 1.0), ((None, None), 0.3), ((scale, shift), 1.0)):
            made = cpu_kernels.read_part(part, *of_norm, unit, torch.float32, last)
            expected = read.specification(part, *of_norm, unit, torch.float32, last)
            assert made.stride() == expected.stride()
            assert torch.equal(made, expected)


@needs_compiler
@pytest.mark.parametrize("step", [0.0, 2.0**-16])
@pytest.mark.parametrize("factor", [1.0, -1.0, 0.3])
@pytest.mark.parametrize("tile", [False, True])
def test_adding_is_the_specification_to_the_bit_and_counts_what_leaves_the_range(tile, factor, step):
    for case in range(CASES):
        generator, part, _ = draw(case, tile=tile)
        extremes = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, 2.0**-17, 3 * 2.0**-17])
        for last in (False, True):
            residual = like(part, generator, last, tile)
            where = torch.randint(residual.numel(), (6,), generator=generator)
            residual[tuple(torch.unravel_index(where, residual.shape))] = extremes
            made, expected = like(part, generator, tile=tile).copy_(part), part.clone()
            around = made._base.clone() if tile else None
            counts = [torch.zeros((), dtype=torch.int64) for _ in range(2)]
            assert cpu_kernels.add_to_part_(made, residual, factor, step, factor != 0.3, 1.5, counts[0])
            add.specification(expected, residual, factor, step, 1.5, counts[1] if step else None, None)
            # a product and a sum in one rounding or in two, as torch's own operation on this processor
            torch.testing.assert_close(
                made, expected, equal_nan=True, rtol=0 if step or factor != 0.3 else 1e-6, atol=0
            )
            assert counts[0] == counts[1]
            if tile:  # what lies around it stays as it is
                inside(around).copy_(made)
                assert torch.equal(around.nan_to_num(), made._base.nan_to_num())


@needs_compiler
@pytest.mark.parametrize("channels", [4, 20])
def test_long_samples_are_turned_as_short_ones_are(channels):
    part = torch.randn(2, 2 * channels, 41, 40)[:, channels:]
    u = cpu_kernels.read_part(part, None, None, 1.0, torch.float32, True)
    assert u.is_contiguous(memory_format=torch.channels_last) and torch.equal(u, part)
    state = part.clone()
    assert cpu_kernels.add_to_part_(state, u, 1.0, 0.0, True, 0.0, None) and torch.equal(state, part + part)


@needs_compiler
@pytest.mark.parametrize("pooling", [ChannelPooling, BatchPooling])
@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_pooling_is_the_permutation_to_the_bit(pooling, factor, dtype, monkeypatch):
    used = []
    monkeypatch.setattr(
        cpu_kernels, "pool_", lambda *given, pool=cpu_kernels.pool_: used.append(pool(*given)) or used[-1]
    )
    layer = pooling(factor)
    for batch, channels, rows, columns in [(1, 1, 1, 1), (3, 5, 2, 4), (2, 3, 5, 9), (2, 9, 8, 17)]:
        shape = batch, channels, rows * factor, columns * factor
        bits = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64).to(torch.int32)
        x = bits.view(dtype)  # as float32 these are numbers of all sizes, and no numbers
        y = layer.recompute_(x.clone(), None)
        assert torch.equal(y.view(torch.int32), layer(bits))
        assert torch.equal(layer.inverse_(y, None).view(torch.int32), bits)
    assert used == [True] * 8


@needs_compiler
@pytest.mark.parametrize(("piece_bytes", "copies"), [(1, 1), (2 * 3 * 64 * 4, 2), (2**20, 3)])
def test_poolings_scratch_is_a_piece_whatever_the_number_of_threads(piece_bytes, copies, monkeypatch):
    made = []
    monkeypatch.setattr(cpu_kernels, "_at", lambda x, at=cpu_kernels._at: made.append(x) or at(x))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x = torch.randn(5, 3, 8, 8)
    y = x.clone()
    assert cpu_kernels.pool_(y, 2, False, piece_bytes) and len(made[1]) == copies
    assert torch.equal(y.view(20, 3, 4, 4), BatchPooling()(x))


@needs_compiler
def test_statistics():
    for case in range(CASES):
        _, part, _ = draw(case)
        for each in (part, part.contiguous(memory_format=torch.channels_last)):
            made = statistics._compiled(each)
            expected = statistics.specification(each.double(), 1.0, torch.float64, 4096)
            for one, other in zip(made, expected, strict=True):
                torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
        # a caller's channels-last tensor and a state have the same bits: both modes are one function
        assert torch.equal(torch.cat(made), torch.cat(statistics._compiled(part)))


@needs_compiler
@pytest.mark.parametrize("with_signs", [False, True])
@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_norm_and_activation_and_back(slope, with_signs):
    for case in range(CASES):
        generator, part, mean = draw(case, signs=with_signs)
        x, bias = part.clone(), torch.randn(len(mean), generator=generator)
        gain = mean.sign() * (mean.abs() + 0.1)
        deviation = gain.abs().flip(0)
        x.view(-1)[0] = float(mean[0])  # z is the bias
        y, expected = x.clone(), x.clone()
        signs = torch.empty(x.numel() // 8, dtype=torch.uint8) if with_signs else None
        assert cpu_kernels.normalise_activate_(y, mean, gain / deviation, bias, slope, signs)
        packed = activation.forward_specification(expected, mean, deviation, gain, bias, slope, with_signs)
        assert torch.equal(y, expected) and (signs is None or torch.equal(signs, packed))

        dy = like(x, generator)
        sums, exact = (
            cpu_kernels.norm_activation_sums(y, dy, signs, gain, bias, slope),
            torch.zeros(2, len(mean)).double(),
        )
        wide = [each.double() for each in (y, dy, gain, bias)]
        activation.sums_specification(exact, *wide[:2], signs, *wide[2:], slope)
        torch.testing.assert_close(sums.double(), exact, rtol=1e-4, atol=1e-4)
        count = x.numel() // len(mean)
        for of_batch in (None, sums):
            made, specified = (y.clone(), dy.clone()), (y.clone(), dy.clone())
            means = None if of_batch is None else of_batch / count
            assert cpu_kernels.undo_norm_activation_(*made, signs, mean, deviation, gain, bias, slope, means)
            activation.undo_specification(*specified, signs, mean, deviation, gain, bias, slope, of_batch, count)
            for one, other in zip(made, specified, strict=True):
                assert torch.equal(one, other)


@needs_compiler
@pytest.mark.parametrize("tile", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_the_gradient_of_a_norm(last, tile):
    for case in range(CASES):
        generator, part, mean = draw(case, tile=tile)
        scale, du = torch.randn(len(mean), generator=generator), like(part, generator, last, tile)
        made = like(part.repeat(1, 2, 1, 1), generator, tile=tile)[:, part.shape[1] :]
        expected = made.clone()
        sums, exact = cpu_kernels.add_norm_gradient_(made, du, part, mean, scale), torch.zeros(2, len(mean)).double()
        wide = [each.double() for each in (expected, du, part, mean, scale)]
        gradient.gradient_specification(*wide, exact, True, 1.0)
        torch.testing.assert_close(sums.double(), exact, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(made.double(), wide[0], rtol=1e-6, atol=1e-6)
        made, part = made.contiguous(), part.contiguous()  # all of the batch, not tiles
        assert cpu_kernels.add_norm_rest_(made, part, scale, mean)
        gradient.rest_specification(wide[0], wide[2], scale.double(), mean.double(), 1.0)
        torch.testing.assert_close(made.double(), wide[0], rtol=1e-6, atol=1e-5)


@needs_compiler
def test_threads_change_no_bit():
    x, large = torch.randn(16, 24, 32, 32), torch.randn(2, 12, 200, 150)
    mean = torch.zeros(12)
    results = []
    for threads in (1, 2, 5):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            state, counted = x.clone(), torch.zeros((), dtype=torch.int64)
            cpu_kernels.add_to_part_(
                state, x.contiguous(memory_format=torch.channels_last), 1.0, 0.5, True, 2.0, counted
            )
            results.append([state, counted, *statistics._compiled(x), ChannelPooling().recompute_(x.clone(), None)])
            for part in (large, inside(large)):  # whose rows threads share
                u = cpu_kernels.read_part(part, mean + 2, mean, 1.0, torch.float32, True)
                u[:, :, 30], u[:, :, 130] = 1e17, -1e17  # sums in another order are others
                changed, sums = part.clone(), cpu_kernels.add_norm_gradient_(part.clone(), u, part, mean, mean)
                assert cpu_kernels.add_to_part_(changed, u, 1.0, 0.5, True, 2.0, counted)
                results[-1] += [u, sums, changed]
        finally:
            torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[0], others, strict=True))


@needs_compiler
@pytest.mark.parametrize(
    "part",
    [
        torch.zeros(2, 4, 3, 3, dtype=torch.float64),
        torch.zeros(2, 4, 3, 3, dtype=torch.bfloat16),
        torch.zeros(2, 4, 3, 3, dtype=torch.int64),
        torch.zeros(2, 3, 3, 4).permute(0, 3, 1, 2),  # its samples are not as a state's
        torch.zeros(0, 4, 3, 3),
        torch.zeros(2, 4, 3, 3, requires_grad=True),
        torch.zeros(2, 4, 3, 3, device="meta"),
    ],
    ids=["float64", "bfloat16", "int64", "layout", "empty", "graph", "meta"],
)
def test_what_is_not_served(part):
    assert cpu_kernels.read_part(part, None, None, 1.0, torch.float32, False) is None


@needs_compiler
@pytest.mark.parametrize("last", [False, True])
def test_tiles_of_volumes_and_of_rows_are_served(last):
    volume = torch.randn(1, 6, 9, 10, 11)[:, 2:]
    for part in (volume[:, :, 1:7, 2:9, 3:], volume[:, :, 1:7], volume[:, :, :, 2:9], volume[0, :, 2:7, 1]):
        part = part if part.dim() == 5 else part[None]
        memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}[part.dim()]
        u = cpu_kernels.read_part(part, None, None, 0.5, torch.float32, last)
        assert torch.equal(u, part * 0.5) and u.is_contiguous(memory_format=memory_format) == last
        state = part.clone()
        assert cpu_kernels.add_to_part_(state, u, 1.0, 0.0, True, 0.0, None)
        assert torch.equal(state, part + u)
    rows = torch.randn(2, 6, 50)[:, 1:5, 3:40]
    assert torch.equal(cpu_kernels.read_part(rows, None, None, 1.0, torch.float32, False), rows)


@needs_compiler
def test_values_that_share_memory_are_left_to_torch():
    assert not cpu_kernels.add_to_part_(torch.randn(1, 3, 1, 5).expand(2, 3, 4, 5), torch.ones(2, 3, 4, 5), *RULE)
    state = torch.zeros(2, 3, 4, 5)
    add.add_to_part_(state, torch.arange(3.0).view(1, 3, 1, 1).expand(2, 3, 4, 5), piece_bytes=2**20)
    assert torch.equal(state, torch.arange(3.0).view(1, 3, 1, 1).expand(2, 3, 4, 5))


@needs_compiler
@pytest.mark.parametrize("arch", ["chunked", "layerwise", "hybrid"])
@pytest.mark.parametrize("cut_rows", [-1.0, 1.0], ids=["tiles", "strips"])
def test_a_step_in_tiles_runs_no_specification(arch, cut_rows, monkeypatch):
    model = build_model(compose(["data=synthetic", f"arch={arch}", "width=8", "depth=2", "chunk_mib=0.05"])).train()
    monkeypatch.setattr(pieces, "CUT_ROWS", cut_rows)
    monkeypatch.setattr(pieces, "_tiles", pieces._tiles.__wrapped__)  # without those that were cut before

    def plain(*given):
        raise AssertionError("plain torch ran")

    for module in (read, add, statistics):
        monkeypatch.setattr(module, "specification", plain)
    monkeypatch.setattr(gradient, "gradient_specification", plain)
    model(torch.randn(1, 3, 128, 96)).sum().backward()


@needs_compiler
def test_autograd_sees_what_was_written():
    x = torch.randn(2, 4, 3, 3)
    leaf = torch.ones(2, 4, 3, 3, requires_grad=True)
    y = (leaf * x).sum()
    assert cpu_kernels.add_to_part_(x, x.clone(), 1.0, 0.0, True, 0.0, None)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


class Watching(TorchDispatchMode):
    """Sees each operation, as whoever counts them does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def gradients(words, watch_backward: bool = False, size: int = 32):
    torch.manual_seed(0)
    model = build_model(compose(["data=synthetic", "width=8", "depth=3", *words])).train()
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    loss = torch.nn.functional.cross_entropy(model(x), torch.arange(3))
    if watch_backward:
        with Watching():
            loss.backward()
    else:
        loss.backward()
    return [each.grad for each in model.parameters()]


@needs_compiler
@pytest.mark.parametrize(
    "words", [["arch=hybrid"], ["arch=layerwise"], ["arch=chunked"], ["arch=hybrid", "chunk_mib=0.01"]]
)
@pytest.mark.parametrize("size", [32, 24])
def test_a_watched_backward_pass_goes_on_from_a_compiled_forward_pass(words, size, monkeypatch):
    compiled, mixed = gradients(words, size=size), gradients(words, watch_backward=True, size=size)
    monkeypatch.setattr(cpu_kernels, "library", lambda: None)
    plain = gradients(words, size=size)
    for one, other, third in zip(compiled, mixed, plain, strict=True):
        scale = third.abs().max() + 1e-3
        assert (one - third).abs().max() < 1e-3 * scale and (other - third).abs().max() < 1e-3 * scale


# ---- the compiler ------------------------------------------------------------------------------------


def run(code: str, tmp_path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = f"import logging; logging.basicConfig(level=logging.INFO, format='%(message)s')\n{code}"
    names = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONWARNINGS": "ignore"} | environment
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=names, timeout=300)


LOOK = "from revtrain.kernels.cpu_kernels.build import library; print(library() is not None)"


@needs_compiler
def test_the_first_process_compiles_and_says_so_and_what_others_may_write_is_not_loaded(tmp_path):
    first, second = run(LOOK, tmp_path), run(LOOK, tmp_path)
    assert first.stdout == second.stdout == "True\n"
    assert "compiled for this CPU in" in first.stderr and "kernels" not in second.stderr
    (made,) = (tmp_path / "revtrain" / "kernels").iterdir()
    assert made.stat().st_mode & 0o077 == 0
    made.write_bytes(b"something else")
    made.chmod(0o777)
    third = run(LOOK, tmp_path)
    assert third.stdout == "True\n" and "compiled" in third.stderr
    assert made.read_bytes() != b"something else"


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CC": "false", "PATH": "/bin:/usr/bin"}, "the C compiler could not serve"),
        ({"CC": "none-of-that-name", "PATH": "/nowhere"}, "no C compiler was found"),
        ({build.SWITCH: "off"}, ""),
    ],
    ids=["broken", "none", "off"],
)
def test_without_a_compiler_plain_torch_runs_and_one_line_says_so(environment, said, tmp_path):
    code = (
        "import torch; from revtrain.kernels import read_part; x = torch.ones(2, 4, 3, 3)\n"
        "print(torch.equal(read_part(x, torch.float32), x), torch.equal(read_part(x, torch.float32), x))"
    )
    ended = run(code, tmp_path, **environment)
    assert ended.stdout == "True True\n", ended.stderr
    assert ended.stderr.count("kernels ") == (1 if said else 0) and said in ended.stderr


@needs_compiler
@pytest.mark.parametrize("cache", ["a file", "relative"])
def test_without_a_cache_a_process_compiles_for_itself_and_leaves_nothing(cache, tmp_path, monkeypatch):
    (tmp_path / "revtrain").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path) if cache == "a file" else "~/.cache")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(build.tempfile, "tempdir", None)
    monkeypatch.chdir(tmp_path)
    passes = build.library.__wrapped__()
    assert passes is not None and [each.name for each in tmp_path.iterdir()] == ["revtrain"]
