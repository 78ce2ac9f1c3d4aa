import pytest
import torch
from transformers import TrainerCallback

from hf_rft.training.gallery import NAME, picture


def test_rows_are_images_adversarial_images_and_their_difference():
    pixels = torch.rand(2, 3, 4, 4)
    adversarial = (pixels + 0.1).clamp(max=1)
    found = picture(pixels, adversarial)
    assert found.shape == (3, 3 * 5 + 1, 2 * 5 + 1)
    torch.testing.assert_close(found[:, 1:5, 1:5], pixels[0])
    torch.testing.assert_close(found[:, 6:10, 6:10], adversarial[1])
    assert found[:, 11:15, 1:5].max() == 1 and found.min() >= 0
    torch.testing.assert_close(picture(pixels, pixels)[:, 11:15, 1:5], torch.full((3, 4, 4), 0.5))


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"robust_loss": "trades"}])
def test_a_callback_sees_every_adversarial_batch(make_trainer, options):
    class Seen(TrainerCallback):
        def on_adversarial_batch(self, args, state, control, *, pixels, adversarial, labels, **kwargs):
            assert 0 <= adversarial.min() and adversarial.max() <= 1
            largest = (adversarial - pixels).abs().max().item()
            batches.append((state.global_step, len(labels), largest))

    batches = []
    trainer = make_trainer(max_steps=2, trainer_options={"callbacks": [Seen()]}, **options)
    trainer.train()
    per_step = options.get("gradient_accumulation_steps", 1)
    assert [step for step, *_ in batches] == [step for step in range(2) for _ in range(per_step)]
    assert all(count == 8 and largest == pytest.approx(8 / 255, abs=1e-6) for _, count, largest in batches)


def test_tensorboard_shows_the_pictures(make_trainer, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    make_trainer(max_steps=2, report_to="tensorboard", save_adversarial_examples=True).train()
    (file,) = (tmp_path / "events").rglob("events*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert [event.step for event in events.Images(NAME)] == [1, 2]


def test_off_by_default(make_trainer):
    trainer = make_trainer()
    assert not any(hasattr(callback, "on_adversarial_batch") for callback in trainer.callback_handler.callbacks)
