"""Versions of the packages a number depends on."""

from importlib.metadata import version


PACKAGES = ("hf_rft", "torch", "transformers", "timm", "datasets")


def versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES}
