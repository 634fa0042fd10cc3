"""The last block of a run: final scores, symptoms with their cures, and paths."""

from types import SimpleNamespace

import pytest

from models import DiscriminatorConfig
from models.schedule import Schedule
from trainer.distributed.ranks import ROOT
from trainer.log.summary import WIDTH, _player, final_summary, start_warnings

FACTS = {"extractor": "demo-cnn-v1"}
CONFIG = SimpleNamespace(trainer=SimpleNamespace(steps=8), resolved=lambda: {})


def test_a_finished_run_says_how_good_it_is_and_what_looks_wrong():
    fids = {4: 2.0, 6: 2.5, 8: 9.0}
    lines = [
        {"step": step, "eval/fid2k/demo-cnn-v1": fid, "eval/rfid359/demo-cnn-v1": 1.0, **FACTS}
        for step, fid in fids.items()
    ]
    said = final_summary(ROOT / "runs" / "a", CONFIG, lines, tensorboard=True).splitlines()
    assert said[:3] == [
        "Finished at step 8",
        "  score     fid2k/demo-cnn-v1 9; it was lowest at step 4: 2",
        "  score     rfid359/demo-cnn-v1 1",
    ]
    assert said[3].startswith("  symptom   diverging: the run gets worse; eval/fid2k/demo-cnn-v1 is 9, its best 2")
    assert "What to do: go back to the best checkpoint" in " ".join(" ".join(said).split())
    assert said[-1] == "  curves    make board"
    assert max(map(len, said)) <= WIDTH


def test_a_rate_that_varies_is_told_with_both_of_its_ends():
    optimizer = DiscriminatorConfig(lr=Schedule(2e-4, 5e-5, 4000))
    player = SimpleNamespace(name="binary", networks=["net"], optimizer=optimizer, start=0, every=1)
    assert _player(SimpleNamespace(player=player), {"net": 1234}) == (
        "binary trains net 1,234 weights; adamw, lr 0.0002 to 5e-05 in 4,000 steps"
    )


@pytest.mark.parametrize("activated", [True, False])
def test_commands_are_not_wrapped_and_nothing_is_said_of_what_a_run_lacks(activated, monkeypatch):
    monkeypatch.setattr("sys.base_prefix", "/usr")
    monkeypatch.setattr("sys.prefix", str(ROOT / ".venv"))
    monkeypatch.setattr("sys.executable", str(ROOT / ".venv" / "bin" / "python"))
    monkeypatch.setenv("VIRTUAL_ENV", str(ROOT / ".venv") if activated else "")
    monkeypatch.chdir(ROOT)
    folder = ROOT / ("deep " * 40) / "a"
    python = "python" if activated else ".venv/bin/python"
    assert final_summary(folder, CONFIG, [], tensorboard=False).splitlines() == [
        "Finished at step 8",
        f"  samples   {folder}/samples",
        f"  report    {python} -m trainer.report {folder}",
    ]


class Images:
    """As many images as Shards would have, with a fingerprint."""

    def __init__(self, number: int, fingerprint: str = "held out"):
        self.number, self.fingerprint = number, lambda: fingerprint

    def __len__(self) -> int:
        return self.number


@pytest.mark.parametrize(
    ("held_out", "every", "warned"), [([99], 4, True), ([300, 99], 4, True), ([100], 4, False), ([99], 0, False)]
)
def test_scores_by_few_held_out_images_are_warned_of(held_out, every, warned):
    config = SimpleNamespace(
        resolved=lambda: {}, trainer=SimpleNamespace(precision="no"), evaluate=SimpleNamespace(every=every)
    )
    said = start_warnings(config, "cpu", [], [Images(number) for number in held_out])
    assert [text.partition(",")[0] for text in said] == ["only 99 images are held out"] * warned


@pytest.mark.parametrize(
    ("tests", "every", "warned"), [([7], 4, True), ([9, 7], 4, True), ([8, 9], 4, False), ([7], 0, False)]
)
def test_scores_by_the_training_images_are_warned_of(tests, every, warned, monkeypatch):
    monkeypatch.setattr("trainer.log.summary.size_warning", lambda *_: None)
    config = SimpleNamespace(
        resolved=lambda: {}, trainer=SimpleNamespace(precision="no"), evaluate=SimpleNamespace(every=every), data=None
    )
    said = start_warnings(config, "cpu", [Images(100, "5"), Images(100, "7")], [Images(100, str(one)) for one in tests])
    assert [text.partition(",")[0] for text in said] == ["data.test has the same shards as data.train"] * warned


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "warned"),
    [
        ("bf16", "cpu", False, True),
        ("bf16", "cpu", True, False),
        ("no", "cpu", False, False),
        ("bf16", "cuda", False, False),
    ],
)
def test_bf16_on_a_cpu_that_lacks_it_is_warned_of(precision, device, has_bf16, warned, monkeypatch):
    monkeypatch.setattr("trainer.log.summary.cpu_has_bf16", lambda: has_bf16)
    config = SimpleNamespace(
        resolved=lambda: {}, trainer=SimpleNamespace(precision=precision), evaluate=SimpleNamespace(every=0)
    )
    said = start_warnings(config, device, [], [])
    assert [text.partition(" is slow")[0] for text in said] == ["trainer.precision bf16"] * warned
    assert all("--trainer.precision no" in text for text in said)
