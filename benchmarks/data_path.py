"""Images a second of the data path alone, against torchvision's per-image transforms in a DataLoader.

    python benchmarks/data_path.py --root <CIFAR-10 as split/class/file> --label "CIFAR-10 (JPEG copy)"

Both give normalised batches of 128 with random crop (reflection padding 4) and flip, from images held in memory,
and are timed in turn: a pass over `--images` of them each, `--repetitions` times.
"""

import argparse
import time

import numpy as np
import torch
from machine import save, summary
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from sagan_attn.training.data import AugmentConfig, FolderData, augment


class PerImage(Dataset):
    """Images and labels, each image through torchvision's transforms, as torchvision's own CIFAR10 does it."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", required=True)
    parser.add_argument("--label", required=True, help="name of the copy of the data")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()

    config = AugmentConfig(crop_padding=4, flip=True)
    data = FolderData(arguments.root, image_size=32, batch_size=128, limit_train=arguments.images, augment=config)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = list(loader)
    images = torch.cat([batch for batch, _ in batches]).permute(0, 2, 3, 1).numpy()
    labels = torch.cat([batch for _, batch in batches]).numpy()
    mean, std = data.preprocess.mean, data.preprocess.std
    peer = DataLoader(
        PerImage(images, labels, mean, std), 128, shuffle=True, num_workers=arguments.workers, drop_last=True
    )

    def ours() -> int:
        generator, seen = torch.Generator(), 0
        for step, (batch, target) in enumerate(loader):
            x, _ = augment(batch, target, config, 10, mean, std, generator.manual_seed(step))
            seen += len(x)
        return seen

    def theirs() -> int:
        return sum(len(x) for x, _ in peer)

    rates: dict[str, list[float]] = {"ours": [], "torchvision": []}
    ours(), theirs()
    for epoch in range(arguments.repetitions):
        loader.sampler.set_epoch(epoch)
        for name, run in (("ours", ours), ("torchvision", theirs)):
            started = time.perf_counter()
            seen = run()
            rates[name].append(seen / (time.perf_counter() - started))
    save(
        "data_path",
        {
            "data": arguments.label,
            "workers_of_torchvision": arguments.workers,
            "images_per_second": {name: summary(values) for name, values in rates.items()},
            "ratio": summary([a / b for a, b in zip(rates["ours"], rates["torchvision"], strict=True)]),
        },
    )


if __name__ == "__main__":
    main()
