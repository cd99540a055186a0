"""What only a GPU can show: streams do not disturb each other, trainings repeat, and agree with a CPU."""

import pytest
import torch

from mscs import build
from mscs.distributed import World
from mscs.losses import contrastive_loss
from mscs.train import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FEW = {"steps": 4, "log_every": 1, "checkpoint_every": 4, "pretrained": False, "deterministic": True}


def loss_and_gradient(x, labels):
    leaf = x.detach().clone().requires_grad_()
    loss = contrastive_loss(leaf, labels)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_losses_on_several_streams_are_those_of_one():
    generator = torch.Generator().manual_seed(0)
    sets = [
        (torch.randn(n, 256, generator=generator).cuda(), torch.randint(19, (n,), generator=generator).cuda())
        for n in (4001, 3003, 5000, 2048)
    ]
    expected = [loss_and_gradient(*one) for one in sets]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in sets], []
    for _ in range(3):
        for stream, one in zip(streams, sets, strict=True):
            with torch.cuda.stream(stream):
                found.append(loss_and_gradient(*one))
    torch.cuda.synchronize()
    for index, (loss, gradient) in enumerate(found):
        assert torch.equal(loss, expected[index % len(sets)][0])
        assert torch.equal(gradient, expected[index % len(sets)][1])


def history(params, root, folder, device, **overrides):
    settings = params.resolve("cityscapes-hrnet-hr48-ours", "mini", {**FEW, **overrides}).settings
    build.apply_machine_settings(settings)
    world = World(0, 1, torch.device(device))
    trainer = Trainer(settings, 0, world, build.open_dataset(settings, "train", root), folder)
    trainer.train()
    return trainer.history


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_deterministic_training_repeats_itself_bit_for_bit(params, generated, tmp_path, precision):
    root = generated("cityscapes")
    first, second = (
        history(params, root, tmp_path / name, "cuda", precision=precision) for name in ("a", "b")
    )
    assert first == second


def test_a_training_agrees_with_the_cpu(params, generated, tmp_path):
    root = generated("cityscapes")
    here, there = (
        history(params, root, tmp_path / device, device, precision="fp64") for device in ("cuda", "cpu")
    )
    for one, other in zip(here, there, strict=True):
        assert one == pytest.approx(other, rel=1e-8)
