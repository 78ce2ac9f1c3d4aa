"""The page of `app.py`: its parts, and what happens when visitors use them."""

import contextlib
import itertools
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from app_attack import (
    AttackResult,
    Classifier,
    attack_image,
    attack_passes,
    epsilon_scale,
    magnified,
    read_image,
    run_in_background,
    to_image,
)
from app_text import (
    compare_strength,
    describe_pixels,
    describe_report,
    describe_result,
    describe_threat,
    draw_report,
    status_line,
    top_classes,
)
from PIL import Image

from hf_rft import RobustnessReport, ThreatModel
from hf_rft.markdown import plain
from hf_rft.model_card import NORM_NAMES
from hf_rft.threat_model import NORMS


try:
    import gradio as gr
except ImportError as error:
    raise ImportError("recipes/app.py needs gradio, the extra `app` of hf_rft: `pip install gradio`.") from error


# Attacks at a time, of all visitors together; the others wait in the queue.
CONCURRENT_ATTACKS = 1
NUM_EXAMPLES = 8
PREDICTED = -1  # in place of the number of a class

# Small pictures are enlarged as they are, pixel by pixel: smoothing would hide what an attack does.
CSS = """
.pixels img {image-rendering: pixelated; width: 100%; height: 100%; object-fit: contain}
.pixels label {white-space: nowrap; padding: 2px 6px}
.pixels label > span {display: none}
.examples .gallery {gap: 6px}
.examples .gallery-item, .examples .gallery-item .container {width: 60px; height: 60px; min-width: 0}
.examples .gallery-item img {image-rendering: pixelated}
.classes h2 {display: block; font-size: var(--text-xl); line-height: 1.3; padding: 24px 0 8px; text-align: center}
.fooled strong:first-child {color: #dc2626}
.withstands strong:first-child {color: #16a34a}
.status {min-height: 44px; padding-top: 10px; box-sizing: border-box}
.status.error {background: #fee2e2; color: #991b1b; font-weight: 600; padding: 10px 12px; border-radius: 8px}
.status progress {display: block; width: 100%; height: 8px; margin-top: 4px; accent-color: var(--color-accent)}
"""
# The last that a cancelled attack said was how far it had come. Decided in the browser: in an answer from here, the
# attack's own last words might overtake it.
SAY_IF_CANCELLED = f"status => status.includes('status busy') ? {json.dumps(status_line('Cancelled.'))} : status"

LIMITS = """
**What this shows, and what not.** One image is an anecdote; the numbers above count many. Epsilon is measured in the
pixels that a model sees, scaled to [0, 1], after its own resizing. Without a true class, the attack leads away from
what a model predicts, right or wrong. Predictions are for the exact perturbation; the pictures show it rounded to
8 bits. The same image and settings always give the same result.
"""
DIFFERENT_SIZES = """
The two models see images of different sizes: the same L2 or L1 epsilon changes each pixel of the larger one less.
"""


class Panel(NamedTuple):
    """The part of the page that one model has."""

    classifier: Classifier
    verdict: Any
    clean: Any
    perturbation: Any
    adversarial: Any
    clean_classes: Any
    adversarial_classes: Any
    note: Any

    @property
    def components(self) -> tuple:
        return self[1:]


def make_panel(classifier: Classifier, role: str) -> Panel:
    picture = {"format": "png", "height": 170, "interactive": False, "elem_classes": "pixels", "min_width": 100}
    with gr.Column(min_width=400):
        gr.Markdown(f"### {role}: {plain(classifier.name)}")
        verdict = gr.Markdown(min_height=64)
        with gr.Row():
            clean = gr.Image(label="clean", buttons=[], **picture)
            perturbation = gr.Image(label="perturbation", buttons=[], **picture)
            adversarial = gr.Image(label="adversarial", buttons=["download"], **picture)
        with gr.Row():
            clean_classes = gr.Label(label="clean: taken for", elem_classes="classes", min_width=150)
            adversarial_classes = gr.Label(label="under attack: taken for", elem_classes="classes", min_width=150)
        note = gr.Markdown()
    return Panel(classifier, verdict, clean, perturbation, adversarial, clean_classes, adversarial_classes, note)


def show_nothing(panel: Panel) -> dict:
    return {
        **dict.fromkeys(panel.components),
        panel.verdict: gr.Markdown("", elem_classes=[]),
        panel.perturbation: gr.Image(None, label="perturbation"),
    }


def show_clean(panel: Panel, pixels: torch.Tensor, logits: torch.Tensor) -> dict:
    """Pixels of shape `(channels, height, width)`, logits of shape `(classes,)`."""
    return {
        **show_nothing(panel),
        panel.verdict: gr.Markdown("Not attacked yet.", elem_classes=[]),
        panel.clean: to_image(pixels),
        panel.clean_classes: top_classes(logits, panel.classifier.classes),
        panel.note: f"The model sees {describe_pixels(pixels)}.",
    }


def show_result(panel: Panel, result: AttackResult) -> dict:
    change, factor = magnified(result.adversarial - result.pixels)
    magnification = f"×{factor:.0f}" if factor >= 10 else f"×{factor:.1f}"
    classes = panel.classifier.classes
    colour = ["fooled"] if result.is_fooled else ["withstands"] if result.threat_model.epsilon else []
    return {
        **show_clean(panel, result.pixels, result.logits),
        panel.verdict: gr.Markdown(describe_result(result, classes), elem_classes=colour),
        panel.perturbation: gr.Image(
            to_image(change), label=f"perturbation {magnification if result.distance else 'none'}"
        ),
        panel.adversarial: to_image(result.adversarial),
        panel.adversarial_classes: top_classes(result.adversarial_logits, classes),
    }


class Page:
    """The page, and what happens when visitors use it. [`build_app`] has the arguments.

    Events are bound with `preprocess=False`: gradio would open an image before anybody looked at its size, and would
    answer a broken one with a message of its own. So methods get values as the browser sends them.
    """

    def __init__(
        self, report: RobustnessReport, classifiers: Sequence[Classifier], examples: Sequence[str], max_steps: int
    ):
        self.report, self.classifiers, self.max_steps = report, classifiers, max_steps
        sizes = [classifier.pixels(Image.new("RGB", (64, 64))).shape for classifier in classifiers]
        self.scales = {norm: epsilon_scale(norm, report, sizes[0].numel()) for norm in NORMS}
        # Off the browser, nothing is asked of any other server: no statistics, no fonts.
        name, hour = classifiers[0].name, 3600
        with gr.Blocks(title=name, analytics_enabled=False, delete_cache=(hour, 24 * hour)) as self.blocks:
            gr.Markdown(f"# How robust is {plain(name)}?\n{describe_report(report)}")
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    self._make_controls(examples)
                with gr.Column(scale=3):
                    self.status = gr.HTML(status_line("Drop an image, or take an example."), padding=False)
                    with gr.Row():
                        roles = ("Robust model", "Compared with")
                        self.panels = [make_panel(*pair) for pair in zip(classifiers, roles, strict=False)]
                    with gr.Row():
                        with gr.Column(scale=3, min_width=400):
                            epsilon = report.epsilons[-1]
                            figure = draw_report(report, report.norm, epsilon)
                            self.curve = gr.Plot(figure, show_label=False, format="png")
                        with gr.Column(scale=2, min_width=280):
                            gr.Markdown(LIMITS + (DIFFERENT_SIZES if len(set(sizes)) > 1 else ""))
                            self.strength = gr.Markdown(compare_strength(report, max_steps))
            self._bind()
        self.blocks.queue(max_size=100)

    def _make_controls(self, examples: Sequence[str]) -> None:
        report = self.report
        self.image = gr.Image(
            label="Image", format="png", height=220, sources=["upload", "clipboard"], buttons=[], elem_classes="pixels"
        )
        if examples:
            with gr.Column(elem_classes="examples"):
                gr.Examples([[example] for example in examples], self.image, examples_per_page=NUM_EXAMPLES)
        classes = [("what each model predicts", PREDICTED), *zip(self.classifiers[0].classes, itertools.count())]
        self.label = gr.Dropdown(classes, value=PREDICTED, label="True class", info="The attack leads away from it.")
        norms = [(NORM_NAMES[norm], norm) for norm in sorted(NORMS, key=lambda norm: norm != report.norm)]
        self.norm = gr.Radio(norms, value=report.norm, label="Norm")
        self.epsilon = gr.Slider(**self._slider(report.norm), interactive=True)
        self.threat = gr.Markdown(describe_threat(report, report.norm, report.epsilons[-1]))
        with gr.Row():
            self.attack_button = gr.Button("Attack", variant="primary", min_width=100)
            self.cancel_button = gr.Button("Cancel", variant="stop", min_width=100, interactive=False)
        self.steps = gr.Slider(1, max(self.max_steps, 2), value=self.max_steps, step=1, label="Steps of the attack")

    def _bind(self) -> None:
        shown = [self.status, *(component for panel in self.panels for component in panel.components)]
        buttons = [self.attack_button, self.cancel_button]
        chosen = [self.image, self.label, self.norm, self.epsilon, self.steps]
        raw: Any = {"preprocess": False, "api_visibility": "private", "show_progress": "hidden"}

        started = self.attack_button.click(self.start, None, [self.status, *buttons], queue=False, **raw)
        attack = started.then(self.attack, chosen, shown, concurrency_limit=CONCURRENT_ATTACKS, **raw)
        # Whatever ends the attack. gradio closes the generator of a cancelled one, and that ends the work.
        attack.then(self.release, None, buttons, queue=False, **raw)
        attack.then(None, self.status, self.status, js=SAY_IF_CANCELLED, **raw)
        self.cancel_button.click(None, cancels=attack)
        self.image.change(self.choose_image, self.image, [*shown, *buttons], cancels=attack, **raw)
        threat = [self.threat, self.curve]
        self.norm.change(self.choose_norm, self.norm, [self.epsilon, *threat], **raw)
        self.epsilon.change(self.choose_epsilon, [self.norm, self.epsilon], threat, **raw)
        self.steps.change(self.choose_steps, self.steps, self.strength, **raw)

    # --- Norm, epsilon, steps ---

    def _slider(self, norm: str) -> dict[str, Any]:
        scale = self.scales[norm]
        start = self.report.epsilons[-1] if norm == self.report.norm else scale.step * (scale.count // 2)
        return {
            "minimum": 0,
            "maximum": scale.position(scale.step * scale.count),
            "step": scale.position(scale.step),
            "value": scale.position(start),
            "label": "Epsilon, in 1/255" if norm == "linf" else "Epsilon",
        }

    def choose_norm(self, norm: str) -> dict:
        slider = self._slider(norm)
        return {self.epsilon: gr.Slider(**slider), **self.choose_epsilon(norm, slider["value"])}

    def choose_epsilon(self, norm: str, position: float) -> dict:
        epsilon = self.scales[norm].epsilon(position)
        return {
            self.threat: describe_threat(self.report, norm, epsilon),
            self.curve: draw_report(self.report, norm, epsilon),
        }

    def _checked_steps(self, steps: float) -> int:
        return min(max(int(steps), 1), self.max_steps)

    def choose_steps(self, steps: float) -> str:
        return compare_strength(self.report, self._checked_steps(steps))

    # --- Image ---

    def choose_image(self, image: dict | None) -> dict:
        """Show what the models say of it without any attack."""
        shown = {key: value for panel in self.panels for key, value in show_nothing(panel).items()}
        shown |= self.release()
        if image is None:
            return {**shown, self.status: status_line("Drop an image, or take an example.")}
        try:
            picture = read_image(image["path"])
            for panel in self.panels:
                pixels = panel.classifier.pixels(picture.image)
                shown |= show_clean(panel, pixels[0], panel.classifier.logits(pixels))
        except ValueError as error:
            return {**shown, self.status: status_line(str(error), "error")}
        return {**shown, self.status: status_line(" ".join([*picture.notes, "Press Attack."]))}

    # --- Attack ---

    def start(self) -> dict:
        """At once, while the attack itself may have to wait for that of another visitor."""
        return {
            self.status: status_line("Waiting: attacks run one at a time.", "busy"),
            self.attack_button: gr.Button(interactive=False),
            self.cancel_button: gr.Button(interactive=True),
        }

    def release(self) -> dict:
        return {
            self.attack_button: gr.Button(interactive=True),
            self.cancel_button: gr.Button(interactive=False),
        }

    def attack(
        self, image: dict | None, label: int, norm: str, position: float, steps: float
    ) -> Iterator[dict[Any, Any]]:
        """Attack the models one after the other; yields what to show meanwhile, and last the results."""
        if image is None:
            yield {self.status: status_line("Give an image first.", "error")}
            return
        steps, begin = self._checked_steps(steps), time.monotonic()
        try:
            picture = read_image(image["path"])
            threat_model = ThreatModel(norm, self.scales[norm].epsilon(position))
            numbers = self._numbers(label)

            def work(tick: Callable[[], None]) -> list[AttackResult]:
                return [
                    attack_image(classifier, picture.image, number, threat_model, steps, tick)
                    for classifier, number in zip(self.classifiers, numbers, strict=True)
                ]

            total = attack_passes(steps, norm) * len(self.classifiers)
            # Closed also when this generator is: the visitor cancelled, or left.
            with contextlib.closing(run_in_background(work)) as progress:
                for done, results in progress:
                    if results is None:
                        message = f"Attacking: {done} of {total} passes through the model"
                        yield {self.status: status_line(message, "busy", share=done / total)}
                        continue
                    shown = {}
                    for panel, result, number in zip(self.panels, results, numbers, strict=True):
                        shown |= show_result(panel, result)
                        if number is None and label != PREDICTED:
                            name = self.classifiers[0].classes[label]
                            shown[panel.note] += f" It has no class *{plain(name)}*: attacked was its own prediction."
                    message = f"Done in {time.monotonic() - begin:.1f} seconds."
                    yield {**shown, self.status: status_line(" ".join([*picture.notes, message]))}
        except ValueError as error:
            yield {self.status: status_line(str(error), "error")}
        except Exception:  # out of memory, for example
            traceback.print_exc()
            yield {self.status: status_line("The attack failed; the log of the app says why.", "error")}

    def _numbers(self, label: int) -> list[int | None]:
        """The number of the chosen class in each model; None where it has no such class, or none was chosen."""
        if label == PREDICTED:
            return [None] * len(self.classifiers)
        name = self.classifiers[0].classes[label]
        return [one.classes.index(name) if name in one.classes else None for one in self.classifiers]
