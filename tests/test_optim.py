import json
import math
from pathlib import Path

import pytest
import torch

from mscs.models import build_model
from mscs.optim import NO_DECAY, adamw_groups, build_optimizer, learning_rate


def test_poly_is_its_closed_form_and_zero_at_the_last_step():
    for step in (0, 1, 500, 998):
        expected = 0.01 * (1 - step / 999) ** 0.9
        assert learning_rate(step, lr=0.01, schedule="poly", steps=1000) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(999, lr=0.01, schedule="poly", steps=1000) == 0


def test_linear_warms_up_over_1500_steps_and_then_falls_to_zero():
    def rate(step):
        return learning_rate(step, lr=1.0, schedule="linear", steps=160_000)

    assert rate(0) == pytest.approx(6.67e-4, rel=1e-2)
    assert rate(749) == pytest.approx(0.5, rel=1e-5)
    assert rate(1499) == pytest.approx(1.0, rel=1e-12)
    assert rate(1500) == pytest.approx(1 - 1500 / 159_999, rel=1e-12)
    assert rate(1500) == pytest.approx(0.9906, abs=1e-4)
    assert rate(159_999) == 0


def test_exp_decays_once_per_epoch():
    rates = [
        learning_rate(step, lr=1e-4, schedule="exp", steps=20_000, steps_per_epoch=444)
        for step in (0, 443, 444, 19_999)
    ]
    assert rates == pytest.approx([1e-4, 1e-4, 0.98e-4, 1e-4 * 0.98**45], rel=1e-12)


def test_an_unknown_schedule_or_optimizer_is_an_error():
    with pytest.raises(ValueError, match="poly, linear, exp"):
        learning_rate(0, lr=1, schedule="cosine", steps=10)
    with pytest.raises(ValueError, match="sgd, adam, adamw"):
        build_optimizer([], "lion", lr=1, weight_decay=0)


def test_sgd_steps_as_the_formula():
    weight = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = build_optimizer([("w", weight)], "sgd", lr=0.1, weight_decay=0.01, momentum=0.9)
    value, velocity = 2.0, 0.0
    for _ in range(3):
        weight.grad = torch.tensor([3.0], dtype=torch.float64)
        optimizer.step()
        velocity = 0.9 * velocity + 3.0 + 0.01 * value
        value -= 0.1 * velocity
        assert weight.item() == pytest.approx(value, rel=1e-12)


def test_swin_tiny_spares_as_many_tensors_as_the_authors_network_and_none_in_the_head():
    official = json.loads(Path("tests/golden/upernet_swinT_ade20k.json").read_text())["parameters"]
    spared = [name for name, _ in official if any(word in name for word in NO_DECAY)]
    with torch.device("meta"):
        model = build_model("upernet", "swin_tiny_patch4_window7_224", 150, projector="fpn")
    decayed, free = adamw_groups(model.named_parameters(), 0.01)
    assert len(free["params"]) == len(spared) == 76
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(names[id(p)].startswith("backbone.") for p in free["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)


def test_adam_and_adamw_have_the_published_constants():
    parameter = [("w", torch.nn.Parameter(torch.zeros(1)))]
    adam = build_optimizer(parameter, "adam", lr=1e-4, weight_decay=0.0)
    adamw = build_optimizer(parameter, "adamw", lr=6e-5, weight_decay=0.01)
    assert adam.defaults["betas"] == adamw.defaults["betas"] == (0.9, 0.999)
    assert adam.param_groups[0]["weight_decay"] == 0
    assert math.isclose(adamw.param_groups[0]["weight_decay"], 0.01)
