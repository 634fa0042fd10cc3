"""Programs of a system's networks: what other runtimes compute on other batches, and what is refused."""

import numpy as np
import onnxruntime
import pytest
import torch
from systems_under_test import SYSTEMS

import models
from trainer.export import programs
from trainer.export.command import main
from trainer.export.programs import Program, check, uses_of, write_programs


def by_onnx(path, *given: torch.Tensor) -> list[torch.Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    named = dict(zip((one.name for one in session.get_inputs()), given, strict=True))
    assert [one.shape for one in session.get_inputs()] == [["batch", *one.shape[1:]] for one in given]
    return [*map(torch.from_numpy, session.run(None, {name: one.numpy() for name, one in named.items()}))]


def by_torch(path, *given: torch.Tensor) -> list[torch.Tensor]:
    return torch.export.load(path).module()(*given)


def near(found, expected) -> bool:
    """Within what 64 sums in another order round to in float32, of numbers of this size."""
    return all(
        one.shape == other.shape and (one - other).abs().max() <= 64 * 2**-23 * other.abs().max().clamp(min=1)
        for one, other in zip(found, expected, strict=True)
    )


def test_programs_compute_what_the_networks_do_on_any_batch(tiny_run, tmp_path):
    main([str(tiny_run("GAN")), str(tmp_path / "out"), "--num", "0", "--onnx", "--torch_export"])
    system = models.load(tmp_path / "out")
    for count in (1, 5):
        z, label = torch.randn(count, *system.latent_shape), torch.arange(count) % 3 + 7
        assert near(by_onnx(tmp_path / "out" / "decoder.onnx", z, label), [system.sample(z, label)])
        assert near(by_torch(tmp_path / "out" / "decoder.pt2", z, label), [system.sample(z, label)])
    for other in (system.sample(z, label) * 1.001, system.sample(z, label - 1)):
        assert not near([other], [system.sample(z, label)]), "the test sees a difference"


def test_a_program_has_the_weights_of_its_use_alone():
    system = SYSTEMS["adaptive, scheduled"]()
    encoder, decoder = (Program(system, use) for use in uses_of(system, (1, 32, 32)))
    assert {name.split(".")[1] for name in encoder.state_dict()} == {"encoder"}
    assert {name.split(".")[1] for name in decoder.state_dict()} == {"decoder"}
    assert [use.made for use in uses_of(SYSTEMS["ae"](), (1, 32, 32))] == [("mean",), ("image",)]


def test_a_program_that_computes_something_else_is_refused():
    system = SYSTEMS["vae"]().eval()
    use, _ = uses_of(system, (1, 32, 32))
    program, given = Program(system, use), torch.rand(3, 1, 32, 32)
    check(program, program, [given], "it")
    for other in (
        lambda given: [value * (1 + 1e-4) for value in program(given)],
        lambda given: [value[:2] for value in program(given)],
        lambda given: [value * np.nan for value in program(given)],
    ):
        with pytest.raises(ValueError, match=r"^it computes another mean than the network: it is off by"):
            check(program, other, [given], "it")


def test_nothing_is_exported_with_a_program_that_is_wrong(tiny_run, tmp_path, monkeypatch, capsys):
    def doubled(program, example, path):
        path.touch()
        return lambda *given: [2 * value for value in program(*given)]

    def failing(*_):
        raise RuntimeError("no such operator\nat line 3")

    for writer, words in (
        (doubled, "the program of encoder computes another"),
        (failing, "encoder cannot be converted: no such operator\n"),
    ):
        monkeypatch.setitem(programs.WRITERS, "onnx", writer)
        with pytest.raises(SystemExit) as stopped:
            main([str(tiny_run("VAEGAN")), str(tmp_path / "out"), "--num", "0", "--onnx"])
        assert stopped.value.code == 2
        assert f"error: --onnx: {words}" in capsys.readouterr().err
        assert not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ae", "gan, classes", "ganvae", "residual", "maps", "kl", "cyclegan"])
def test_each_system_has_programs(name, tmp_path):
    system = SYSTEMS[name]().eval().requires_grad_(False)
    written = write_programs(system, (1, 32, 32), tmp_path, ["onnx", "torch_export"])
    assert {file.rpartition(".")[0] for file in written} == {*system.averaged}
    if system.can("posterior"):
        image = torch.rand(5, 1, 32, 32) * 2 - 1
        for suffix, run in (".onnx", by_onnx), (".pt2", by_torch):
            found = run(tmp_path / f"encoder{suffix}", image)
            assert near(found, system.posterior(image)[: len(found)])
            assert len(found) == (1 if name == "ae" else 2)
