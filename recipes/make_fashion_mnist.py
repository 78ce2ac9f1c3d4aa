"""Make `hf_rft/data/fashion_mnist_5k` from the Debian package `dataset-fashion-mnist`.

    apt-get install dataset-fashion-mnist
    python recipes/make_fashion_mnist.py

Takes the first 500 training and 100 test images of each class, in their original order.
"""

import argparse
import gzip
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]


def read_idx(path: Path) -> np.ndarray:
    """Read an unsigned-byte array in the IDX format: magic number, sizes as big-endian integers, then the bytes."""
    data = gzip.decompress(path.read_bytes())
    dimensions = data[3]
    shape = np.frombuffer(data, dtype=">i4", count=dimensions, offset=4)
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def make_split(source: Path, prefix: str, per_class: int) -> datasets.Dataset:
    images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
    kept = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(len(CLASSES))]))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    rows = {"image": [Image.fromarray(images[i]) for i in kept], "label": labels[kept].tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument(
        "--target", type=Path, default=Path(__file__).parents[1] / "hf_rft" / "data" / "fashion_mnist_5k"
    )
    args = parser.parse_args()
    for split, prefix, per_class in (("train", "train", 500), ("test", "t10k", 100)):
        path = args.target / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        make_split(args.source, prefix, per_class).to_parquet(path)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
