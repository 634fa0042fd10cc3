"""Which settings may change when a run is resumed, and how two configurations differ."""

from typing import Any

from data.images import Limits

# Settings that may change between a run and its continuation: they leave what a step computes as it is. The training
# shards and a perceptual network's weights are compared by their content instead; scores measured in another way have
# no part in which checkpoint is best.
RESUMABLE_SETTINGS = frozenset(
    [
        *(f"trainer.{name}" for name in ("steps", "run_dir", "micro_batch", "save_every", "log_every", "check_every")),
        *(f"trainer.{name}" for name in ("keep", "keep_every", "time_limit", "timeout", "deterministic", "grad_sync")),
        *("trainer.share_passes", "trainer.accept_new_data", "trainer.compile"),
        *("data.train", "data.test", "data.workers"),
        "system.init_args.perceptual_weights",
        *(f"data.{name}" for name in ("on_error", "max_skipped", "cache", "cache_gb")),
        *(f"data.max_{name}" for name in Limits._fields),
        *("data.lanes", "data.window"),  # by the order's fingerprint, too
        *(f"evaluate.{name}" for name in ("every", "num", "extractor", "weights", "metrics")),
        *(f"evaluate.{name}" for name in ("statistics", "lpips", "budget")),
    ]
)


def differences(
    saved: dict[str, Any], now: dict[str, Any], prefix: str = "", free: frozenset[str] = RESUMABLE_SETTINGS
) -> list[str]:
    """The settings in which two resolved configurations differ, one line each, but for the free ones."""
    lines = []
    for key in sorted(saved.keys() | now.keys()):
        old, new = saved.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{key}.", free)
        elif old != new and f"{prefix}{key}" not in free:
            lines.append(f"{prefix}{key}: {old} in the checkpoint, {new} now")
    return [line.replace("init_args.", "") for line in lines]


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their names on the command line."""
    named: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        named |= flatten(value, f"{name}.") if isinstance(value, dict) else {name.replace("init_args.", ""): value}
    return named
