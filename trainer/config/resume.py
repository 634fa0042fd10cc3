"""The settings of a run, which of them may change when it is resumed, and how two configurations differ."""

from pathlib import Path
from typing import Any

import yaml

from data.files import check_yaml, read
from data.images import Limits

# They change no weight, or are compared by content instead: training shards and frozen networks by their checksums,
# data.lanes and data.window by the fingerprint of the order.
RESUMABLE_SETTINGS = frozenset(
    f"{section}.{name}"
    for section, names in {
        "data": "train test workers on_error max_skipped cache cache_gb lanes window",
        "system": "perceptual_weights binary.dino_weights ternary.dino_weights codes.dino_weights",
        "trainer": "steps run_dir scratch micro_batch save_every log_every trackers check_every keep "
        "keep_every time_limit timeout deterministic grad_sync share_passes accept_new_data compile "
        "activation_checkpointing profile",
        "evaluate": "every num extractor weights metrics statistics lpips best budget",
    }.items()
    for name in names.split()
) | {f"data.max_{name}" for name in Limits._fields}
# What else may change with --trainer.accept_new_data, by the names in the messages of TrainState.check.
NEW_DATA_SETTINGS = frozenset({"data", "data.train", "data.crop", "data.flip", "trainer.batch_size"})


def saved_settings(run: Path) -> dict[str, Any]:
    """Return the settings of a run's config.yaml as plain data, which may hold credentials; empty without the file.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / "config.yaml"
    if not path.exists():
        return {}
    try:
        check_yaml(text := read(path).decode())
        flatten(settings := yaml.safe_load(text))
    except (yaml.YAMLError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from error
    return settings


def differences(
    saved: dict[str, Any], now: dict[str, Any], resumable: frozenset[str] = RESUMABLE_SETTINGS
) -> list[str]:
    """Return one line for each setting in which two resolved configurations differ, but for the resumable ones."""
    old, new = flatten(saved), flatten(now)
    return [
        f"{name}: {old.get(name)} in the checkpoint, {new.get(name)} now"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name not in resumable
    ]


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return settings by their names on the command line."""
    named: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        named |= flatten(value, f"{name}.") if isinstance(value, dict) else {name.replace("init_args.", ""): value}
    return named
