"""The configuration: every yaml composes, later entries win, wrong values are refused with their remedy."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import revtrain.conf
from revtrain.conf import _given, compose, slug
from revtrain.config import all_keys, expected, flat, flatten, own_keys, read, registry, schema, sections, typed
from revtrain.config.help import keys_help
from revtrain.data import datasets
from revtrain.data.synthetic import facts
from revtrain.errors import RevtrainError
from revtrain.models import architectures, for_task

CONF = Path(revtrain.conf.__file__).parent
VARIANTS = {
    "layerwise_paper": "layerwise",
    "layerwise_no_epsilon": "layerwise",
    "revnet_gomez": "revnet",
    "hybrid_mixed": "hybrid",
    "hybrid_paper": "hybrid",
    "hybrid_batch_pooling": "hybrid",
}  # yamls of arch/ that set more than arch
FAST = {"zero_last"}  # what recipe=fast changes
YAMLS = [
    (group, path.stem)
    for group in ("arch", "data", "task", "recipe", "scale", "experiment")
    for path in (CONF / group).glob("*.yaml")
]


@pytest.mark.parametrize(("group", "name"), YAMLS)
def test_every_yaml_composes_and_is_valid(group, name):
    package = {"arch": "models", "data": "data"}.get(group)
    dense = package is not None and "segment" in registry.tasks(package, VARIANTS.get(name, name))
    cfg = compose([f"{group}={name}", "data.root=.", *(["task=segment"] if dense else [])])
    read(cfg)
    if group not in ("recipe", "scale"):
        chosen = {"arch": cfg.arch, "data": cfg.data.name, "task": cfg.task, "experiment": cfg.experiment}[group]
        assert chosen == VARIANTS.get(name, name)


@pytest.mark.parametrize(("group", "name"), YAMLS)
def test_every_yaml_states_its_command(group, name):
    assert re.search(rf"^# Command: revtrain .*\b{group}={name}\b", (CONF / group / f"{name}.yaml").read_text(), re.M)


def test_the_groups_are_those_of_the_schema():
    assert sorted(name for group, name in YAMLS if group == "arch") == sorted([*architectures(), *VARIANTS])
    assert sorted(name for group, name in YAMLS if group == "data") == sorted(datasets())


def test_the_scale_of_a_figure_is_one_word():
    small, full = (compose(["experiment=fig11_slope", *words]) for words in ([], ["scale=full"]))
    assert (small.width, small.epochs, small.data.train_limit) == (8, 3, 2000)
    assert (full.width, full.epochs, full.batch, full.data.train_limit) == (32, 40, 512, None)
    assert full.arch == "layerwise" and full.data.name == "imagefolder"


@pytest.mark.parametrize("arch", for_task("classify"))
def test_a_recipe_suits_every_architecture_and_the_papers_is_the_default(arch):
    fast, paper, default = (
        flatten(flat(read(compose([f"arch={arch}", "data=synthetic", *words]))))
        for words in (["recipe=fast"], ["recipe=paper"], [])
    )
    assert paper == default
    changed = {key for key in fast if fast[key] != paper[key]}
    own = {"zero_last"} if arch in own_keys("models")["zero_last"] else set()
    assert changed - {"zero_last"} == FAST - {"zero_last"} and changed & {"zero_last"} == own & FAST


def test_a_recipe_gives_way_to_an_experiment_and_to_the_command_line():
    assert read(compose(["recipe=fast", "experiment=quickstart"])).training.warmup == 0.1
    assert read(compose(["data=synthetic", "recipe=fast", "warmup=0.3"])).training.warmup == 0.3


def test_a_group_beside_resume_gives_its_keys():
    assert {"width", "depth", "pooling"} <= _given(["size=180k"])
    assert "data.augment.alternate_flip" in _given(["recipe=paper"])


def test_yaml_and_schema_agree_on_the_defaults():
    composed, schema_defaults = compose(["data=synthetic"]), OmegaConf.structured(schema())
    from_arch = OmegaConf.load(CONF / "arch/hybrid.yaml").keys()
    for item in fields(schema()):
        if item.name not in from_arch:
            assert composed[item.name] == schema_defaults[item.name], item.name


def test_defaults_of_the_contract():
    cfg = compose()
    assert (cfg.arch, cfg.data.name, cfg.experiment) == ("hybrid", "cifar10", None)
    assert (cfg.slope, cfg.backward, cfg.precision, cfg.device) == (0.2, "invert", "fp32", "auto")


def test_command_line_wins_over_experiment_and_experiment_over_groups():
    plain = compose(["experiment=quickstart"])
    assert plain.arch == "hybrid" and plain.data.name == "synthetic"
    assert plain.width != compose(["arch=hybrid"]).width
    cfg = compose(["experiment=quickstart", "width=24", "arch=layerwise", "data=imagefolder"])
    assert (cfg.width, cfg.arch, cfg.data.name) == (24, "layerwise", "imagefolder")
    assert cfg.batch == plain.batch


def test_the_quickstart_shows_what_revtrain_is_for():
    cfg = read(compose(["experiment=quickstart"]))
    assert (cfg.network.arch, cfg.network.backward, cfg.network.own.stream) == ("hybrid", "invert", "auto")
    assert cfg.data.name == "synthetic" and facts(cfg.data).image_size == 32  # no download


@pytest.mark.parametrize("arch", [*for_task("classify"), *VARIANTS])
@pytest.mark.parametrize("data", [name for name in datasets() if "mask" not in name])
def test_the_quickstart_runs_with_another_arch_and_data(arch, data):
    cfg = read(compose(["experiment=quickstart", f"arch={arch}", f"data={data}", "data.root=."]))
    assert (cfg.network.arch, cfg.data.name) == (VARIANTS.get(arch, arch), data)


WRONG = [
    (["depth=0"], "depth=0", "at least 1"),
    (["depth=-1"], "depth=-1", "at least 1"),
    (["depth=null"], "depth=null", "at least 1"),
    (["width=0"], "width=0", "at least 1"),
    (["width=33"], "width=33", "even", "width=32 or width=34"),
    (["arch=revnet", "width=1"], "width=1", "even", "width=2"),
    (["slope=0"], "slope=0 ", "0 < slope <= 1", "slope=0.2"),
    (["slope=-0.2"], "slope=-0.2", "0 < slope <= 1"),
    (["slope=2"], "slope=2 ", "0 < slope <= 1", "inverse: slope=0.5"),
    (["slope=nan"], "slope=nan", "0 < slope <= 1"),
    (["slope=inf"], "slope=inf", "Try slope=0.2"),
    (["norm_sign=both"], "norm_sign=both", "positive, mixed, negative"),
    (["init_gain=0"], "init_gain=0", "greater than 0"),
    (["max_gain=-1"], "max_gain=-1", "greater than 0"),
    (["epsilon_i=-0.1"], "epsilon_i=-0.1", "at least 0", "default is epsilon_i=0.1"),
    (["pooling=[chanel]"], "pooling=chanel", "channel, batch, stride", "Did you mean channel?"),
    (["backward=recompute"], "backward=recompute", "invert, store"),
    (["chunk_mib=0"], "chunk_mib=0", "greater than 0"),
    (["batch=0"], "batch=0", "One image can be the batch"),
    (["epochs=0"], "epochs=0", "at least 1"),
    (["lr=0"], "lr=0", "greater than 0"),
    (["lr=nan"], "lr=nan", "greater than 0"),
    (["momentum=1"], "momentum=1", "at least 0 and below 1"),
    (["weight_decay=-1"], "weight_decay=-1", "at least 0"),
    (["label_smoothing=1"], "label_smoothing=1", "below 1"),
    (["schedule=cosin"], "schedule=cosin", "Did you mean cosine?"),
    (["warmup=1"], "warmup=1", "below 1"),
    (["clip_grad_norm=0"], "clip_grad_norm=0", "greater than 0"),
    (["precision=fp8"], "precision=fp8", "fp32, bf16, fp16"),
    (["device=gpu"], "device=gpu", "cuda:N"),
    (["seed=-1"], "seed=-1", "at least 0"),
    (["resume=no/such/run"], "resume=no/such/run", "no such file or run directory"),
    (["probe.batch=1"], "probe.batch=1", "at least 2"),
    (["probe.every=-1"], "probe.every=-1", "never probe"),
    (["data=imagefolder"], "without data.root", "train/CLASS"),
    (["data.name=mnist"], "data=mnist", "cifar10, far_apart, imagefolder, maskfolder, synthetic"),
    (["data.train_limit=0"], "data.train_limit=0", "at least 1"),
    (["data.classes=1"], "data.classes=1", "at least 2"),
    (["data.image_size=0"], "data.image_size=0", "at least 1"),
    (["data.augment.pad=-1"], "data.augment.pad=-1", "at least 0"),
    (["data.augment.cutout=-1"], "data.augment.cutout=-1", "at least 0"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: " ".join(case[0]))
def test_wrong_values_are_refused_with_their_remedy(case):
    overrides, *fragments = case
    with pytest.raises(RevtrainError) as caught:
        read(compose(overrides))
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert 2 <= len(message.splitlines()) <= 5


def test_resnet18_takes_any_width_and_both_backwards():
    read(compose(["arch=resnet18", "width=33", "backward=invert"]))
    read(compose(["arch=resnet18", "width=33", "backward=store"]))


def test_schema_lists_nested_keys_and_their_types_in_words():
    assert {"arch", "data.root", "data.augment.pad", "probe.every"} <= all_keys().keys()
    assert set(sections()) == {"data", "data.augment", "probe"}
    assert expected("batch") == "a whole number, or auto"
    assert expected("depth") == "a whole number or null"
    assert expected("grid_bits") == "a whole number or null"
    assert expected("lr") == "a number"
    assert expected("data.augment.flip") == "true or false"
    assert "list" in expected("pooling")
    assert "data.KEY=VALUE" in expected("data")


def test_help_names_every_key():
    text = keys_help()
    missing = [
        key
        for key in all_keys()
        if key not in ("arch", "data", "data.name", "experiment", "probe", "data.augment")
        and key not in text
        and f".{key.rpartition('.')[2]}" not in text
    ]
    assert not missing


def test_slug_makes_short_plain_names():
    assert slug("depth-4_data.root-/a b=c,d") == "depth-4_data.root-a-b-c-d"
    assert len(slug("x" * 500)) == 80
    assert slug("0-") == "0"


def test_help_shows_every_owners_default_of_a_key():
    (line,) = (line for line in keys_help().splitlines() if line.strip().startswith("data.train_images"))
    assert line.endswith("[256 or 10000]")
    assert "with data=far_apart or synthetic" in keys_help()


def test_values_in_messages_can_be_typed():
    """A whole configuration, its values given back as messages have them, is the same."""
    base = ["arch=chunked", "data=synthetic"]
    before = flatten(OmegaConf.to_container(compose([*base, "data.image_size=[32,96]", "lr=0.123456789"])))
    words = [
        f"{name}={typed(value)}"
        for name, value in before.items()
        if name in all_keys().keys() - {"arch"} and value != ""
    ]
    assert flatten(OmegaConf.to_container(compose([*base, *words]))) == before
    assert {"data.image_size=[32,96]", "lr=0.123456789", "data.augment.flip=true", "resume=null"} <= set(words)
