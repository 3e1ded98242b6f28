"""Who comes from another library trains on: the scripts of tests/peers, moved over as docs/library.md says.

NAME_theirs.py is a script for the other library, NAME_ours.py the same for revtrain. The former runs with the library
where it is installed, and always with what the library computes, by plain autograd (tests/peers/formulas.py).
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer

from revtrain.core.chain import InvertibleChain
from revtrain.kernels.pieces import set_chunk_mib
from revtrain.layers import AdditiveCoupling
from revtrain.numerics.verify import verify

FOLDER = Path(__file__).parent / "peers"
PAGE = Path(__file__).parents[1] / "docs" / "library.md"
FORMULAS = runpy.run_path(str(FOLDER / "formulas.py"))["FORMULAS"]

# script -> (module that it imports, heading in docs/library.md, name of its reversible part)
PEERS = {
    "memcnn": ("memcnn", "MemCNN", "layer1"),
    "revtorch": ("revtorch", "RevTorch", "trunk"),
    "revlib": ("revlib", "revlib", "1"),
    "reformer": ("reformer_pytorch.reversible", "reformer-pytorch", "layers"),
}
every_peer = pytest.mark.parametrize("peer", PEERS)
# the libraries are older than today's torch; it warns of much that they call
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def main_of(name: str):
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"]


def need(module: str) -> None:
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def assert_same_training(theirs: tuple[list[float], nn.Module], ours: tuple[list[float], nn.Module]) -> None:
    losses = [torch.tensor(each) for each, _ in (theirs, ours)]
    assert len(losses[0]) == 10 and losses[0][-1] < 0.95 * losses[0][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-9)


@every_peer
def test_a_script_moves_over_with_at_most_five_changed_lines(peer):
    before, after = ((FOLDER / f"{peer}_{whose}.py").read_text().splitlines() for whose in ("theirs", "ours"))
    changes = [line[0] for line in difflib.ndiff(before, after) if line[0] in "-+"]
    assert 0 < max(changes.count("-"), changes.count("+")) <= 5, changes
    module = PEERS[peer][0].split(".")[0]
    assert module in "\n".join(before) and module not in "\n".join(after)


@every_peer
def test_a_script_that_was_moved_over_trains_to_the_losses_of_plain_autograd(peer, monkeypatch):
    module = PEERS[peer][0]
    for part in {module, module.split(".")[0]}:
        stand_in = ModuleType(part)
        vars(stand_in).update(vars(FORMULAS[module]))
        monkeypatch.setitem(sys.modules, part, stand_in)
    assert_same_training(main_of(f"{peer}_theirs")(), main_of(f"{peer}_ours")())


@every_peer
def test_a_script_that_was_moved_over_trains_to_the_losses_of_the_library_it_comes_from(peer):
    need(PEERS[peer][0])
    assert_same_training(main_of(f"{peer}_theirs")(), main_of(f"{peer}_ours")())


# a name in the library's `state_dict` -> here
NAMES = {
    "memcnn": ("trunk.3._fn.Gm.0.weight", "trunk.layers.3.g.0.weight"),
    "revtorch": ("trunk.reversible_blocks.10.f_block.2.bias", "trunk.layers.10.f.2.bias"),
    "revlib": ("trunk.2-1.wrapped_module.wrapped_module.0.weight", "trunk.layers.2.g.0.weight"),
    "reformer": ("trunk.blocks.1.f.net.norm.weight", "trunk.layers.1.f.norm.weight"),
}


@pytest.fixture
def moved():
    """The function of this name in docs/library.md."""
    (block,) = (
        each for each in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S) if "FORMERLY" in each
    )
    variables = {}
    exec(block, variables)
    return variables["moved"]


@every_peer
def test_the_names_of_saved_weights_become_those_of_a_chain(peer, moved):
    former, here = NAMES[peer]
    assert list(moved({"stem.weight": 1, former: 2}, PEERS[peer][1])) == ["stem.weight", here]


@every_peer
def test_what_was_trained_with_the_library_is_loaded(peer, moved):
    module, library, part = PEERS[peer]
    need(module)
    (_, theirs), (_, ours) = main_of(f"{peer}_theirs")(steps=2), main_of(f"{peer}_ours")(steps=0)
    saved = {re.sub(rf"^{part}\.", "trunk.", name): value for name, value in theirs.state_dict().items()}
    saved = moved(saved, library)
    ours.load_state_dict({re.sub(r"^trunk\.", f"{part}.", name): value for name, value in saved.items()})
    _, trained = main_of(f"{peer}_ours")(steps=2)
    for (name, p), q in zip(ours.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9, msg=name)
    updates = [
        {
            value.item()
            for name, value in model.state_dict().items()
            if re.match(rf"{part}\..*num_batches_tracked", name)
        }
        for model in (ours, trained)
    ]
    if updates[1]:  # of two steps; the page says so
        assert updates == [{{"memcnn": 6, "revlib": 4}[peer]}, {2}]


# ---- a vision transformer's own blocks -----------------------------------------------------------


class TwoStreams(nn.Module):
    """The blocks of a vision transformer, taken apart: `branches(block)` are its attention and its MLP."""

    def __init__(self, blocks, dim, branches):
        super().__init__()
        self.chain = InvertibleChain(AdditiveCoupling(2 * dim, *branches(b), dim=-1, per_sample=True) for b in blocks)

    def forward(self, tokens):
        one, other = self.chain(torch.cat([tokens, tokens], dim=-1)).chunk(2, dim=-1)
        return (one + other) / 2


class AttentionOf(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.norm, self.attention = block.ln_1, block.self_attention

    def forward(self, x):
        x = self.norm(x)
        return self.attention(x, x, x, need_weights=False)[0]


def torchvisions(depth=12):
    model = VisionTransformer(32, 8, num_layers=depth, num_heads=4, hidden_dim=32, mlp_dim=128, num_classes=10)
    return model, model.encoder, "layers", lambda b: (AttentionOf(b), nn.Sequential(b.ln_2, b.mlp))


def timms(depth=12):
    need("timm")
    from timm.models.vision_transformer import VisionTransformer as Timms

    model = Timms(32, 8, depth=depth, num_heads=4, embed_dim=32, num_classes=10, init_values=1.0)
    return model, model, "blocks", lambda b: (
        nn.Sequential(b.norm1, b.attn, b.ls1, b.drop_path1), nn.Sequential(b.norm2, b.mlp, b.ls2, b.drop_path2)
    )  # fmt: skip


every_vit = pytest.mark.parametrize("make", [torchvisions, timms])


@every_vit
def test_the_blocks_of_a_vision_transformer_keep_their_weights_as_f_and_g_of_a_chain(make):
    torch.manual_seed(0)
    model, owner, name, branches = make(depth=3)
    blocks = list(getattr(owner, name))
    before = {id(p) for p in model.parameters()}
    values = {id(p): p.detach().clone() for p in model.parameters()}
    x = torch.randn(2, 5, 32)
    one = other = x
    for block in blocks:  # attention's and MLP's share of what the block itself computes
        f, g = branches(block)
        middle = x + f(x)
        torch.testing.assert_close(middle + g(middle), block(x))
        one = one + f(other)
        other = other + g(one)
    setattr(owner, name, TwoStreams(blocks, 32, branches))
    torch.testing.assert_close(getattr(owner, name)(x), (one + other) / 2)
    assert {id(p) for p in model.parameters()} == before
    assert all(torch.equal(p, values[id(p)]) for p in model.parameters())

    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not any(torch.equal(p, values[id(p)]) for p in model.parameters())
    assert verify(model, images)


def bytes_stored(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps for the backward pass, without parameters and x."""
    own = {each.untyped_storage().data_ptr() for each in [*model.parameters(), x]}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address comes twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    return sum(storage.nbytes() for storage in kept.values())


@every_vit
def test_the_blocks_of_a_vision_transformer_need_a_tenth_of_the_activation_memory_in_a_chain(make):
    """Ten times less than what the model stored for autograd before, and than the chain does in `store`."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    model, owner, name, branches = make()
    images = torch.randn(128, 3, 32, 32)
    stored_before = bytes_stored(model, images)
    setattr(owner, name, TwoStreams(getattr(owner, name), 32, branches))
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    set_chunk_mib(model, 1 / 16)  # a few samples a piece, as of a large batch
    report = verify(model, images)
    assert report, report
    activations = report.invert.peak_bytes - gradients
    assert activations < 0.1 * (report.store.peak_bytes - gradients), report
    assert activations < 0.1 * stored_before, (activations, stored_before)
