import dataclasses
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from model.config import AugmentationConfig, LatentConfig
from pretrain.config import RunConfig
from pretrain.data_config import ShardData, ToyFunctionsData
from pretrain.recipes import build, recipes
from pretrain.settings import KINDS, dump_config, known_keys, load_config, validate

SMALL = {"name": "x", "data": {"kind": "shards", "path": "somewhere"}}


def problem(*overrides: str) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        validate(SMALL, overrides)
    return str(caught.value)


def test_every_problem_is_listed_at_once() -> None:
    text = problem("optim.lrr=1", "train.steps=many", "log.evry=3", "model.backbone.norm=batchnorm")
    lines = text.splitlines()
    assert len(lines) == 5
    assert "optim.lrr is not a setting: did you mean optim.lr?" in text
    assert "train.steps='many'" in text
    assert "did you mean log.every?" in text
    assert "'layernorm' or 'rmsnorm'" in text


def test_every_inconsistency_is_listed_at_once() -> None:
    text = problem(
        "train.batch_tokens=1000",
        "train.ema_decay=1",
        "model.backbone.num_heads=7",
        "model.schedule.t_min=2",
        "checkpoint.keep=0",
    )
    assert len(text.splitlines()) == 6
    assert "train.batch_tokens=1000 is not a positive multiple of data.length=256: the nearest is 1024" in text
    assert "use one of [1, 2, 4, 8, 16, 32, 64, 128] or set head_dim" in text


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.batch_token", "train.batch_tokens"),
        ("lr", "optim.lr"),
        ("model.backbone.heads", "model.backbone.num_heads"),
        ("data.lenght", "data.length"),
        ("model.head", "model.backbone.head_dim"),
        ("model.num_layers", "model.backbone.num_layers"),
        ("optim.rl", "optim.lr"),
        ("train.keep_last", "checkpoint.keep"),
        ("kl_weight", "train.kl_weight"),
        ("model.latent.dmi", "model.latent.dim"),
        ("model.latent.num_layers", "model.latent.recognition.num_layers"),
        ("model.latent.recognition.layers", "model.latent.recognition.num_layers"),
        ("model.augmentation.fusoin", "model.augmentation.fusion"),
        ("model.backbone.dimm", "model.backbone.dim"),
    ],
)
def test_unknown_keys_name_the_nearest(key: str, nearest: str) -> None:
    assert problem(f"{key}=1") == f"{key} is not a setting: did you mean {nearest}?"


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.steps=1.5", "train.steps=1.5"),
        ("model.time_conditioning=perhaps", "model.time_conditioning='perhaps'"),
        ("optim.lr.peak=3", "optim.lr"),
        ("model=3", "model=3"),
        ("data=3", "data=3"),
        ("data.kind=images", "data.kind='images' is not one of shards, toy_functions, patterns, points, sudoku"),
        ("model.backbone.kind=unet", "model.backbone.kind='unet' is not one of transformer, point_mlp"),
        ("model.backbone=null", "model.backbone=None: model.backbone is a group of settings"),
        ("model.latent=3", "model.latent=3: model.latent is a group of settings"),
        ("model.latent.prior=uniform", "'normal', 'x_t' or 'earlier_blocks'"),
        ("model.augmentation.scale=2", "'half_life' or 'literal'"),
        ("train.freeze=denoiser", "train.freeze='denoiser': input should be a valid list"),
        ("train.freeze=['(']", "train.freeze: '(' is not a regular expression"),
        ("train.kl_weight=-1", "train.kl_weight=-1"),
        ("train.precision=fp8", "'fp32' or 'bf16'"),
        ("train.precision", "write dotted.key=value"),
        ("=3", "write dotted.key=value"),
        ("optim.lr=[1", "optim.lr"),
        ("optim.lr=-1", "optim.lr=-1"),
        ("optim.beta2=1", "optim.beta2=1"),
        ("optim.warmup_steps=-1", "optim.warmup_steps=-1"),
        ("optim.weight_decay=-0.1", "optim.weight_decay=-0.1"),
        ("validation.num_sequences=0", "validation.num_sequences=0"),
        ("data.length=0", "data.length=0"),
        ("data.num_workers=-1", "data.num_workers=-1"),
        ("optim.lr=.nan", "optim.lr=nan"),
        ("optim.min_lr_ratio=.nan", "optim.min_lr_ratio=nan"),
        ("train.clip_norm=.nan", "train.clip_norm=nan"),
        ("train.ema_decay=.nan", "train.ema_decay=nan"),
        ("name=", "name=''"),
        ("name=a/b", "name='a/b' must be one name without separators"),
        ("name=..", "name='..'"),
    ],
)
def test_bad_values_are_refused_by_name(override: str, part: str) -> None:
    text = problem(override)
    assert part in text
    assert len(text.splitlines()) == 1
    assert "Config" not in text


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"num_trees": 1}, "data.num_trees=1 must be at least 2"),
        ({"num_trees": 0}, "data.num_trees=0 must be at least 2"),
        ({"num_held_out": 0}, "data.num_held_out=0 must lie between 1 and 11999"),
        ({"num_trees": 10, "num_held_out": 10}, "data.num_held_out=10 must lie between 1 and 9"),
        ({"variants": 0}, "data.variants=0 must be at least 1"),
        ({"vocab_size": 258}, "data.vocab_size=258 must be at least 259"),
    ],
)
def test_toy_functions_must_be_some(settings: dict[str, int], part: str) -> None:
    tree = {"name": "x", "data": {"kind": "toy_functions", **settings}, "train": {"batch_tokens": 96}}
    with pytest.raises(ValueError, match=r".") as caught:
        validate(tree)
    assert str(caught.value).startswith(part)


def test_overrides_reach_every_depth_and_keep_the_tree() -> None:
    tree = {**SMALL, "optim": {"beta1": 0.8}}
    config = validate(tree, ["optim.lr=3e-4", "model.backbone.dim=128", "train.micro_batch_tokens=null", "seed=7"])
    assert (config.optim.lr, config.optim.beta1) == (3e-4, 0.8)
    assert config.model.backbone.dim == 128
    assert config.train.micro_batch_tokens is None
    assert config.seed == 7
    assert tree["optim"] == {"beta1": 0.8}
    assert validate(SMALL, ["seed=1", "seed=2"]).seed == 2


def test_the_kind_of_a_group_decides_its_keys() -> None:
    assert isinstance(validate(SMALL).data, ShardData)
    assert isinstance(validate({"name": "x", "data": {"kind": "toy_functions", "length": 128}}).data, ToyFunctionsData)
    assert problem("data.variants=3") == "data.variants is not a setting of data.kind=shards"
    assert problem("data.size=4") == "data.size is not a setting of data.kind=shards"
    text = problem("model.backbone.num_dimensions=3", "model.backbone.num_heads=4")
    assert text == "model.backbone.num_dimensions is not a setting of model.backbone.kind=transformer"
    text = problem("model.backbone.kind=point_mlp", "model.backbone.num_heads=4", "model.backbone.num_layer=4")
    assert text.splitlines()[1:] == [
        "- model.backbone.num_heads is not a setting of model.backbone.kind=point_mlp",
        "- model.backbone.num_layer is not a setting: did you mean model.backbone.num_layers?",
    ]
    with pytest.raises(ValueError, match=r"^data\.kind is missing: set it to one of shards, toy_functions"):
        validate({"name": "x", "data": {"path": "somewhere"}})


def test_a_switch_that_is_off_is_turned_on_by_any_of_its_settings() -> None:
    assert validate(SMALL).model.latent is None
    config = validate(asdict(validate(SMALL)), ["model.latent.dim=8", "model.latent.inject=embedding"])
    assert config.model.latent == LatentConfig(dim=8, inject="embedding")
    assert validate(SMALL, ["model.augmentation={}"]).model.augmentation == AugmentationConfig()
    back = validate(asdict(config), ["model.latent=null", "model.augmentation.gated=true"])
    assert back.model.latent is None
    assert back.model.augmentation == AugmentationConfig(gated=True)


def test_a_frozen_projection_that_passes_no_hint_is_refused() -> None:
    concat = ("model.augmentation.fusion=concat", "train.freeze=[augmentation\\..*]")
    assert "freezes the projection of augmentation.fusion=concat" in problem(*concat)
    assert validate(SMALL, [concat[0], "train.freeze=[denoiser\\..*]"]).train.freeze == ("denoiser\\..*",)
    assert validate(SMALL, ["model.augmentation.fusion=add", concat[1]]).train.freeze


def test_a_weight_that_does_not_rise_is_not_held() -> None:
    assert "train.kl_hold_steps=5 has no use with train.kl_anneal_steps=0" in problem("train.kl_hold_steps=5")
    assert "train.kl_hold_steps=-1 must be at least 0" in problem("train.kl_hold_steps=-1")
    assert validate(SMALL, ["train.kl_hold_steps=5", "train.kl_anneal_steps=9"]).train.kl_hold_steps == 5


def test_positions_that_do_not_divide_are_refused() -> None:
    length = ("data.length=30", "train.batch_tokens=300")
    axes = ("parallel.tensor=2", "parallel.context=2")
    text = problem(*length, *axes)
    assert "data.length=30 does not divide among parallel.context=2 x parallel.tensor=2 processes: use a mult" in text
    assert validate(SMALL, [*length, axes[0]]).parallel.tensor == 2
    assert validate(SMALL, [*length, *axes, "model.block_size=10"]).model.block_size == 10, "two streams of 30"
    assert validate(SMALL, [*length, "parallel.tensor=4", "engine=megatron"]).engine == "megatron"


def test_axes_that_deepspeed_does_not_know_are_refused() -> None:
    text = problem("engine=deepspeed", "parallel.tensor=2", "parallel.context=4", "parallel.replicate=2")
    assert len(text.splitlines()) == 4
    for name, value in (("tensor", 2), ("context", 4), ("replicate", 2)):
        assert f"parallel.{name}={value} does not go with engine=deepspeed: set parallel.{name}=1, or" in text
    assert "set parallel.zero_stage=3, or engine=deepspeed" in problem("parallel.zero_stage=1")
    assert "parallel.zero_stage=2, or engine=fsdp" in problem("engine=deepspeed", "train.compile=true")
    assert validate(SMALL, ["engine=deepspeed", "parallel.zero_stage=2", "train.compile=true"]).train.compile
    assert validate(SMALL, ["engine=deepspeed", "parallel.zero_stage=1", "parallel.offload=true"]).engine == "deepspeed"


def test_settings_are_frozen() -> None:
    config = validate(SMALL)
    for settings in (config, config.data, config.model, config.model.backbone, config.optim, config.train):
        name = dataclasses.fields(settings)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(settings, name, 1)


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_survives_yaml(tmp_path: Path, name: str) -> None:
    config = build(name)
    assert config.name == name
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert validate(yaml.safe_load(dump_config(config)), ["seed=5"]) == dataclasses.replace(config, seed=5)


@pytest.mark.parametrize("data", KINDS["data"])
@pytest.mark.parametrize("backbone", KINDS["model.backbone"])
def test_every_known_key_is_a_setting(data: str, backbone: str) -> None:
    kinds = {"data": data, "model.backbone": backbone}
    keys = list(known_keys(kinds))
    assert len(keys) == len(set(keys)) > 60
    leaves = [k for k in keys if not any(other.startswith(f"{k}.") for other in keys)]
    chosen = [f"{path}.kind={kind}" for path, kind in kinds.items()]
    wrong = [f"{key}={{}}" for key in leaves if key.removesuffix(".kind") not in kinds]
    with pytest.raises(ValueError, match=r".") as caught:
        validate({"name": "x"}, [*wrong, *chosen, "nonsense=1"])
    said = [line.removeprefix("- ") for line in str(caught.value).splitlines()[1:]]
    assert [line for line in said if "is not a setting" in line] == [
        "nonsense is not a setting: `penumbra recipes RECIPE` lists all of a recipe"
    ]
    assert {line.partition(":")[0].partition("=")[0] for line in said[:-1]} >= {w.removesuffix("={}") for w in wrong}


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="'toy_function' is not a recipe: did you mean toy_functions"):
        build("toy_function")


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "", b"\xff\xfe"])
def test_a_file_that_holds_no_settings_is_refused(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"config\.yaml .*: pass the config\.yaml of a run"):
        load_config(path)
    with pytest.raises(ValueError, match="can not be read"):
        load_config(tmp_path / "none.yaml")


def test_a_misspelled_file_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "trian": {"steps": 3}}))
    with pytest.raises(ValueError, match="trian is not a setting: did you mean train"):
        load_config(path)


def test_the_default_folder_is_the_name() -> None:
    assert validate(SMALL).path == Path("runs/x")
    assert validate(SMALL, ["folder=elsewhere/y"]).path == Path("elsewhere/y")
    assert isinstance(validate(SMALL), RunConfig)
