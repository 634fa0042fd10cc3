"""The recipes of launch/recipes say what they cost, build their networks, plan a run, and train on stand-in images."""

import math

import pytest
from conftest import ROOT
from torch._subclasses.fake_tensor import FakeTensorMode

from trainer.config.parser import configure
from trainer.dry_run import dry_run

FOLDER = ROOT / "launch" / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.startswith("compare-"))
FINETUNE = "decoder-finetune"
# Of images that a user downloads or has, for GPUs; with networks that this machine trains in a second.
KL = {"width": 32, "blocks": 1}
RESIDUAL = {"width": 8, "blocks": 1}
TINY = {
    "celeba64": RESIDUAL,
    "cifar10-r3gan": RESIDUAL,
    FINETUNE: {},
    "ffhq256": RESIDUAL,
    "horse2zebra-cyclegan": {},
    "imagenet256-kl-f16": KL,
    "imagenet256-kl-f8": KL,
    "photos128": RESIDUAL,
}


@pytest.fixture
def standing_in(digits, request):
    """The arguments of a recipe with digits in place of its images and random weights in place of trained ones."""

    def arguments(recipe: str, networks: dict[str, object], **settings) -> list[str]:
        text = (FOLDER / f"{recipe}.yaml").read_text()
        train, test = (f"[{digits / s}, {digits / s}]" if "CycleGAN" in text else digits / s for s in ("train", "test"))
        given = {"config": FOLDER / f"{recipe}.yaml", "data.train": train, "data.test": test}
        if "perceptual_weights" in text and "system.perceptual_weights" not in settings:
            vgg16 = request.getfixturevalue("vgg16")
            given |= {"system.perceptual_weights": vgg16, "evaluate.lpips": vgg16}
        given |= {f"system.networks.{name}": value for name, value in networks.items()} | settings
        return [str(word) for name, value in given.items() for word in (f"--{name}", value)]

    return arguments


def full_size(recipe: str) -> list[dict[str, object]]:
    """Of the decoder that is tuned, which a test cannot download, Stable Diffusion's settings."""
    stable_diffusion = {"width": 128, "multipliers": [1, 2, 4, 4]}
    return [stable_diffusion, {"trainer.init_from": "null"}] if recipe == FINETUNE else [{}, {}]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_builds_its_networks_and_says_how_to_start_it_and_what_it_takes(recipe, standing_in):
    networks, settings = full_size(recipe)
    if "perceptual" in (FOLDER / f"{recipe}.yaml").read_text():  # whose file takes seconds to make
        settings |= {"system.perceptual_weight": 0, "system.perceptual_weights": "null"}
    config = configure(standing_in(recipe, networks, **settings))
    with FakeTensorMode():
        assert config.system().players()
    head = (FOLDER / f"{recipe}.yaml").read_text().partition("system:")[0]
    assert f"recipes/{recipe}.yaml" in head or f"RECIPE={recipe}" in head
    assert "images/s" in head
    assert recipe not in TINY or all(words in head for words in ("# Cost", "hours", "Expected score", "measured"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TINY)
def test_a_recipe_plans_its_run_on_eight_gpus(recipe, standing_in, tmp_path, capsys):
    networks, settings = full_size(recipe)
    settings |= {"trainer.run_dir": tmp_path / "run"}
    batch = configure(standing_in(recipe, networks, **settings)).trainer.batch_size
    processes = math.gcd(8, batch)
    assert not dry_run(configure([*standing_in(recipe, networks, **settings), "--dry_run", str(processes)]))
    plan = capsys.readouterr().out
    assert "peak memory of a process on a GPU" in plan
    assert f"{batch} images a step = {processes} process" in plan


@pytest.mark.parametrize("recipe", [pytest.param(one, marks=[pytest.mark.slow] * (one != "photos128")) for one in TINY])
def test_a_recipe_trains(recipe, standing_in, here, tiny_run, tmp_path):
    size = 64 if recipe == "imagenet256-kl-f16" else 32  # codes of a 16th of it
    settings = {"data.size": size, "data.channels": 1, "data.workers": 0, "evaluate.every": 0, "evaluate.lpips": "null"}
    settings |= {"trainer.steps": 2, "trainer.micro_batch": "null", "trainer.run_dir": tmp_path / "run"}
    if recipe != "horse2zebra-cyclegan":
        settings["trainer.batch_size"] = 2
    else:
        settings |= {"system.width": 8, "system.blocks": 1}
    if recipe == FINETUNE:
        settings["trainer.init_from"] = tiny_run("kl")
    done = here(*standing_in(recipe, TINY[recipe], **settings), small=[])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "state").read_text().strip() == "finished"
