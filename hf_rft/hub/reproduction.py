"""The code in a model card that measures the model again."""

import json
from typing import Any

from ..data import bundled
from ..evaluation.report import RobustnessReport
from ..threat_model import format_epsilon


def quoted(value: Any) -> str:
    """A value as Python code in one line, strings in double quotes."""
    if isinstance(value, list | tuple):
        text = ", ".join(map(quoted, value))
        return f"[{text}]" if isinstance(value, list) else f"({text})"
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _call(values: dict[str, Any]) -> str:
    return ", ".join(f"{key}={quoted(value)}" for key, value in values.items())


def code_to_reproduce(report: RobustnessReport, model_id: str) -> str:
    """Python that loads model and images, measures again, and prints whether the images are the same.

    Args:
        report ([`RobustnessReport`]):
            Its `settings["dataset"]` may hold, besides what [`evaluate_robustness`] writes: `split_off`, arguments of
            `Dataset.train_test_split` if the images are a part of the training images, and `shuffle_seed`, if they
            are the first ones of the split after it was shuffled.
        model_id (`str`):
            Repository or folder.
    """
    settings, data = report.settings, report.settings.get("dataset", {})
    imports = ["from datasets import load_dataset", "from hf_rft import evaluate_robustness, load_robust_model"]
    dtype = settings.get("autocast_dtype")
    dtype = f"torch.{dtype}" if dtype in ("bfloat16", "float16") else None
    if dtype is not None:
        imports.insert(0, "import torch")
    if not data.get("name") or not data.get("split"):
        imports.remove("from datasets import load_dataset")
        dataset = "...  # the images have no public name: put them here"
    else:
        if is_bundled := f"{bundled.PREFIX}{data['name']}" in bundled.DATASETS:
            imports.append("from hf_rft.data import bundled")
        dataset = _loading(data, len(report), is_bundled)
    attacks = [tuple(attack[key] for key in ("attack", "steps", "restarts")) for attack in settings["attacks"]]
    given = {
        "norm": report.norm,
        "epsilons": [format_epsilon(epsilon) for epsilon in report.epsilons],
        "tier": attacks if settings["tier"] == "custom" else settings["tier"],
        "seed": settings["seed"],
        **({"profile": True} if report.profile else {}),
        **{key: data[key] for key in ("image_column", "label_column") if data.get(key)},
    }
    lines = [
        *imports,
        "",
        f"model, processor, report = load_robust_model({quoted(model_id)})",
        f"dataset = {dataset}",
        "again = evaluate_robustness(",
        *(f"    {name}," for name in ("model", "dataset", "processor")),
        *(f"    {key}={quoted(value)}," for key, value in given.items()),
        *([f"    autocast_dtype={dtype},"] if dtype is not None else []),
        ")",
        "print(again.table())",
    ]
    if data.get("sha256"):
        same = 'again.settings["dataset"]["sha256"] == report.settings["dataset"]["sha256"]'
        lines.append(f'print("the same images:", {same})')
    return "\n".join(lines)


def _loading(data: dict[str, Any], count: int, is_bundled: bool) -> str:
    source, remark = quoted(data["name"]), "  # a folder of this name, not on the Hub"
    if is_bundled:
        name = f"{bundled.PREFIX}{data['name']}"
        source, remark = f"bundled.resolve({quoted(name)})", ""
    elif data.get("revision"):
        config = [quoted(data["config"])] if data.get("config") else []
        source, remark = ", ".join([source, *config, _call({"revision": data["revision"]})]), ""
    split_off, seed = data.get("split_off"), data.get("shuffle_seed")
    text = f"load_dataset({source}, {_call({'split': 'train' if split_off else data['split']})})"
    if split_off:
        text += f'.train_test_split({_call(split_off)})["test"]'
    if seed is not None:
        text += f".shuffle({_call({'seed': seed})}).select(range({count}))"
    return text + remark
