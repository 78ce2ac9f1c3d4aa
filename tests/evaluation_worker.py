"""One process of the evaluations in `test_distributed.py`: the reports in a file, whole or not at all."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from conftest import Images, make_model
from transformers import ViTImageProcessor

from hf_rft import evaluate_robustness
from hf_rft.evaluation import flags, subject
from hf_rft.training.distributed import leave_process_group


EXAMPLES, BATCH_SIZE = 24, 2


def evaluate(count: int, batch_size: int, cache_dir: str | Path | None = None, profile: bool = False):
    """The same tiny model and images in each process and each run."""
    torch.set_num_threads(1)
    subject.KINDS = {"digital": ("contrast", "pixelate")}
    flags.SQUARE_STEPS = 10  # trust checks have tests of their own
    model = make_model("resnet").double().eval()
    images = Images(count, dtype=torch.float64)
    with torch.no_grad():
        images.labels = model((images.pixels - 0.5) / 0.5).logits.argmax(dim=1)
    images.labels[::5] = (images.labels[::5] + 1) % 4
    return evaluate_robustness(
        model,
        images,
        ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3),
        norm="linf",
        epsilons=["0", "1/255", "4/255", "16/255"],
        tier=[("apgd", 8), ("apgd_targeted", 4)],
        batch_size=batch_size,
        seed=3,
        cache_dir=cache_dir,
        profile=profile,
        progress_bar=False,
    )


def main(folder: str) -> None:
    """Several batches a process, with a cache that is empty and one that is full, and one batch for all of them."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    cache_dir = Path(folder) / f"cache-{processes}"
    reports = {
        "plain": evaluate(EXAMPLES // 2 + 1, 3),
        "empty cache": evaluate(EXAMPLES // 2 + 1, 3, cache_dir),
        "full cache": evaluate(EXAMPLES // 2 + 1, 3, cache_dir),
        "one batch": evaluate(4, 4),
        "profile": evaluate(4, 1, profile=True),
    }
    state = PartialState()
    result = {name: report.to_dict() for name, report in reports.items()}
    result["world_size"] = state.num_processes
    (Path(folder) / f"evaluation-{processes}-{state.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    if sys.argv[1] == "--to_be_killed":
        evaluate(EXAMPLES, BATCH_SIZE, sys.argv[2])
    else:
        main(sys.argv[1])
    leave_process_group()
