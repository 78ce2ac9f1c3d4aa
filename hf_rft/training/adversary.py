"""The adversary of training: it crafts the adversarial examples that a step learns from."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator

from ..attacks import TRAINING_ATTACKS
from ..attacks.base import Attack, KLDivergence, checked, classes_of
from ..models.classifier import PixelClassifier
from ..models.folding import FoldablePair, folded, folded_weights
from ..schedules import scaled_steps
from ..threat_model import ThreatModel
from ..utils.noise import TRAINING_ATTACK, example_generators


class Adversary:
    """Attacks a classifier during training, with a given share of the target epsilon.

    Args:
        classifier ([`PixelClassifier`]):
            The classifier to attack.
        attack ([`Attack`]):
            The attack to run.
        threat_model ([`ThreatModel`]):
            Norm and target epsilon.
        steps (`int`):
            Gradient evaluations per example.
        scale_steps (`bool`, *optional*, defaults to `False`):
            Take fewer steps while epsilon is below its target; see [`scaled_steps`].
        objective (`"cross_entropy"` or `"kl"`, *optional*):
            What the attack increases: the loss of the true class, or the divergence from the clean prediction.
        seed (`int`, *optional*, defaults to 0):
            Seed of the noise, which also depends on the optimizer step and the example's position in the global batch.
        training_mode (`bool`, *optional*, defaults to `False`):
            Attack the model in training mode (with dropout) instead of evaluation mode.
        dtype (`torch.dtype`, *optional*):
            Run the model under autocast. Gradients are rounded, but the examples stay inside the ball.
        foldable_pairs (`Sequence[FoldablePair]`, *optional*):
            BatchNorms to fold into their convolutions during the attack; see [`hf_rft.models.folding`].
        compiler_options (`Mapping`, *optional*):
            Arguments of `torch.compile` for the pass that the attack repeats. None: it is not compiled.
    """

    def __init__(
        self,
        classifier: PixelClassifier,
        attack: Attack,
        *,
        threat_model: ThreatModel,
        steps: int,
        scale_steps: bool = False,
        objective: str = "cross_entropy",
        seed: int = 0,
        training_mode: bool = False,
        dtype: torch.dtype | None = None,
        foldable_pairs: Sequence[FoldablePair] = (),
        compiler_options: Mapping[str, Any] | None = None,
    ):
        self.classifier, self.attack, self.objective, self.seed = classifier, attack, objective, seed
        self.target, self.steps, self.scale_steps = threat_model, steps, scale_steps
        self.training_mode, self.dtype, self.foldable_pairs = training_mode, dtype, foldable_pairs
        self.attacks = 0  # number of attacks so far
        self._compiled_logits = None
        if compiler_options is not None:
            # torch limits the number of graphs per function: drop those of earlier trainers.
            torch._dynamo.reset_code(PixelClassifier.logits.__code__)  # pyright: ignore[reportPrivateImportUsage]
            # This pass does not depend on epsilon. It is not folded: inductor fuses BatchNorm, and CUDA graphs need
            # weights that stay in place.
            self._compiled_logits = torch.compile(classifier.logits, **compiler_options)

    @classmethod
    def from_arguments(cls, args: Any, classifier: PixelClassifier, attack: Attack | None, **options) -> "Adversary":
        """The adversary that [`RobustTrainingArguments`] describe, with the user's own attack if there is one."""
        built_in = {"random_start": args.attack_random_start, "step_size": args.attack_step_size}
        attack = checked(attack) if attack else partial(TRAINING_ATTACKS[args.attack], **built_in)
        return cls(
            classifier,
            attack,
            threat_model=ThreatModel(args.norm, args.epsilon),
            steps=args.attack_steps,
            scale_steps=args.attack_steps_schedule == "epsilon",
            seed=args.seed,
            training_mode=args.attack_model_mode == "train",
            dtype=getattr(torch, args.attack_dtype) if args.attack_dtype else None,
            **options,
        )

    def strength(self, share: float) -> tuple[ThreatModel, int]:
        """Threat model and number of steps at a share of the target epsilon; no steps at epsilon 0."""
        threat_model = ThreatModel(self.target.norm, share * float(self.target.epsilon))
        if threat_model.is_trivial:
            return threat_model, 0
        return threat_model, scaled_steps(self.steps, share) if self.scale_steps else self.steps

    def __call__(
        self,
        pixels: torch.Tensor,
        labels: torch.Tensor,
        share: float = 1.0,
        *,
        optimizer_step: int = 0,
        first: int = 0,
        **inputs,
    ) -> torch.Tensor:
        """The adversarial examples of one micro-batch.

        Args:
            pixels (`torch.Tensor` of shape `(batch, channels, height, width)`):
                Clean images, pixels in [0, 1].
            labels (`torch.Tensor` of shape `(batch,)`):
                True classes.
            share (`float`, *optional*, defaults to 1.0):
                Share of the target epsilon, above 0.
            optimizer_step, first (`int`, *optional*, defaults to 0):
                The step, and the position of the first example in its global batch. They determine the noise, so
                gradient accumulation and the number of processes do not change it.
            inputs:
                Further inputs of the model.

        Returns:
            `torch.Tensor`: pixels, inside the ball and inside [0, 1].
        """
        positions = range(first, first + len(pixels))
        generator = example_generators(pixels.device, positions, TRAINING_ATTACK, self.seed, optimizer_step)
        forward = partial(self.forward, **inputs)
        threat_model, steps = self.strength(share)
        self.attacks += 1
        options = {}
        with self.under_attack(training=self.training_mode):
            if self.objective == "kl":
                with torch.no_grad():
                    options["objective"] = KLDivergence(forward(pixels))
            return self.attack(
                forward, pixels, labels, threat_model=threat_model, steps=steps, generator=generator, **options
            )

    @contextlib.contextmanager
    def under_attack(self, *, training: bool = False) -> Iterator[None]:
        """The classifier's state during an attack in training."""
        with self.classifier.under_attack(training=training), folded(folded_weights(self.foldable_pairs)):
            yield

    def forward(self, pixels: torch.Tensor, **inputs) -> torch.Tensor:
        """The pass that the attack repeats: pixels to logits, under autocast and compiled if so configured."""
        with torch.autocast(pixels.device.type, self.dtype) if self.dtype else contextlib.nullcontext():
            if self._compiled_logits is None:
                return self.classifier(pixels, **inputs)
            # The next run of a CUDA graph overwrites its results. The logits are copied here; so is the gradient, by
            # the normalisation outside the graph.
            return self._compiled_logits(self.classifier.pixel_values(pixels), **inputs).clone()


class AdversarialAccuracy:
    """Accuracy on the adversarial training examples since the last `pop`."""

    def __init__(self, right: int = 0, seen: int = 0):
        self._right: int | torch.Tensor = right  # stays on the device until it is logged
        self._seen = seen

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a micro-batch, without waiting for the device."""
        self._right = self._right + (logits.detach().argmax(dim=1) == classes_of(labels)).sum()
        self._seen += len(labels)

    def counts(self, accelerator: Accelerator) -> tuple[int, int]:
        """How many examples were right, and how many there were, over all processes."""
        counts = torch.tensor([int(self._right), self._seen], device=accelerator.device)
        right, seen = cast(torch.Tensor, accelerator.reduce(counts, "sum")).tolist()
        return right, seen

    def pop(self, accelerator: Accelerator) -> dict[str, float]:
        """The accuracy, as an entry of the log; empty if there was no training step."""
        right, seen = self.counts(accelerator)
        self._right = self._seen = 0
        return {"adversarial_accuracy": right / seen} if seen else {}
