"""A user's mistake is one clear message with exit code 2, before any training; what is given is what is used."""

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from models import VAEGAN, DiscriminatorConfig, OptimizerConfig
from trainer.config.messages import SECTIONS
from trainer.config.parser import configure
from trainer.config.resume import differences
from trainer.distributed.exit import user_errors

DATA = ["--data.train", "nowhere"]


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped, user_errors():
        configure([*arguments]).system().players()
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message.startswith("error: ")
    assert len(message.splitlines()) <= 2
    return message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--system", "VAE", "--system.latentdim", "3"], ["system.latentdim", "not accepted"]),
        (["--system", "VAE", "--system.autoencoder.rate", "3"], ["system.autoencoder.rate"]),
        (["--system", "AE", "--system.kl_weight", "3"], ["system.kl_weight", "not accepted"]),
        (["--system", "WGAN"], ["WGAN", "AE, CycleGAN, GAN, GANVAE, VAE, VAEGAN"]),
        (["--system", "VAEGAN", "--system.discriminator", "quaternary"], ["system.discriminator", "ternary"]),
        (["--system", "VAE", "--system.latent_dim", "0"], ["system.latent_dim is 0"]),
        (["--system", "VAE", "--system.autoencoder.lr", "x"], ["system.autoencoder.lr must be a number, or {start"]),
        (
            ["--system", "VAE", "--system.autoencoder.lr", "{start: 1}"],
            ["system.autoencoder.lr must be a number, or {"],
        ),
        (
            ["--system", "VAEGAN", "--system.binary.r1_weight", "x"],
            ["system.binary.r1_weight must be a number, or {start"],
        ),
        (
            ["--system", "VAEGAN", "--system.binary.betas", "1"],
            ["system.binary.betas must be [number, number or schedule]; got 1\n"],
        ),
        (["--system", "VAE", "--trainer.ema_half_life", "0"], ["trainer.ema_half_life must be a number, or {start"]),
        (
            ["--system", "VAE", "--trainer.ema_half_life", "{start: 0, end: 1, steps: 0}"],
            ["trainer.ema_half_life is 0 to 1 in 0 steps, expected images from 0 on, and steps above 0"],
        ),
        (["--system", "VAE", "--system.autoencoder.lr", "0"], ["system.autoencoder.lr is 0"]),
        (["--system", "VAE", "--trainer.stepps", "3"], ["trainer.stepps"]),
        (["--system", "VAE", "--trainer.steps", "0"], ["trainer.steps must be a whole number above 0; got 0"]),
        (["--system", "VAE", "--trainer.steps", "many"], ["trainer.steps must be a whole number above 0; got many"]),
        (
            ["--system", "VAE", "--trainer.micro_batch", "0"],
            ["trainer.micro_batch must be a whole number above 0; got"],
        ),
        (["--system", "VAE", "--data.cache_gb", "-1"], ["data.cache_gb must be a number above 0; got -1"]),
        (["--system", "VAE", "--data.crop", "[1, 0.5]"], ["data.crop must be two fractions, the smaller first"]),
        (
            ["--system", "VAE", "--data.crop", "center"],
            ["data.crop must be random, or [number, number], or null; got ce"],
        ),
        *(
            (
                ["--system", "VAE", "--data.size", size],
                [f"must be a whole number, or [whole number, whole number]; {got}\n"],
            )
            for size, got in (
                ("32x48", "got 32x48"),
                ("[32,48,3]", "got [32, 48, 3]"),
                ("[16.5, 32]", "got [16.5, 32]"),
            )
        ),
        (
            ["--system", "VAEGAN", "--system.ternary.augment", "colour"],
            ["system.ternary.augment must be a list of color, translation, cutout; got colour\n"],
        ),
        (
            ["--system", "VAE", "--system.networks.attention", "16"],
            ["system.networks.attention must be a list of whole numbers; got 16\n"],
        ),
        (
            ["--system", "VAE", "--system.networks.multipliers", "2"],
            ["system.networks.multipliers must be a list of whole numbers, or null; got 2\n"],
        ),
        (
            ["--system", "VAE", "--system.networks.multipliers", "[2, x]"],
            ["system.networks.multipliers must be a list of whole numbers, or null; got [2, 'x']\n"],
        ),
        (
            ["--system", "VAE", "--trainer.ema_lengths", "0.1"],
            ["trainer.ema_lengths must be a list of numbers; got 0.1\n"],
        ),
        (
            ["--system", "VAE", "--evaluate.metrics", "fid,foo"],
            ["evaluate.metrics must be a list of fid, is, kid, prdc; got fid,foo\n"],
        ),
        (["--system", "VAE", "--data.max_skipped", "2"], ["data.max_skipped must be between 0 and 1; got 2.0"]),
        (
            ["--system", "VAE", "--evaluate.num", "1"],
            ["evaluate.num must be 0, which scores no samples, or"],
        ),
        (
            ["--system", "VAE", "--evaluate.metrics", "[fid, lpips]"],
            ["evaluate.metrics must be a list of fid, is, kid, prdc; got lpips"],
        ),
        (["--system", "VAE", "--evaluate.budget", "2"], ["evaluate.budget must be above 0 and at most 1; got 2.0"]),
        (["--system", "VAE", "--trainer.trackers", "[wandbb]"], ["trainer.trackers has 'wandbb'", "wandb]'", "mlflow"]),
        (["--system", "VAE", "--trainer.precision", "fp8"], ["trainer.precision", "bf16", "fp8"]),
        (["--system", "GAN", "--evaluate.best", "rfid"], ["evaluate.best is rfid, but GAN makes"]),
        (["--system", "VAE", "--trainer.run_dir", ""], ["trainer.run_dir", "a path or a URL", "empty text"]),
        (["--system", "VAE", "--data.channels", "2000"], ["data.channels must be 1 to 1024; got 2000"]),
        (["--system", "VAE", "--data.size", "33"], ["33 pixels", "data.size"]),
        (["--system", "VAE", "--system.kl_weight", "0", "--system.kl_warmup", "9"], ["system.kl_warmup has no effect"]),
        (["--config", "nowhere.yaml"], ["--config nowhere.yaml cannot be read: No such file or directory"]),
        ([], ["required: system"]),
    ],
)
def test_mistakes_are_named(capsys, arguments, words):
    message = refused(capsys, *DATA, *arguments)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(("best", "judged_by"), [([], "fid"), (["--evaluate.best", "rfid"], "rfid")])
def test_a_setting_decides_which_score_judges_a_tokenizer(best, judged_by):
    config = configure([*DATA, "--system", "VAE", "--system.kl_weight", "1e-6", *best])
    assert config.system().judged_by == judged_by


@pytest.mark.parametrize(
    ("system", "num"),
    [
        (["GAN"], 2000),
        (["VAE"], 2000),
        (["VAE", "--evaluate.best", "rfid"], 2000),
        (["AE"], 0),
        (["VAE", "--system.kl_weight", "0"], 0),
        (["VAEGAN", "--system.samples", "false"], 0),
        (["VAEGAN", "--system.samples", "false", "--evaluate.num", "9"], 9),
        (["AE", "--evaluate.best", "fid"], 2000),
        (["VAE", "--evaluate.best", "rfid", "--evaluate.num", "0"], 0),
    ],
)
def test_systems_for_reconstructions_alone_draw_no_samples_unless_asked(system, num):
    config = configure([*DATA, "--system", *system])
    config.system()
    assert config.evaluate.num == config.resolved()["evaluate"]["num"] == num


@pytest.mark.parametrize(("system", "cure"), [("GAN", "evaluate.every 0"), ("VAE", "evaluate.best rfid")])
def test_what_is_judged_by_samples_is_not_scored_without_them(system, cure):
    config = configure([*DATA, "--system", system, "--evaluate.num", "0"])
    with pytest.raises(ValueError, match=f"evaluate.num is 0, but {system} is judged .* at least 2, or {cure}"):
        config.system()


def settings_of(name: str, kind: type) -> str:
    return f"{name} has {', '.join(sorted(field.name for field in fields(kind)))}"


OF_OPTIMIZER = settings_of("system.autoencoder", OptimizerConfig)
OF_DISCRIMINATOR = settings_of("system.binary", DiscriminatorConfig)


@pytest.mark.parametrize(
    ("arguments", "end"),
    [
        (["VAE", "--system.kl_wieght", "1"], "did you mean system.kl_weight?"),
        (["VAE", "--system.networks.widht", "1"], "did you mean system.networks.width?"),
        (["VAE", "--system.newtorks.width", "1"], "did you mean system.networks.width?"),
        (["VAEGAN", "--system.binary.rate", "1"], f"'system.binary.rate' is not accepted: {OF_DISCRIMINATOR}"),
        (["VAEGAN", "--system.binary.r1_wieght", "1"], "did you mean system.binary.r1_weight?"),
        (["VAE", "--trainer.setps=1"], "did you mean trainer.steps?"),
        (["VAE", "--setps", "1"], "did you mean trainer.steps?"),
        (["VAE", "--trainer.step", "1"], "did you mean trainer.steps?"),
        (["VAE", "--system.seed", "1"], "did you mean trainer.seed?"),
        (["VAE", "--sytem", "AE"], "did you mean system?"),
        (["VAEGAM"], "got VAEGAM: did you mean VAEGAN?"),
        (["AE", "--system.kl_weight", "1"], "it is a setting of VAE, VAEGAN"),
        (["VAE", "--system.autoencoder.rate", "1"], f"--system.autoencoder.rate=1: {OF_OPTIMIZER}"),
        (["VAE", "--system.hello.you", "1"], "--system.hello.you=1"),
        (["VAE", "--trainer.hello", "1"], "--trainer.hello 1"),  # nothing is like it, and there is much else
    ],
)
def test_what_was_perhaps_meant(capsys, arguments, end):
    assert refused(capsys, *DATA, "--system", *arguments).splitlines()[0].endswith(end)


@pytest.mark.parametrize(
    ("group", "value"), [("evaluate", "null"), ("data", "PHOTOS"), ("data", "it's"), ("trainer", "3")]
)
def test_a_value_for_a_group_of_settings_is_refused_with_their_names(capsys, group, value):
    message = refused(capsys, *DATA, "--system", "VAE", f"--{group}", value).splitlines()[0]
    names = ", ".join(f"{group}.{field.name}" for field in fields(SECTIONS[group]))
    assert message == f"error: {group} is a group of settings; got {value}. Set one of {names}"


def test_of_a_group_from_a_file_the_wrong_setting_is_named(capsys, tmp_path):
    (tmp_path / "data.yaml").write_text("bits: 12")
    for value in (tmp_path / "data.yaml", '{"bits": 12}'):
        message = refused(capsys, *DATA, "--system", "VAE", "--data", str(value)).splitlines()[0]
        assert message == "error: data.bits must be one of [8, 16]; got 12"
    (tmp_path / "null.yaml").write_text("evaluate: null")
    message = refused(capsys, *DATA, "--system", "VAE", "--config", str(tmp_path / "null.yaml"))
    assert message.startswith("error: evaluate is a group of settings; got null. Set one of evaluate.every, ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evaluate: {budget: null}", "evaluate.budget is null, expected number above 0"),
        ("system: {class_path: VAE, init_args: {kl_weight: null}}", "system.kl_weight is null, expected number"),
        (
            "system: {class_path: VAEGAN, init_args: {binary: {lr: null}, networks: {width: 8}}}",
            "system.binary.lr is null, expected number or schedule",
        ),
    ],
)
def test_null_in_a_recipe_is_refused_where_a_value_is_needed(capsys, tmp_path, text, message):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    system = [] if "system" in text else ["--system", "VAE"]
    assert refused(capsys, "--config", str(recipe), *system, *DATA).startswith(f"error: {message}\n")


def test_a_recipe_says_so_too(capsys, tmp_path):
    (tmp_path / "mine.yaml").write_text("{system: VAE, data: {train: x}, trainer: {setps: 3}}")
    assert "'setps': did you mean trainer.steps?" in refused(capsys, "--config", str(tmp_path / "mine.yaml"))
    missing = refused(capsys, "--config", str(ROOT / "launch" / "recipes" / "digitsvae.yaml"))
    assert "No such file or directory. Did you mean digits-vae or " in missing
    assert " has celeba64, cifar10-gan, cifar10-r3gan, " in missing
    assert "compare-" not in missing
    compared = refused(capsys, "--config", "compare-mnist.yaml")
    assert "is of a comparison: python -m trainer.compare --config compare-mnist.yaml trains it" in compared


def test_missing_data_is_required(capsys):
    assert "data.train" in refused(capsys, "--system", "VAE")


def test_broken_yaml_is_named(capsys, tmp_path):
    (tmp_path / "broken.yaml").write_text("system: [")
    assert "config" in refused(capsys, "--config", str(tmp_path / "broken.yaml"))


def test_a_mistake_is_told_once_a_machine(capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit):
        configure(["--system", "VAE", "--data.trian", "x"])
    assert capsys.readouterr().err == ""


def test_settings_reach_their_objects():
    ternary = ["--system.discriminator", "both", "--system.ternary.lr", "0.5"]
    others = ["--data.size", "64", "--trainer.steps", "7", "--evaluate.num", "99"]
    light = ["--system.networks.family", "dcgan", "--system.networks.norm", "group"]
    config = configure([*DATA, "--system", "VAEGAN", *light, *ternary, *others])
    system = config.system()
    assert isinstance(system, VAEGAN)
    assert {player.name: player.optimizer.lr for player in system.players()}["ternary"] == 0.5
    assert system.encoder.head.in_features == 128 * 4 * 4 * 2  # 64 pixels are four levels
    assert (config.trainer.steps, config.evaluate.num, config.data.size) == (7, 99, 64)


def test_paths_in_a_file_are_relative_to_it_and_on_the_command_line_to_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    recipe = tmp_path / "recipes" / "mine.yaml"
    recipe.write_text("system: AE\ndata: {train: ../shards, test: /absolute}\n")
    monkeypatch.chdir(tmp_path / "recipes")
    config = configure(["--config", "mine.yaml"])
    assert config.data.train == str(tmp_path / "shards")
    assert config.data.test == "/absolute"
    assert config.run_dir == Path.cwd() / "runs" / "mine"
    assert configure(["--config", "mine.yaml", "--data.train", "here"]).data.train == str(Path.cwd() / "here")
    assert configure([*DATA, "--system", "VAE"]).run_dir == Path.cwd() / "runs" / "vae"


def test_a_perceptual_networks_file_is_found_like_other_paths(tmp_path, monkeypatch):
    (tmp_path / "recipes").mkdir()
    recipe = tmp_path / "recipes" / "mine.yaml"
    settings = "{perceptual_weight: 1, perceptual_weights: ../vgg.pth}"
    recipe.write_text(f"system: {{class_path: VAEGAN, init_args: {settings}}}\ndata: {{train: shards}}\n")
    monkeypatch.chdir(tmp_path)
    for arguments, expected in (([], "vgg.pth"), (["--system.perceptual_weights", "here.pth"], "here.pth")):
        given = configure(["--config", "recipes/mine.yaml", *arguments]).resolved()["system"]["init_args"]
        assert given["perceptual_weights"] == str(tmp_path / expected)


def test_the_resolved_configuration_gives_the_same_run(tmp_path):
    config = configure([*DATA, "--system", "VAEGAN", "--system.binary.r1_weight", "3", "--trainer.seed", "5"])
    (tmp_path / "config.yaml").write_text(config.yaml)
    again = configure(["--config", str(tmp_path / "config.yaml")])
    assert again.resolved() == config.resolved()


def test_the_order_of_arguments_does_not_matter():
    recipe = str(ROOT / "launch" / "recipes" / "digits-vaegan.yaml")
    config = configure(["--system.latent_dim", "3", "--system=VAE", "--trainer.steps", "9", "--config", recipe])
    assert (type(config.system()).__name__, config.system().latent_shape, config.trainer.steps) == ("VAE", (3,), 9)


def test_dropped_settings_of_another_system_are_told(capsys):
    recipe = str(ROOT / "launch" / "recipes" / "digits-vaegan.yaml")
    config = configure(["--config", recipe, "--system", "AE"])
    assert "AE has no adversarial_weight, binary, discriminator: dropped" in capsys.readouterr().err
    configure(["--config", recipe])
    assert capsys.readouterr().err == ""
    kept = yaml.safe_load(Path(recipe).read_text())["system"]["init_args"]
    assert config.system().latent_shape == (kept["latent_dim"],)


def test_one_setting_over_a_recipes_nested_ones_leaves_the_others():
    recipe = str(ROOT / "launch" / "recipes" / "digits-vaegan-ternary.yaml")
    config = configure(["--config", recipe, "--system.ternary.lr", "0.5", "--system.networks.width", "8"])
    changed, plain = (
        config.system().players()[0].optimizer,
        configure(["--config", recipe]).system().players()[0].optimizer,
    )
    assert changed == replace(plain, lr=0.5)
    assert config.namespace.system.init_args.networks.family == "dcgan"


def test_differences_name_settings_that_matter():
    old = configure([*DATA, "--system", "VAE"]).resolved()
    matter = ["--system.kl_weight", "2", "--trainer.batch_size", "32"]
    free = ["--data.train", "elsewhere", "--trainer.steps", "3", "--data.workers", "0"]
    new = configure(["--system", "VAE", *matter, *free]).resolved()
    assert differences(old, old) == []
    assert differences(old, new) == [
        "system.kl_weight: 1.0 in the checkpoint, 2.0 now",
        "trainer.batch_size: 64 in the checkpoint, 32 now",
    ]


def test_resolved_settings_follow_what_is_settled_and_no_change_of_a_callers_copy():
    config = configure([*DATA, "--system", "VAE"])
    config.resolved()["system"]["init_args"].clear()
    assert config.resolved()["system"]["init_args"]["kl_weight"] == 1
    config.settle_precision("bf16")
    assert config.resolved()["trainer"]["precision"] == "bf16"
    assert "precision: bf16" in config.redacted_yaml()


RECIPES = [path for path in (ROOT / "launch" / "recipes").glob("*.yaml") if not path.stem.startswith("compare")]
# Of each system, those with the most settings; each recipe takes a second.
QUICK = {"cifar10-r3gan", "clothing256-f8", "decoder-finetune", "digits-ae", "digits-ganvae", "digits-vae"}
QUICK |= {"digits-vaegan-both", "smiles-cyclegan"}


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem not in QUICK), id=path.stem) for path in RECIPES],
)
def test_a_configuration_that_was_written_is_read_as_the_same(recipe, tmp_path):
    config = configure(["--config", str(recipe), "--trainer.init_from", "null"])  # one names weights of the hub
    (tmp_path / "config.yaml").write_text(config.yaml)
    again = configure(["--config", str(tmp_path / "config.yaml")])
    assert again.resolved() == config.resolved()
    kept = config.resolved()["data"]
    assert (kept["train"] if isinstance(kept["train"], list) else [kept["train"]]) == config.data.trains


LAUGHS = "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
QUOTED = "{" + ", ".join(line.replace(": ", ": ", 1) for line in LAUGHS.splitlines()) + "}"
BOMBS = {
    "a billion laughs": LAUGHS,
    "an alias of what it is in": "data: &a [*a]",
    "deep": "data: " + "[" * 10**5,
    "deep and whole": "data: " + "[" * 10**5 + "]" * 10**5,
    "deep blocks": "- " * 10**5 + "1",
    "long": "# " + "x" * 2**21,
    "deep in a text": "data:\n  train: '" + "[" * 10**5 + "]" * 10**5 + "'",
    "laughs in a text": f"data:\n  train: '{QUOTED}'",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_recipe_that_is_a_bomb_is_refused_or_harmless(tmp_path, capsys, bomb):
    """In a process of its own the deep ones would end it by their stack."""
    (tmp_path / "x.yaml").write_text(BOMBS[bomb])
    message = refused(capsys, "--config", str(tmp_path / "x.yaml"), "--data.size", "33", "--system", "AE")
    assert len(message) < 10**4


def test_aliases_and_nested_lists_of_recipes_are_read(tmp_path):
    (tmp_path / "x.yaml").write_text("data: {train: &a b, test: *a, crop: [0.5, 1]}\n# " + "x" * 200)
    config = configure(["--config", str(tmp_path / "x.yaml"), "--system", "AE"])
    assert config.data.tests == config.data.trains == [str(tmp_path / "b")]


def test_a_recipe_that_is_no_regular_file_is_refused(tmp_path, capsys):
    os.mkfifo(tmp_path / "x.yaml")
    for words in (["--config", f"{tmp_path}/x.yaml"], [f"--config={tmp_path}/x.yaml"]):
        assert "x.yaml cannot be read: it is a FIFO, and no regular file" in refused(capsys, *words)


def test_a_prepared_folder_stands_for_its_splits(digits):
    """And a train split for its folder; held-out images that are not needed, or named, are not looked for."""

    def splits(*arguments):
        data = configure([*map(str, arguments)]).data
        return data.train, data.test

    train, test = str(digits / "train"), str(digits / "test")
    for source in (digits, train):
        assert splits("--system", "AE", "--data.train", source) == (train, test)
        assert splits("--system", "AE", "--data.train", source, "--data.test", "else")[1] == os.path.abspath("else")
        assert splits("--system", "AE", "--data.train", source, "--evaluate.every", 0) == (train, None)
        assert splits("--system", "CycleGAN", "--data.train", f"[{source}, {train}]") == ([train, train], [test, test])
    index = f"{train}/index.json"
    assert splits("--system", "AE", "--data.train", index) == (index, None)
