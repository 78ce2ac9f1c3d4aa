"""Pictures of the adversarial examples that training makes, in TensorBoard and Trackio."""

from typing import Any

import torch
from torchvision.utils import make_grid
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import TensorBoardCallback, TrackioCallback


NAME, COUNT = "adversarial_examples", 8


def picture(pixels: torch.Tensor, adversarial: torch.Tensor) -> torch.Tensor:
    """Three rows: the images, the adversarial ones, and their difference, with its largest value at full contrast.

    Args:
        pixels, adversarial (`torch.Tensor` of shape `(batch, channels, height, width)`):
            Pixels in [0, 1].

    Returns:
        `torch.Tensor` of shape `(3, height, width)`, in [0, 1].
    """
    difference = adversarial - pixels
    scale = 2 * difference.abs().amax().clamp_min(torch.finfo(difference.dtype).tiny)
    return make_grid(torch.cat([pixels, adversarial, 0.5 + difference / scale]), nrow=len(pixels), padding=1)


class AdversarialGallery(TrainerCallback):
    """Shows some of the latest adversarial examples whenever the loss is logged.

    Args:
        trainer ([`RobustTrainer`]):
            The trainer whose trackers receive the pictures.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer
        self._latest: tuple[torch.Tensor, torch.Tensor] | None = None

    def on_adversarial_batch(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs):
        # Copies, so that the rest of the batch is not kept.
        self._latest = kwargs["pixels"][:COUNT].clone(), kwargs["adversarial"][:COUNT].clone()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs=None, **kwargs):
        if self._latest is None or not state.is_world_process_zero or "loss" not in (logs or {}):
            return
        image, self._latest = picture(*(images.float().cpu() for images in self._latest)), None
        for callback in self._trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                callback.tb_writer.add_image(NAME, image, state.global_step)
            elif isinstance(callback, TrackioCallback):
                import trackio

                array = (255 * image).round().to(torch.uint8).permute(1, 2, 0).numpy()
                trackio.log({NAME: trackio.Image(array), "train/global_step": state.global_step})
