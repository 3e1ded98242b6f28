"""Planning: the quick prediction against the full one, plans that hold in a real step, refusals with their remedy."""

from __future__ import annotations

import pytest
import torch
from cases import ARCHS, compose, ids
from conftest import TINY, read_checkpoint, read_metrics, read_result

import revtrain.data
import revtrain.planning.plan
from revtrain.config import parse_memory, read, registry
from revtrain.errors import RevtrainError
from revtrain.kernels.pieces import batch_pieces
from revtrain.machine import device as devices
from revtrain.memory.live import LiveStorages
from revtrain.planning.plan import cap_memory, loop_bytes, make_plan, margin_bytes, probe_images
from revtrain.planning.predict import Prediction, StepPredictor
from revtrain.training import run as train

MIB = 2**20
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# one network each whose activations outweigh its weights, with chunks far smaller than a batch
CHUNKED = ("arch=chunked", "width=8", "depth=2", "pooling=[batch]", "expansion=[1]", "chunk_mib=0.25")
RESNET = ("arch=resnet18", "width=8")


def full_step(cfg, batch: int, image_size: int, device: torch.device | None = None) -> Prediction:
    """A whole step, nothing left out; on real tensors if there is a `device`."""
    return StepPredictor(cfg, 10, image_size, quick=False, device=device)(batch)


# ---- sizes in words --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1GiB", 2**30),
        ("500MiB", 500 * 2**20),
        ("2 GB", 2 * 10**9),
        ("1.5gib", 3 * 2**29),
        (" 64 KiB ", 65536),
        ("10kB", 10_000),
        ("1TB", 10**12),
        ("4096B", 4096),
    ],
)
def test_sizes_are_read_with_their_units(text, size):
    assert parse_memory(text) == size
    read(compose(f"memory_limit='{text}'"))


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("500", "Did you mean 500MiB?"),
        ("1G", "Did you mean 1GiB?"),
        ("1.5m", "Did you mean 1.5MiB?"),
        ("0MiB", "with its unit.\n"),
        ("-1GiB", "with its unit.\n"),
        ("much", "with its unit.\n"),
        ("GiB", "with its unit.\n"),
        ("1XB", "with its unit.\n"),
        ("1GiB/s", "with its unit.\n"),
    ],
)
def test_other_sizes_are_refused(text, hint):
    with pytest.raises(RevtrainError) as caught:
        read(compose(f"memory_limit='{text}'"))
    message = str(caught.value)
    assert message.startswith(f"memory_limit={text} was given; expected a size with its unit.")
    assert hint in message and "memory_limit=500MiB" in message
    assert len(message.splitlines()) == 2


def test_a_batch_is_a_number_or_auto(command):
    read(compose("batch=auto"))
    for word, hint in (("abc", ""), ("atuo", " Did you mean auto?")):
        ran = command(f"batch={word}")
        assert ran.code == 2
        assert ran.err.startswith(f"batch={word} was given; expected a whole number, or auto.{hint}\n")
    ran = command("batch=1.5")
    assert ran.code == 2 and ran.err.startswith("batch=1.5 was given; expected a whole number, or auto.")


# ---- the prediction ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["invert", "store", "bf16"])
@pytest.mark.parametrize("case", ARCHS, ids=ids(ARCHS))
def test_the_quick_prediction_equals_the_full_one(case, mode):
    """Many rounds over chunks, several equal units a stage, in both modes and in 16 bit: all is left out there."""
    words = ["precision=bf16"] if mode == "bf16" else [f"backward={mode}"]
    if case.reversible:
        words += ["depth=4", "pooling=[batch]" if case.invertible_trunk else "pooling=[stride]", "chunk_mib=0.02"]
    check_the_quick_prediction(*words, arch=case.arch, small=case.small, batches=(3, 50) if mode == "invert" else (50,))


def test_the_quick_prediction_knows_chunks_of_hidden_channels():
    words = ("norm=hidden", "hidden_chunk=1", "depth=2", "pooling=[]", "chunk_mib=0.02", "precision=bf16")
    check_the_quick_prediction(*words, arch="chunked", small=("width=8",), batches=(30,))


def test_the_quick_prediction_knows_the_signs_of_all_chunks():
    words = ("depth=1", "pooling=[]", "chunk_mib=0.005")
    check_the_quick_prediction(*words, arch="hybrid", small=("width=8",), batches=(128,))


def check_the_quick_prediction(*words, arch, small, batches):
    """Against the full one: the peak within 0.3 %, the rest to the byte."""
    cfg = compose(f"arch={arch}", *small, *words)
    predict = StepPredictor(cfg, 10, 8)
    for batch in batches:
        full, quick = full_step(cfg, batch, 8), predict(batch)
        assert quick.peak == pytest.approx(full.peak, rel=0.003, abs=512)
        assert quick.parameters == full.parameters
        assert quick.gradients == full.gradients
        assert quick.optimizer == full.optimizer


@pytest.mark.parametrize(
    "words", [("arch=chunked", "expansion=[1]"), ("arch=layerwise",)], ids=["chunked", "layerwise"]
)
def test_the_quick_prediction_holds_where_weights_dominate(words):
    """Wide stages: which gradients exist at the peak decides, so the layer that stands for all must be the first."""
    cfg = compose(*words, "width=16", "depth=4", "pooling=[channel]", "chunk_mib=0.01")
    assert StepPredictor(cfg, 10, 8)(24).peak == pytest.approx(full_step(cfg, 24, 8).peak, rel=0.003)


def test_the_prediction_is_quick_because_it_leaves_out_repetitions(monkeypatch):
    dispatch = LiveStorages.__torch_dispatch__
    count = 0

    def counting(*args):
        nonlocal count
        count += 1
        return dispatch(*args)

    monkeypatch.setattr(LiveStorages, "__torch_dispatch__", counting)

    def operations(batch, *words):
        nonlocal count
        predict = StepPredictor(compose("arch=chunked", "width=8", "pooling=[batch]", "chunk_mib=0.01", *words), 10, 8)
        count = 0
        predict(batch)
        return count

    assert operations(64, "depth=2", "expansion=[2]") == operations(1024, "depth=2", "expansion=[8]")
    # twelve blocks more are not worked through: their gradients are made and applied, no more
    assert operations(64, "depth=14", "expansion=[2]") < 2 * operations(64, "depth=2", "expansion=[2]")


def test_the_prediction_leaves_no_trace():
    """Neither in the random numbers nor in the loops: also after an error inside, all pieces are gone through."""
    rng, x = torch.get_rng_state(), torch.zeros(5, 2)
    predict = StepPredictor(compose(*CHUNKED), 10, 32)
    assert predict(2**17).peak > 2**32
    assert torch.equal(rng, torch.get_rng_state())
    assert len(list(batch_pieces(x, 1))) == 5
    with pytest.raises(RuntimeError, match="padded input size"):  # images without pixels: an error inside
        StepPredictor(compose("arch=resnet18", "width=4"), 10, 0)(2)
    assert len(list(batch_pieces(x, 1))) == 5


def test_real_tensors_are_never_left_half_done():
    with pytest.raises(ValueError, match="quick=False"):
        StepPredictor(compose(*CHUNKED), 10, 32, quick=True, device=CPU)


# ---- the plan ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("words", "limit"), [(CHUNKED, "6MiB"), (RESNET, "24MiB")])
def test_auto_finds_the_largest_batch_to_the_last_image(words, limit):
    cfg = compose(*words, "batch=auto", f"memory_limit={limit}")
    plan = make_plan(cfg, CPU, 10, 16, 10_000)
    assert plan.fits and plan.batch == plan.largest_batch >= 2
    predict, config = StepPredictor(cfg, 10, 16), read(cfg)
    needed = [predict(b).peak + loop_bytes(config, CPU, b, 16, 10_000)[0] for b in (plan.batch, plan.batch + 1)]
    assert needed[0] == plan.needed_bytes <= plan.limit_bytes < needed[1]
    # the same from a batch that is given: too small, or too large
    for batch in (max(2, plan.batch // 3), 3 * plan.batch):
        other = make_plan(compose(*words, f"batch={batch}", f"memory_limit={limit}"), CPU, 10, 16, 10_000)
        assert other.largest_batch == plan.batch and other.fits == (batch < plan.batch)


def test_auto_never_exceeds_the_training_set():
    cfg = compose(*CHUNKED, "batch=auto", "memory_limit=1GiB")
    assert make_plan(cfg, CPU, 10, 16, 77).batch == 77
    assert make_plan(cfg, CPU, 10, 16, 2).batch == 2


def test_the_terms_of_a_plan_add_up_to_its_peak():
    for batch in (2, 64):
        plan = make_plan(compose(*CHUNKED, f"batch={batch}"), CPU, 10, 16, 100)
        terms = ("parameter", "gradient", "optimizer", "activation", "buffer", "scratch")
        sizes = {term: getattr(plan, f"{term}_bytes") for term in terms}
        assert sum(sizes.values()) == plan.peak_bytes == plan.needed_bytes - plan.loop_bytes
        assert sizes["parameter"] > sizes["optimizer"] == 4 * plan.parameters and plan.margin_bytes == 0
        assert sizes["buffer"] == 48 * batch + 2 * 12 + 4 + 8  # choices, statistics of the images, loss and hits
        assert sizes["activation"] == round(plan.bytes_per_pixel * batch * 16**2)
        assert plan.fits is None and plan.largest_batch is None and plan.limit_bytes is None


def test_bytes_per_pixel_are_those_of_the_architecture():
    """c = 8: two states and the images, 4 bytes a value; labels besides."""
    plan = make_plan(compose(*CHUNKED, "batch=64", "memory_limit=1GiB"), CPU, 10, 32, 10_000)
    assert plan.bytes_per_pixel == pytest.approx((2 * 8 + 3) * 4, abs=1)


def test_chunked_takes_ten_times_the_batch_of_resnet18_in_500_mib():
    plans = [
        make_plan(compose(f"arch={arch}", "batch=auto", "memory_limit=500MiB"), CPU, 10, 32, 50_000)
        for arch in ("chunked", "resnet18")
    ]
    assert all(plan.fits and plan.needed_bytes > 490 * MIB for plan in plans)
    assert plans[0].batch >= 10 * plans[1].batch > 0


@pytest.mark.parametrize("words", [CHUNKED, RESNET], ids=["chunked", "resnet18"])
def test_the_plan_holds_in_a_real_step(words):
    cfg = compose(*words, "batch=auto", "memory_limit=12MiB")
    plan = make_plan(cfg, CPU, 10, 32, 10_000)
    real = full_step(cfg, plan.batch, 32, device=CPU)
    assert 0.93 * plan.limit_bytes < real.peak <= 1.001 * plan.limit_bytes
    assert plan.peak_bytes == pytest.approx(real.peak, rel=0.02)


# ---- CUDA, as far as it goes without ---------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """A card of 8 GiB with 4 GiB free; the fractions that its allocator was capped to."""
    capped = []
    monkeypatch.setattr(devices, "available_bytes", lambda device: 4 * 2**30)
    monkeypatch.setattr(devices, "total_memory_bytes", lambda device: 8 * 2**30)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: capped.append(share))
    return capped


def test_on_cuda_a_margin_is_kept_and_free_memory_is_the_limit(card):
    assert margin_bytes(CUDA, 4 * 2**30) == round(0.1 * 4 * 2**30)
    assert margin_bytes(CUDA, 100 * MIB) == 64 * MIB
    assert margin_bytes(CPU, 100 * MIB) == 0
    plan = make_plan(compose(*RESNET, "batch=auto"), CUDA, 10, 32, 10**6)
    assert plan.limit_bytes == 4 * 2**30 and plan.limit_given is None
    assert plan.margin_bytes == round(0.1 * plan.limit_bytes)
    assert 0.98 * plan.limit_bytes < plan.needed_bytes <= plan.limit_bytes
    assert "free on cuda" in plan.table() and "workspace of convolutions" in plan.table()
    # a limit beyond what is free is no promise
    assert make_plan(compose(*RESNET, "memory_limit=6GiB"), CUDA, 10, 32, 10**6).limit_bytes == 4 * 2**30


def test_on_cuda_the_optimizer_needs_nothing_of_its_own(card):
    """Weights dominate: the peak is in the optimizer, which is one kernel there; on the CPU it copies a gradient."""
    cfg = compose("arch=layerwise", "width=64", "depth=3", "pooling=[channel,channel]", "batch=2")
    plan = make_plan(cfg, CUDA, 10, 8, 100)
    weights = plan.parameter_bytes + plan.gradient_bytes + plan.optimizer_bytes
    assert weights <= plan.peak_bytes < 1.01 * weights
    assert plan.peak_bytes < make_plan(cfg, CPU, 10, 8, 100).peak_bytes


def test_the_allocator_is_capped_as_the_limit_says(card):
    cap_memory("2GiB", CUDA)
    cap_memory("100GiB", CUDA)
    cap_memory(None, CUDA)  # the next job of a sweep
    cap_memory("2GiB", CPU)
    assert card == [0.25, 1.0, 1.0]


# ---- refusals ------------------------------------------------------------------------------------


@pytest.fixture
def refusal(tmp_path):
    """`refusal("batch=50", ...)`: the message that a run in `tmp_path / "run"` is refused with."""

    def run(*words):
        with pytest.raises(RevtrainError) as caught:
            train.train(compose(*words), tmp_path / "run")
        message = str(caught.value)
        assert 2 <= len(message.splitlines()) <= 5
        return message

    return run


def test_a_run_over_the_limit_is_refused_with_numbers_batch_and_architectures(refusal, tmp_path):
    words = (*TINY, "arch=resnet18", "width=64", "depth=18", "pooling=[stride,stride,stride]")
    words += ("batch=50", "memory_limit=150MiB")
    message = refusal(*words)
    plan = make_plan(compose(*words), CPU, 10, 32, 52)
    assert message.startswith("memory_limit=150MiB is too little for arch=resnet18 width=64 batch=50 at 32x32:\n")
    assert f"needs {(plan.peak_bytes + plan.loop_bytes) / MIB:,.1f} MiB; the limit is 150.0 MiB" in message
    assert 2 <= plan.largest_batch < 50
    assert f"The largest batch that fits is batch={plan.largest_batch}; batch=auto takes it." in message
    assert "At batch=50 would fit: " in message and message.endswith(f"{'; '.join(plan.alternatives)}.")
    result = read_result(tmp_path / "run")
    assert result["status"] == "failed" and result["error"] == message
    assert result["plan"]["fits"] is False and result["plan"]["largest_batch"] == plan.largest_batch
    assert not (tmp_path / "run/last.pt").exists()


def test_the_architectures_that_a_refusal_names_do_fit():
    plan = make_plan(compose("arch=resnet18", "batch=64", "memory_limit=160MiB"), CPU, 10, 32, 10_000)
    assert {each.split()[0] for each in plan.alternatives} == {"arch=chunked", "arch=hybrid", "arch=layerwise"}
    for each in plan.alternatives:
        words, size = each.split(" (about ")
        peak = StepPredictor(compose(*words.split()), 10, 32)(64).peak
        assert peak <= plan.limit_bytes
        assert peak / MIB == pytest.approx(float(size.removesuffix(" MiB)")), rel=0.1)


def test_a_run_that_stores_is_told_to_invert():
    words = ("arch=hybrid", "width=16", "backward=store", "batch=512")
    plan = make_plan(compose(*words, "memory_limit=300MiB"), CPU, 10, 32, 10_000)
    assert any(each.startswith("backward=invert (about ") for each in plan.alternatives)
    assert any(each.startswith("arch=layerwise width=32 backward=invert (about ") for each in plan.alternatives)


def test_an_alternative_has_what_its_yaml_sets_and_its_own_defaults(tmp_path, monkeypatch):
    (tmp_path / "conf/arch").mkdir(parents=True)
    (tmp_path / "conf/arch/wide.yaml").write_text("defaults: [chunked, _self_]\nwidth: 96\nexpansion: [1]\n")
    monkeypatch.setenv(registry.VARIABLE, str(tmp_path))
    assert registry.preset("arch", "wide")["depth"] == registry.preset("arch", "chunked")["depth"]
    assert registry.preset("arch", "wide")["width"] == 96 and registry.preset("arch", "absent") == {}
    before = read(compose("arch=hybrid", "residual_scale=0.1", "precision=bf16", "backward=store")).network
    other = revtrain.planning.plan._as_its_yaml_has_it("chunked", before)
    assert other == read(compose("arch=chunked", "precision=bf16")).network


def test_where_no_batch_fits_the_weights_are_to_blame(refusal, tmp_path):
    words = ("arch=layerwise", "width=16", "pooling=[channel]")
    for batch in ("auto", "64"):
        (tmp_path / "run/result.json").unlink(missing_ok=True)
        message = refusal(*TINY, *words, f"batch={batch}", "memory_limit=100KiB", "data.train_images=64")
        assert f"batch={1 if batch == 'auto' else 64} at 32x32" in message
        held = make_plan(compose(*TINY, *words, "batch=64"), CPU, 10, 32, 64)
        total = held.parameter_bytes + held.gradient_bytes + held.optimizer_bytes
        assert f"No batch fits: weights, gradients and momentum take {total / MIB:.1f} MiB." in message
        assert "batch=auto takes it" not in message


def test_auto_needs_a_limit_where_there_is_no_card(refusal):
    message = refusal(*TINY, "batch=auto")
    assert message.startswith("batch=auto was given without a limit; on cpu there is no card")
    assert "memory_limit=4GiB" in message and "batch=512" in message


# ---- runs ----------------------------------------------------------------------------------------


def test_a_run_with_auto_records_the_number(command):
    ran = command(*TINY, "batch=auto", "memory_limit=1MiB", "epochs=1")
    assert ran.code == 0, ran.err
    batch = ran.result["config"]["batch"]
    assert ran.result["status"] == "completed" and 2 <= batch < 52
    assert ran.result["plan"]["batch"] == ran.result["plan"]["largest_batch"] == batch
    assert read_checkpoint(ran.dir)["config"]["batch"] == batch
    assert read_metrics(ran.dir)[-1]["train_images"] == 52 // batch * batch
    assert f"batch {batch} needs" in (ran.dir / "train.log").read_text()

    # what fits may be another number by then; the run that is continued keeps its own
    resumed = command(*TINY, "batch=auto", "memory_limit=500KiB", f"resume={ran.dir}")
    assert resumed.code == 2 and f"batch={batch}" in resumed.err
    resumed = command(*TINY, "batch=auto", "memory_limit=2MiB", f"resume={ran.dir}")
    assert resumed.code == 0 and resumed.result["config"]["batch"] == batch
    log = (resumed.dir / "train.log").read_text()
    (warning,) = [line for line in log.splitlines() if "no longer bit-equal" in line]
    assert "epochs" in warning and "memory_limit" not in warning  # epochs differ; the limit changes no number


def test_plan_prints_the_plan_and_ends_without_the_data(command, monkeypatch):
    def load_data(cfg):
        raise AssertionError("the data was loaded")

    monkeypatch.setattr(revtrain.data, "load_data", load_data)
    ran = command(*TINY, "plan=true", "batch=auto", "memory_limit=1MiB")
    assert ran.code == 0, ran.err
    result = ran.result
    plan = result["plan"]
    assert result["status"] == "planned" and result["error"] is None and result["epochs"] == 0
    assert result["config"]["batch"] == plan["batch"] == plan["largest_batch"] < 52 == plan["training_images"]
    assert result["bytes_per_pixel"] == plan["bytes_per_pixel"] and result["params"] == plan["parameters"] > 0
    assert (
        result["memory_bytes"]["peak"]
        == plan["peak_bytes"]
        == sum(size for key, size in result["memory_bytes"].items() if key != "peak")
    )
    assert {path.name for path in ran.dir.iterdir()} == {".hydra", ".lock", "train.log", "result.json"}
    for line in (
        f"batch {plan['batch']} of 32x32",
        f"predicted peak  {plan['peak_bytes'] / MIB:>10,.1f} MiB  live bytes of a training step",
        "limit                  1.0 MiB  memory_limit=1MiB",
        "fits                       yes  ",
        f"largest batch   {plan['batch']:>14}  the training set has 52 images",
    ):
        assert line in ran.out
    assert "assumed" not in ran.out


def test_a_plan_that_does_not_fit_says_so_and_is_no_failure(command):
    ran = command(*TINY, "plan=true", "batch=52", "memory_limit=1MiB")
    assert ran.code == 0 and ran.result["status"] == "planned" and ran.result["plan"]["fits"] is False
    assert "fits                        no  " in ran.out and "MiB too much" in ran.out
    ran = command(*TINY, "plan=true")
    assert ran.code == 0 and ran.result["plan"]["fits"] is None and "limit" not in ran.out


def test_a_plan_of_a_folder_of_images_states_what_it_assumes(command):
    others = (word for word in TINY if not word.startswith("data"))  # of data=synthetic
    words = (*others, "data=imagefolder", "data.root=/no/such/folder", "plan=true", "memory_limit=1MiB")
    ran = command(*words)
    assert ran.code == 0, ran.err
    assert "10 classes and images of 32x32: data.root was not looked at" in ran.out
    assert "Give data.classes and data.image_size" in ran.out and "the training set" not in ran.out
    ran = command(*words, "data.classes=7", "data.image_size=16", "data.train_limit=30")
    assert "assumed" not in ran.out and "the training set has 30 images" in ran.out
    assert (ran.result["plan"]["classes"], ran.result["plan"]["image_size"]) == (7, 16)


def test_a_plan_refuses_a_batch_beyond_the_training_set(command):
    ran = command(*TINY, "plan=true", "batch=53")
    assert ran.code == 2
    assert ran.err.startswith("batch=53 was given; the training set has 52 images.\nUse batch=52 or less.")


def test_a_sweep_of_plans(command):
    ran = command("-m", *TINY, "plan=true", "memory_limit=1MiB", "batch=8,52")
    assert ran.code == 0
    listed = ran.out.partition("2 jobs in ")[2]
    assert "planned: batch 8, " in listed and "planned: batch 52, " in listed
    assert "MiB, fits\n" in listed and "MiB, does not fit\n" in listed


def test_a_probe_of_large_images_takes_no_more_than_a_step():
    cfg = read(compose("arch=chunked", "width=4", "depth=1", "pooling=[]"))
    for batch, side, images in ((1, 2048, 2), (8, 2048, 8), (1, 128, 16), (100, 32, 64)):
        assert probe_images(cfg.probe, batch, side**2) == images
        assert loop_bytes(cfg, CPU, batch, side, 1000)[0] == (
            4 * (1000 // batch) + 8 + 8 * 1000 + images * (3 * side**2 + 8)
        )
