"""Profile small's cross-entropy baseline beside the nearest network of segmentation_models_pytorch.

The peer is its UPerNet on the same backbone with the same weights, trained by the plain loop below on the
very batches that our UPerNet sees (files, crops, augmentation, order), with the same optimizer, steps and
schedule. The learning rate of both comes from the same list, 0.03 to 1: 240 steps on train, scored on val.

    python benchmarks/peer.py --search --lr 0.03     # one try, scored on val
    python benchmarks/peer.py --seed 0 --lr 0.3      # all steps on train and val, scored on test

Adds a row to results/peer.json. Ours are the runs of profile small (`mscs train`); its images per second are
those of its record. Needs `pip install segmentation-models-pytorch`.
"""

import argparse
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from mscs import build
from mscs.loader import train_loader
from mscs.metrics import confusion_matrix, scores
from mscs.models import fetch_pretrained
from mscs.models.weights import read_state_dict
from mscs.params import load_params
from mscs.paths import data_root
from mscs.results import read_json, write_json
from mscs.transforms import IMAGENET_MEAN, IMAGENET_STD, normalize

RESULTS = Path(__file__).parent / "results" / "peer.json"
RUN = "cityscapes-upernet-r101-ce"
SEARCH = {"steps": 240, "train_split": "train", "score_split": "val"}


class Peer(torch.nn.Module):
    """The peer's UPerNet for images that are normalised as ours, of any size."""

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        import segmentation_models_pytorch as smp

        backbone = "tu-tf_efficientnet_lite0"
        self.network = smp.UPerNet(
            backbone, encoder_weights=None, classes=num_classes, decoder_channels=channels
        )
        weights = read_state_dict(fetch_pretrained("tf_efficientnet_lite0"))
        body = self.network.encoder.model
        body.load_state_dict({name: weights[name] for name in body.state_dict()})
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        self.register_buffer("scale", std / 0.5)  # the backbone was trained on mean and deviation 0.5
        self.register_buffer("shift", (mean - 0.5) / 0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (B, K, H, W); the network wants sides that are multiples of 32."""
        height, width = images.shape[-2:]
        padded = F.pad(images * self.scale + self.shift, (0, -width % 32, 0, -height % 32))
        return self.network(padded)[..., :height, :width]


def main() -> None:
    """Train, score, and add a row to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lr", type=float, required=True, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--search", action="store_true", help="240 steps on train, scored on val")
    args = parser.parse_args()
    overrides = {"lr": args.lr, **(SEARCH if args.search else {})}
    settings = load_params().resolve(RUN, "small", overrides).settings
    build.apply_machine_settings(settings)
    data, schedule = settings.data, settings.schedule
    train, test = (
        build.open_dataset(settings, split, data_root(settings))
        for split in (data.train_split, data.score_split)
    )
    torch.manual_seed(args.seed)
    model = Peer(train.num_classes, settings.model.options["channels"]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=schedule.weight_decay)
    decay = torch.optim.lr_scheduler.PolynomialLR(optimizer, schedule.steps, power=0.9)
    batches = train_loader(
        train,
        build.train_transform(settings),
        batch_size=schedule.batch_size,
        seed=args.seed,
        num_steps=schedule.steps,
    )
    began = time.process_time()
    for batch in tqdm(batches, "train", schedule.steps):
        images = batch.images.contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(model(images), batch.labels, ignore_index=255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
    seconds = time.process_time() - began
    model.eval()
    confusion = torch.zeros(train.num_classes, train.num_classes, dtype=torch.int64)
    with torch.inference_mode():
        for sample in tqdm((test[i] for i in range(len(test))), "score", len(test)):
            predicted = model(normalize(sample.image)[None])[0].argmax(0)
            confusion += confusion_matrix(predicted, torch.from_numpy(sample.label), train.num_classes)
    row = {
        "split": data.score_split,
        "lr": args.lr,
        "seed": args.seed,
        "steps": schedule.steps,
        "miou": scores(confusion)["miou"],
        "images_per_cpu_second": schedule.steps * schedule.batch_size / seconds,
        "torch": torch.__version__,
        "segmentation_models_pytorch": version("segmentation-models-pytorch"),
    }
    write_json(RESULTS, [*(read_json(RESULTS) if RESULTS.exists() else []), row])
    print(row)


if __name__ == "__main__":
    main()
