"""Batch norm shared by processes: two halves of a batch are as good as the whole."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from mscs.models import convert_sync_batchnorm

SHARES = (1, 3)  # images of each process


def make_model(name, **options):
    torch.manual_seed(0)
    if name == "plain":
        model = nn.Sequential(
            nn.Conv2d(3, 5, 3),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Conv2d(5, 4, 3),
            nn.BatchNorm2d(4, momentum=3e-4),
        )
    else:
        from mscs.models import build_model  # loads timm, which the processes of the plain case do without

        options |= {"projector": "backbone", "aspp_channels": 8, "projector_channels": 4}
        model = build_model(name, "mobilenetv3_small_050", 3, **options)
    return model.double()


def make_images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(SHARES), 3, 32, 48, generator=generator, dtype=torch.float64)


def run(model, images):
    """Return the first output and back-propagate a sum over images, which shares of a batch add up to."""
    output = model(images)
    maps = [output] if isinstance(output, torch.Tensor) else [output.logits, *output.embeddings]
    sum((x * x.cos()).sum() for x in maps).backward()
    return maps[0].detach()


def run_process(rank, name, folder):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=len(SHARES)
    )
    model = convert_sync_batchnorm(make_model(name)).train()
    output = run(model, make_images().split(SHARES)[rank])
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)
    result = {
        "output": output,
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "buffers": dict(model.named_buffers()),
    }
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["plain", pytest.param("deeplabv3", marks=pytest.mark.slow)])
def test_two_processes_equal_one(name, tmp_path):
    mp.spawn(run_process, (name, str(tmp_path)), nprocs=len(SHARES))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SHARES))]
    model = make_model(name).train()
    expected = run(model, make_images())
    torch.testing.assert_close(torch.cat([part["output"] for part in parts]), expected, rtol=1e-9, atol=1e-9)
    for part in parts:
        for key, parameter in model.named_parameters():
            assert torch.allclose(part["gradients"][key], parameter.grad, rtol=1e-8, atol=1e-10), key
        for key, value in model.named_buffers():
            assert torch.allclose(part["buffers"][key], value, rtol=1e-12), key


@pytest.mark.parametrize("training", [True, False])
def test_one_process_computes_as_before(training):
    model = make_model("deeplabv3").train(training)
    shared = convert_sync_batchnorm(copy.deepcopy(model))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in shared.modules())
    assert shared.state_dict().keys() == model.state_dict().keys()
    images = make_images()
    assert torch.equal(shared(images).logits, model(images).logits)


def test_recomputed_blocks_update_synchronised_norms_once():
    results = []
    for checkpointing in (False, True):
        model = make_model("deeplabv3", checkpointing=checkpointing)
        model = convert_sync_batchnorm(model).train()
        run(model, make_images())
        results.append(dict(model.named_buffers()))
    for name, value in results[1].items():
        assert torch.equal(value, results[0][name]), name
