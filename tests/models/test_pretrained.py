"""Pretrained weights, from a hub on this machine and from files."""

import hashlib
import http.server
import threading
import time

import pytest
import timm
import torch
from huggingface_hub import close_session, constants
from safetensors.torch import load_file, save, save_file
from sklearn.datasets import load_sample_image

from mscs.errors import MscsError, UsageError
from mscs.model_options import BackboneOptions
from mscs.models import build_model, fetch_pretrained
from mscs.models.backbone import build_backbone
from mscs.models.pretrained import PINNED_TAGS, pretrained_record

TAG = "resnet18.tv_in1k"
OPTIONS = BackboneOptions(output_stride=32)


class Hub:
    """A Hugging Face hub that serves `files` (repository to bytes), with their SHA-256 or a wrong one."""

    def __init__(self):
        self.files, self.requests, self.lie, self.cut, self.tries = {}, [], None, None, 0
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *arguments):
                pass

            def do_HEAD(self):
                self.do_GET()

            def do_GET(self):
                hub.requests.append((self.command, self.path))
                data = hub.files.get(self.path.split("/resolve/")[0].removeprefix("/"))
                if data is None:
                    self.send_response(404)
                    self.send_header("X-Error-Code", "RepoNotFound")
                    self.end_headers()
                    return
                start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
                self.send_response(206 if start else 200)
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("ETag", f'"{hub.lie or hashlib.sha256(data).hexdigest()}"')
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data[start:][: hub.cut])

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # what HF_ENDPOINT sets when the client is imported
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("MSCS_WEIGHTS", str(folder))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    close_session()  # the client keeps one, with the proxies of its first use
    return folder


@pytest.fixture
def served(hub):
    """The weights that the hub has for `TAG`."""
    tensors = timm.create_model("resnet18").state_dict()
    hub.files[f"timm/{TAG}"] = save(tensors)
    return tensors


def test_a_file_is_fetched_once_and_then_needs_no_network(hub, served, cache, monkeypatch):
    path = fetch_pretrained(TAG)
    assert path.read_bytes() == hub.files[f"timm/{TAG}"]
    assert cache in path.parents
    assert hub.requests[-1] == ("GET", f"/timm/{TAG}/resolve/main/model.safetensors")
    hub.requests.clear()
    assert fetch_pretrained(TAG) == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_pretrained(TAG) == path
    assert hub.requests == []


def test_pretrained_true_loads_what_the_hub_has(hub, served):
    model = build_model("upernet", TAG, 3, channels=8, pretrained=True)
    assert torch.equal(model.backbone.body.layer4[1].conv2.weight, served["layer4.1.conv2.weight"])


def test_the_record_names_the_file_and_its_checksum(hub, served, tmp_path):
    digest = hashlib.sha256(hub.files[f"timm/{TAG}"]).hexdigest()
    assert pretrained_record(TAG, True) == {TAG: digest}
    assert pretrained_record(TAG, False) is None
    (tmp_path / "own.safetensors").write_bytes(hub.files[f"timm/{TAG}"])
    assert pretrained_record("resnet18", tmp_path / "own.safetensors") == {"own.safetensors": digest}
    with pytest.raises(UsageError, match="no weight file"):
        pretrained_record("resnet18", tmp_path / "gone.pth")


def test_a_file_that_changed_is_refused(hub, served):
    path = fetch_pretrained(TAG)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(MscsError, match=r"has SHA-256 .* expected .*Delete .*blobs"):
        fetch_pretrained(TAG)


def test_a_file_that_is_not_what_the_hub_states_is_refused(hub, served):
    hub.lie = "0" * 64
    with pytest.raises(MscsError, match=f"expected {'0' * 64}"):
        fetch_pretrained(TAG)


def test_a_cut_off_download_is_no_file(hub, served):
    hub.cut = 100
    with pytest.raises(MscsError, match="cannot download"):
        fetch_pretrained(TAG)
    hub.cut = None
    assert fetch_pretrained(TAG).read_bytes() == hub.files[f"timm/{TAG}"]


@pytest.mark.parametrize("offline", [True, False])
def test_without_network_the_error_says_what_to_do(offline, hub, cache, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(MscsError, match=rf"timm/{TAG}/model.safetensors .*{cache}.*give pretrained the path"):
        fetch_pretrained(TAG)
    assert bool(hub.requests) is not offline


def test_pinned_weights_are_the_papers(monkeypatch, tmp_path):
    asked = []

    def answer(repo_id, filename, **_):
        asked.append(repo_id)
        (tmp_path / filename).touch()
        return tmp_path / filename

    monkeypatch.setattr("mscs.models.pretrained.hf_hub_download", answer)
    for name in PINNED_TAGS:
        fetch_pretrained(name)
    assert asked == [
        "timm/hrnet_w48.ms_in1k",
        "timm/resnet50.tv_in1k",
        "timm/resnet101.tv_in1k",
        "timm/swin_tiny_patch4_window7_224.ms_in1k",
        "timm/swin_small_patch4_window7_224.ms_in1k",
        "timm/swin_base_patch4_window7_224.ms_in1k",
        "timm/swin_large_patch4_window7_224.ms_in22k",
        "timm/swin_base_patch4_window12_384.ms_in22k",
        "timm/swin_large_patch4_window12_384.ms_in22k",
    ]


def test_a_backbone_without_pinned_weights_needs_a_tag():
    with pytest.raises(UsageError, match=r"no pinned weights; name the tag, one of: .*resnet18\.tv_in1k"):
        build_model("upernet", "resnet18", 3, pretrained=True)


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
        backbone = build_backbone(name, BackboneOptions(backbone_options=options), pretrained=path)
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
    backbone = build_backbone(
        name, BackboneOptions(backbone_options=options), pretrained=tmp_path / "swin.pth"
    )
    for key, value in backbone.body.state_dict().items():
        assert torch.equal(value, source[key]), key


@pytest.mark.parametrize("name", ["hrnet_w18_small", "resnet18", "swin_tiny_patch4_window7_224"])
def test_weights_of_another_network_are_refused(name, tmp_path):
    torch.save({"stem.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"lacks \d+ tensors of the backbone: .*1 others: stem\.weight"):
        build_backbone(name, pretrained=tmp_path / "other.pth")


def test_weights_of_another_size_are_refused_in_one_line(tmp_path):
    torch.save(timm.create_model("resnet50").state_dict(), tmp_path / "other.pth")
    with pytest.raises(UsageError, match=r"size mismatch for layer1\.0\.conv1\.weight") as error:
        build_backbone("resnet18", pretrained=tmp_path / "other.pth")
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(("picture", "first_guess"), [("china.jpg", 442), ("flower.jpg", 985)])
def test_packaged_weights_know_a_bell_cote_and_a_daisy(tmp_path, monkeypatch, picture, first_guess):
    monkeypatch.setenv("MSCS_WEIGHTS", str(tmp_path))
    network = timm.create_model("tf_efficientnet_lite0").eval()
    path = fetch_pretrained("tf_efficientnet_lite0")
    network.load_state_dict(load_file(path))
    image = torch.from_numpy(load_sample_image(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    image = torch.nn.functional.interpolate(image, size=(224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        scores = network(image)
    assert scores.argmax().item() == first_guess
    modified = path.stat().st_mtime_ns
    assert pretrained_record("tf_efficientnet_lite0", True)["tf_efficientnet_lite0"]
    assert path.stat().st_mtime_ns == modified, "they are converted once"


def test_a_backbone_gets_images_normalised_as_it_was_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("MSCS_WEIGHTS", str(tmp_path))
    backbone = build_backbone("tf_efficientnet_lite0", OPTIONS, pretrained=True).eval()
    levels = torch.rand(2, 3, 64, 96)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        found = backbone((levels - mean) / std)
        expected = backbone.body(2 * levels - 1)[-4:]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert [name for name in backbone.state_dict() if "scale" in name or "shift" in name] == []
