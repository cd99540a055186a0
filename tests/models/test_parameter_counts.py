"""Sizes of the paper's networks: Table 3 prints 121 M and 234 M for UPerNet on Swin-B and Swin-L."""

import time

import pytest
import torch

from mscs.models import build_model, count_parameters

SWIN = "swin_{}_patch4_window7_224"
# millions of parameters without projectors; counted on the authors' networks, and for Swin with the
# auxiliary head on stage index 2 on Swin-Transformer-Semantic-Segmentation's
ROWS = [
    ("hrnet", "hrnet_w48", 19, {}, 70.01),
    ("ocrnet", "hrnet_w48", 19, {}, 73.17),
    ("ocrnet", "hrnet_w48", 150, {}, 73.30),
    ("ocrnet", "resnet50", 17, {}, 38.87),
    ("deeplabv3", "resnet101", 19, {}, 58.04),
    ("upernet", "resnet101", 150, {}, 83.09),
    *(
        ("upernet", SWIN.format(size), 150, {"aux_index": index}, count)
        for size, counts in {
            "tiny": (59.02, 59.94, 60.83),
            "small": (80.34, 81.26, 82.14),
            "base": (120.06, 121.28, 122.46),
            "large": (231.95, 233.76, 235.53),
        }.items()
        for index, count in zip((None, 2, 3), counts, strict=True)
    ),
    ("upernet", "swin_base_patch4_window12_384", 150, {}, 121.42),
    ("upernet", "swin_large_patch4_window12_384", 150, {}, 233.96),
]


@pytest.mark.parametrize(("name", "backbone", "classes", "options", "millions"), ROWS)
def test_counts_of_every_network(name, backbone, classes, options, millions):
    with torch.device("meta"):
        model = build_model(name, backbone, classes, projector="backbone", **options)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.0051)


def test_table_3_counts_come_out_of_the_defaults():
    with torch.device("meta"):
        base, large = (build_model("upernet", SWIN.format(size), 150) for size in ("base", "large"))
    assert round(count_parameters(base) / 1e6) == 121
    assert round(count_parameters(large) / 1e6) == 234


def test_counting_needs_neither_time_nor_memory():
    start = time.perf_counter()
    with torch.device("meta"):
        model = build_model("upernet", SWIN.format("large"), 150, projector="fpn")
    assert all(p.is_meta for p in model.parameters())
    assert time.perf_counter() - start < 5
