"""The scores and findings of a comparison, from made-up numbers."""

from types import SimpleNamespace

from trainer.compare.findings import FAILS, HOLDS, UNDECIDED, below, find
from trainer.measures import MEASURES, MISSING
from trainer.report.results import Cell, Entry, best, score_table


def entry(name: str, kind: str, settings: dict | None = None, **scores: list[float]) -> Entry:
    seeds = range(len(next(iter(scores.values()))))
    found = [{key: values[seed] for key, values in scores.items()} for seed in seeds]
    runs = [SimpleNamespace(scores=one, measured=lambda measure: ()) for one in found]
    return Entry(name, kind, settings or {}, runs)


def test_a_claim_holds_where_no_seed_contradicts_it():
    assert below([1, 2], [3, 4]) == HOLDS
    assert below([3, 4], [1, 2]) == FAILS
    assert below([1, 3], [2, 4]) == UNDECIDED
    assert below([1, 2], [3, 9], times=2) == UNDECIDED
    assert below([1, 2], [5, 9], times=2) == HOLDS


def test_systems_are_found_by_what_they_are():
    found = find(
        [
            entry("a", "VAE", sharpness=[0.5, 0.6], fid=[5, 6]),
            entry("b", "VAEGAN", {"discriminator": "binary"}, sharpness=[0.9, 1.0], fid=[3, 4], prior_gap=[2, 3]),
            entry("c", "VAEGAN", {"discriminator": "ternary"}, sharpness=[0.55, 0.9], fid=[5, 6], prior_gap=[0, 1]),
        ]
    )
    said = {finding.claim.split(" samples")[0]: finding for finding in found}
    assert [part.verdict for part in found[0].parts] == [HOLDS, UNDECIDED]
    assert found[0].verdict == "holds in 1 of 2 comparisons"
    assert found[0].parts[0].about == "a and b"
    assert "0.55 (0.50 to 0.60) against 0.95 (0.90 to 1.00)" in found[0].parts[0].figures
    assert said["A ternary discriminator brings codes closer to the prior than a binary one"].verdict == HOLDS
    assert said["A ternary discriminator makes better"].verdict == FAILS
    assert not any("autoencoder" in claim or "GAN-VAE's encoder" in claim for claim in said)


def test_an_autoencoders_samples_and_a_gan_vaes_codes():
    found = find(
        [
            entry("AE", "AE", fid=[20, 30], z_recovered=[-9, -8]),
            entry("VAE", "VAE", fid=[5, 6], z_recovered=[0.5, 0.99]),
            entry("GANVAE", "GANVAE", fid=[5, 6], z_recovered=[0.95, 0.97]),
        ]
    )
    assert [finding.verdict for finding in found] == [HOLDS, HOLDS, "holds in 1 of 2 comparisons"]
    assert found[-1].parts[1].verdict == UNDECIDED


def test_the_best_mean_is_marked_as_shown():
    entries = [entry("a", "VAE", sharpness=[0.8], fid=[2.001]), entry("b", "AE", sharpness=[1.1], fid=[2.002])]
    assert best(entries, MEASURES["sharpness"]) == {"b"}
    assert best(entries, MEASURES["fid"]) == set()
    entries.append(entry("c", "GAN", fid=[3]))
    assert best(entries, MEASURES["fid"]) == {"a", "b"}
    assert best(entries, MEASURES["psnr"]) == set()


def test_a_table_has_ranges_of_several_seeds_and_a_dash_for_what_is_missing():
    entries = [entry("a", "VAE", fid=[1, 2], psnr=[20, 20]), entry("b", "GAN", fid=[4000])]
    columns = list(MEASURES)
    rows = {name: dict(zip(columns, cells, strict=True)) for name, cells in score_table(entries).items()}
    assert rows["a"]["fid"] == Cell("1.50", "1.00 to 2.00", True)
    assert rows["b"]["fid"] == Cell("4,000", "", False)
    assert rows["b"]["psnr"] == Cell(MISSING, "", False)
