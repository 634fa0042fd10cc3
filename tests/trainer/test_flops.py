"""FLOPs are those that torch counts in the real step; peaks are found by the names of GPUs."""

import pytest
import torch

from benchmarks.common import Training, accelerator
from trainer.config.parser import configure
from trainer.flops import StepFlops, flop_counter, peak_tflops

SMALL = ["--data.train", "none", "--data.channels", "1", "--evaluate.every", "0", "--trainer.batch_size", "2"]
LAZY = ["--system", "VAEGAN", "--system.networks.family", "residual", "--system.networks.width", "8"]
LAZY += ["--system.networks.blocks", "1", "--system.networks.attention", "[8]", "--system.binary.penalty_every", "3"]
LAZY += ["--system.binary.start", "2", "--system.binary.counts_from", "3"]


@pytest.mark.slow  # counting operations takes seconds
def test_flops_are_those_of_the_real_step_and_counted_once_for_each_kind_of_step():
    config = configure([*SMALL, *LAZY])
    flops, training = StepFlops(config, 2), Training(config, accelerator("no"))
    real = []
    for training.done in (0, 2, 3, 5):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), flop_counter() as mode:
            training()
        real.append(mode.get_total_flops())
    assert [flops([step]) for step in (0, 2, 3, 5)] == real
    assert real[0] < real[2] < real[3], "before the discriminator starts, without a penalty, and with it"
    assert real[1] < real[3], "before it counts for the autoencoder, and after"
    assert flops(range(6)) == pytest.approx((2 * real[0] + real[1] + 2 * real[2] + real[3]) / 6)
    assert len(flops.counted) == 4


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_takes_twice_as_much_backwards_as_forwards_whatever_its_groups(groups, transposed):
    """Two multiply-adds' FLOPs for each image, position (of the smaller map), kernel element, output and its inputs."""
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    convolution = kind(8, 16, 3, stride=2, padding=1, groups=groups, bias=False)
    image = torch.zeros(3, 8, *((4, 4) if transposed else (8, 8)), requires_grad=True)
    with flop_counter() as counter:
        convolution(image).sum().backward()
    assert counter.get_total_flops() == 3 * (2 * 3 * 4 * 4 * 3 * 3 * 16 * 8 // groups)


def test_rates_wait_for_a_run_that_lasts(monkeypatch):
    flops = StepFlops(configure([*SMALL, *LAZY]), 4)
    assert flops.rates([0], 2.0, torch.device("cpu")) == {}
    monkeypatch.setattr("trainer.flops.BEGIN", 0)
    assert flops.rates([], 0.0, torch.device("cpu")) == {}
    assert flops.rates([0], 2.0, torch.device("cpu")) == {"speed/tflops": 2 * flops([0]) / 1e12}
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    assert flops.rates([0], 2.0, torch.device("cuda"))["speed/mfu"] == pytest.approx(2 * flops([0]) / 156e12)


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 494),
        ("NVIDIA H100 PCIe", 756, 378),
        ("NVIDIA H200", 989, 494),
        ("NVIDIA A100-SXM4-80GB", 312, 156),
        ("NVIDIA L40S", 362, 183),
        ("NVIDIA GeForce RTX 4090", 165, 82.6),
        ("Tesla T4", None, 8.1),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None),
        ("NVIDIA T400", None, None),
        ("AMD Instinct MI300X", None, None),
    ],
)
def test_peaks_are_found_by_name(name, half, single):
    assert (peak_tflops(name, "bf16"), peak_tflops(name, "no")) == (half, single)
    assert (peak_tflops(name, "fp16") is None) == (single is None)
