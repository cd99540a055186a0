"""Pretrained weights, fetched from a server on this machine."""

import functools
import hashlib
import http.server
import json
import threading

import pytest
import timm
import torch
from safetensors.torch import save_file

from mscs.errors import MscsError, UsageError
from mscs.models import build_model, fetch_pretrained
from mscs.models.backbone import build_backbone
from mscs.models.pretrained import CHECKSUMS, PINNED_TAGS, fetch_weights


class Quiet(http.server.SimpleHTTPRequestHandler):
    requests = 0

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        type(self).requests += 1
        if self.path.startswith("/cut"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        else:
            super().do_GET()


@pytest.fixture
def served(tmp_path):
    """A folder and the address under which it is served."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=folder)
    Quiet.requests = 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MSCS_WEIGHTS", str(folder))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_a_file_is_fetched_once_and_its_checksum_recorded(served, cache):
    folder, address = served
    (folder / "net.pth").write_bytes(b"weights")
    path = fetch_weights("net", f"{address}/net.pth")
    assert path == cache / "net.pth"
    assert path.read_bytes() == b"weights"
    assert fetch_weights("net", f"{address}/net.pth") == path
    assert Quiet.requests == 1
    recorded = json.loads((cache / CHECKSUMS).read_text())
    assert recorded == {"net.pth": hashlib.sha256(b"weights").hexdigest()}
    assert sorted(p.name for p in cache.iterdir()) == [CHECKSUMS, "net.pth"]


def test_a_file_that_changed_is_refused(served):
    folder, address = served
    (folder / "net.pth").write_bytes(b"weights")
    path = fetch_weights("net", f"{address}/net.pth")
    path.write_bytes(b"weightz")
    with pytest.raises(MscsError, match=r"has SHA-256 .* expected .*Delete it"):
        fetch_weights("net", f"{address}/net.pth")


def test_a_checksum_in_the_name_is_compared_at_the_first_download(served):
    folder, address = served
    right = f"net-{hashlib.sha256(b'weights').hexdigest()[:8]}.pth"
    for name in (right, "net-01234567.pth"):
        (folder / name).write_bytes(b"weights")
    fetch_weights("net", f"{address}/{right}")
    with pytest.raises(MscsError, match="expected begins with 01234567"):
        fetch_weights("net", f"{address}/net-01234567.pth")


def test_hub_files_are_named_after_the_backbone(served, cache):
    folder, address = served
    (folder / "model.safetensors").write_bytes(b"weights")
    assert fetch_weights("net.tag", f"{address}/model.safetensors") == cache / "net.tag.safetensors"


def test_a_cut_off_download_leaves_nothing_behind(served, cache):
    _, address = served
    with pytest.raises(MscsError, match="broke after 10 of 1000 bytes"):
        fetch_weights("net", f"{address}/cut.pth")
    assert list(cache.iterdir()) == []


def test_without_network_the_error_says_where_to_place_the_file(cache):
    with pytest.raises(MscsError) as error:
        fetch_weights("resnet50.tv_in1k", "http://127.0.0.1:9/resnet50-0676ba61.pth")
    message = str(error.value)
    assert "http://127.0.0.1:9/resnet50-0676ba61.pth" in message
    assert f"{cache / 'resnet50-0676ba61.pth'} (SHA-256: begins with 0676ba61)" in message
    assert "MSCS_WEIGHTS" in message


def test_pinned_weights_are_the_papers(monkeypatch):
    asked = {}
    monkeypatch.setattr("mscs.models.backbone.fetch_weights", lambda name, url: asked.setdefault(name, url))
    for name in PINNED_TAGS:
        fetch_pretrained(name)
    swin = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_"
    assert asked == {
        "hrnet_w48.ms_in1k": "https://huggingface.co/timm/hrnet_w48.ms_in1k/resolve/main/model.safetensors",
        "resnet50.tv_in1k": "https://download.pytorch.org/models/resnet50-0676ba61.pth",
        "resnet101.tv_in1k": "https://download.pytorch.org/models/resnet101-63fe2227.pth",
        "swin_tiny_patch4_window7_224.ms_in1k": f"{swin}tiny_patch4_window7_224.pth",
        "swin_small_patch4_window7_224.ms_in1k": f"{swin}small_patch4_window7_224.pth",
        "swin_base_patch4_window7_224.ms_in1k": f"{swin}base_patch4_window7_224.pth",
        "swin_large_patch4_window7_224.ms_in22k": f"{swin}large_patch4_window7_224_22k.pth",
        "swin_base_patch4_window12_384.ms_in22k": f"{swin}base_patch4_window12_384_22k.pth",
        "swin_large_patch4_window12_384.ms_in22k": f"{swin}large_patch4_window12_384_22k.pth",
    }


def test_a_backbone_without_pinned_weights_needs_a_tag():
    with pytest.raises(UsageError, match=r"no pinned weights; name the tag, one of: .*resnet18\.tv_in1k"):
        build_model("upernet", "resnet18", 3, pretrained=True)


def test_pretrained_true_loads_what_the_server_has(served, monkeypatch):
    folder, address = served
    source = timm.create_model("resnet18")
    torch.save(source.state_dict(), folder / "resnet18.pth")
    monkeypatch.setattr(
        "mscs.models.backbone.fetch_weights", lambda name, url: fetch_weights(name, f"{address}/resnet18.pth")
    )
    model = build_model("upernet", "resnet18.tv_in1k", 3, channels=8, pretrained=True)
    assert torch.equal(model.backbone.body.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


@pytest.mark.parametrize("wrapped", [False, True])
def test_classification_weights_of_every_kind_load_from_a_path(wrapped, tmp_path):
    swin = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 4)}
    cases = [
        ("hrnet_w18_small", {}, "stage4.0.branches.3.1.conv2.weight"),
        ("resnet18", {}, "layer4.1.conv2.weight"),
        ("convnext_atto", {}, "stages.2.blocks.3.mlp.fc1.weight"),
        ("swin_tiny_patch4_window7_224", swin, "layers.2.downsample.reduction.weight"),
    ]
    for name, options, probe in cases:
        source = timm.create_model(name, **options).state_dict()
        path = tmp_path / (f"{name}.pth" if wrapped else f"{name}.safetensors")
        torch.save({"model": source}, path) if wrapped else save_file(source, path)
        backbone = build_backbone(name, pretrained=path, backbone_options=options)
        own = backbone.body.state_dict()
        assert torch.equal(
            own[probe if probe in own else probe.replace("stages.2", "stages_2")], source[probe]
        )


def test_original_swin_files_load(tmp_path):
    options = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 4)}
    source = timm.create_model("swin_tiny_patch4_window7_224", **options).state_dict()
    original = {}
    for name, value in source.items():
        parts = name.split(".")
        if "downsample" in parts:  # the original downsamples at the end of a stage
            parts[1] = str(int(parts[1]) - 1)
        original[".".join(parts).replace("head.fc.", "head.")] = value
    torch.save({"model": original}, tmp_path / "swin.pth")
    name = "swin_tiny_patch4_window7_224"
    backbone = build_backbone(name, pretrained=tmp_path / "swin.pth", backbone_options=options)
    for key, value in backbone.body.state_dict().items():
        assert torch.equal(value, source[key]), key


@pytest.mark.parametrize("name", ["hrnet_w18_small", "resnet18", "swin_tiny_patch4_window7_224"])
def test_weights_of_another_network_are_refused(name, tmp_path):
    torch.save({"stem.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"the weight file lacks \d+ tensors"):
        build_backbone(name, pretrained=tmp_path / "other.pth")
