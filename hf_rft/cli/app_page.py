"""The page of `app.py`: its words, its parts, and what happens when visitors use them."""

import contextlib
import html
import itertools
import json
import tempfile
import time
import traceback
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..evaluation.report import RobustnessReport
from ..hub.loading import RobustModel
from ..hub.model_card import describe_robustness
from ..threat_model import NORM_NAMES, NORMS, ThreatModel, format_epsilon
from ..utils.markdown import plain
from .app_attack import (
    AttackResult,
    Classifier,
    attack_image,
    attack_passes,
    epsilon_scale,
    read_image,
    run_in_background,
    to_image,
)


try:
    import gradio as gr
except ImportError as error:
    raise ImportError('The page needs gradio: `pip install "hf_rft[app]"`.') from error


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
.status {min-height: 44px; padding-top: 10px; box-sizing: border-box}
.status.error {background: #fee2e2; color: #991b1b; font-weight: 600; padding: 10px 12px; border-radius: 8px}
.status progress {display: block; width: 100%; height: 8px; margin-top: 4px; accent-color: var(--color-accent)}
"""


def status_line(message: str, kind: str = "info", *, share: float | None = None) -> str:
    """HTML of the line above the results: `"info"`, `"error"`, or `"busy"` with a bar that is filled to `share`."""
    bar = "" if share is None else f'<progress max="1" value="{min(share, 1):.3f}"></progress>'
    return f'<div class="status {kind}" role="status">{html.escape(message)}{bar}</div>'


INVITATION = status_line("Drop an image, or take an example.")
# Said by the browser itself: at once, and after whatever a cancelled attack said last.
SAY_WAITING = f"() => {json.dumps(status_line('Waiting: attacks run one at a time.', 'busy'))}"
SAY_IF_CANCELLED = f"status => status.includes('status busy') ? {json.dumps(status_line('Cancelled.'))} : status"

LIMITS = """
**What this shows, and what not.** One image is an anecdote; the report below counts many. The attack here is one run
of APGD: where the report names further or longer ones, an image that withstands it here need not count as robust
there. Epsilon is measured in the pixels that a model sees, scaled to [0, 1], after its own resizing; if two models see
different sizes, the same L2 or L1 epsilon changes each pixel of the larger image less. Without a true class, the
attack leads away from what a model predicts, right or wrong. Predictions are for the exact perturbation; the pictures
show it rounded to 8 bits. The same image and settings always give the same result.
"""


# --- Words ---


def top_classes(logits: torch.Tensor, classes: Sequence[str], count: int = 5) -> dict[str, float]:
    """The likeliest classes with their probabilities."""
    probabilities, indices = logits.softmax(dim=0).topk(min(count, len(classes)))
    return {classes[int(index)]: float(share) for index, share in zip(indices, probabilities, strict=True)}


def describe_threat(report: RobustnessReport, norm: str, epsilon: Fraction) -> str:
    """The chosen norm and epsilon, and what the report knows about them."""
    chosen = f"**epsilon = {format_epsilon(epsilon)}** ({NORM_NAMES[norm]})"
    if norm != report.norm:
        mine, other = NORM_NAMES[report.norm], NORM_NAMES[norm]
        return f"{chosen}: ⚠️ outside what was measured. The report is about {mine} and says nothing about {other}."
    if epsilon > report.epsilons[-1]:
        return f"{chosen}: ⚠️ outside what was measured, which ends at {format_epsilon(report.epsilons[-1])}."
    if epsilon in report.epsilons:
        place = report.epsilons.index(epsilon)
        low, high = report.accuracy_intervals[place]
        return f"{chosen}: accuracy {report.accuracies[place]:.1%} in the report ({low:.1%} to {high:.1%})."
    right = next(index for index, known in enumerate(report.epsilons) if known > epsilon)
    left, right = map(format_epsilon, report.epsilons[right - 1 : right + 1])
    return f"{chosen}: not measured itself; the report has {left} and {right}."


def describe_result(result: AttackResult, classes: Sequence[str]) -> str:
    """Whether the model was fooled, and by how much of a perturbation."""

    def prediction(logits: torch.Tensor) -> str:
        ((name, probability),) = top_classes(logits, classes, count=1).items()
        return f"*{plain(name)}* ({probability:.1%})"

    norm, epsilon = result.threat_model.norm, result.threat_model.epsilon
    limit = f"{NORM_NAMES[norm]} {format_epsilon(epsilon)} ({result.steps} steps)"
    clean = prediction(result.logits)
    if result.errs_already:
        true = plain(classes[result.label])
        return f"**Wrong without any perturbation**: taken for {clean}, but the true class is *{true}*. Not attacked."
    if epsilon == 0:
        return f"**Epsilon is 0**: this is the clean image, taken for {clean}."
    if result.is_fooled:
        text = f"🔴 **Fooled** at {limit}: {clean} becomes {prediction(result.adversarial_logits)}."
    else:
        now = result.adversarial_logits.softmax(dim=0)[result.label].item()
        text = f"🟢 **Withstands** this attack at {limit}: still {clean}, now {now:.1%}."
    size = f"{255 * result.distance:.3g}/255" if norm == "linf" else f"{result.distance:.3g}"
    text += f" Perturbation: {size}."
    if (result.rounded_logits.argmax().item() != result.label) != result.is_fooled:
        text += (
            f" But rounded to 8 bits, as the picture shows it, it is taken for {prediction(result.rounded_logits)}."
        )
    return text


# --- One model's part of the page ---


# A classifier, and the components of gradio that show it.
Panel = namedtuple("Panel", "classifier verdict clean perturbation adversarial clean_classes adversarial_classes note")


def make_panel(classifier: Classifier, role: str) -> Panel:
    picture = {"format": "png", "height": 170, "interactive": False, "elem_classes": "pixels", "min_width": 100}
    with gr.Column(min_width=400):
        gr.Markdown(f"### {role}: {plain(classifier.name)}")
        verdict = gr.Markdown(min_height=64)
        with gr.Row():
            pictures = [gr.Image(label=label, buttons=[], **picture) for label in ("clean", "perturbation")]
            pictures.append(gr.Image(label="adversarial", buttons=["download"], **picture))
        with gr.Row():
            labels = ("clean: taken for", "under attack: taken for")
            classes = [gr.Label(label=label, elem_classes="classes", min_width=150) for label in labels]
        return Panel._make((classifier, verdict, *pictures, *classes, gr.Markdown()))


def show_clean(panel: Panel, pixels: torch.Tensor, logits: torch.Tensor) -> dict:
    """Pixels of shape `(channels, height, width)`, logits of shape `(classes,)`."""
    _, height, width = pixels.shape
    return {
        **dict.fromkeys(panel[1:]),
        panel.verdict: "Not attacked yet.",
        panel.clean: to_image(pixels),
        panel.clean_classes: top_classes(logits, panel.classifier.classes),
        panel.note: f"The model sees {width} x {height} pixels.",
    }


def show_result(panel: Panel, result: AttackResult) -> dict:
    """The perturbation is shown around grey, its largest entry black or white."""
    change = result.adversarial - result.pixels
    largest = change.abs().max().item() or 0.5
    shown = show_clean(panel, result.pixels, result.logits)
    shown[panel.note] += f" The perturbation is shown magnified ×{0.5 / largest:.3g}." if result.distance else ""
    return {
        **shown,
        panel.verdict: describe_result(result, panel.classifier.classes),
        panel.perturbation: to_image(0.5 + 0.5 * change / largest),
        panel.adversarial: to_image(result.adversarial),
        panel.adversarial_classes: top_classes(result.adversarial_logits, panel.classifier.classes),
    }


# --- The page ---


class Page:
    """The page for a robust model and, beside it, the `baseline` (model and processor), and what visitors do there.

    The models are put into evaluation mode and frozen. `examples` are images to try.

    Events are bound with `preprocess=False`: gradio would open an image before anybody looked at its size, and would
    answer a broken one with a message of its own. So methods get values as the browser sends them.
    """

    def __init__(
        self,
        robust: RobustModel,
        baseline: tuple[Any, Any] | None = None,
        examples: Sequence[str | Path] = (),
        *,
        names: Sequence[str] = ("the model", "the other model"),
        max_steps: int = 100,
    ):
        report = robust.report
        models = [(robust.model, robust.processor), *([baseline] if baseline is not None else [])]
        classifiers = [Classifier(name, *model) for name, model in zip(names, models, strict=False)]
        self.report, self.classifiers, self.max_steps = report, classifiers, max_steps
        num_values = classifiers[0].pixels(Image.new("RGB", (64, 64))).numel()
        self.scales = {norm: epsilon_scale(norm, report, num_values) for norm in NORMS}
        # Off the browser, nothing is asked of any other server: no statistics, no fonts.
        name, hour = classifiers[0].name, 3600
        with gr.Blocks(title=name, analytics_enabled=False, delete_cache=(hour, 24 * hour)) as self.blocks:
            threat = f"{NORM_NAMES[report.norm]} up to {format_epsilon(report.epsilons[-1])}"
            claimed = f"Expected robustness **{report.claimed_expected_robustness:.1%}**, {threat}."
            gr.Markdown(f"# How robust is {plain(name)}?\n{claimed}")
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    self._make_controls(examples)
                with gr.Column(scale=3):
                    self.status = gr.HTML(INVITATION, padding=False)
                    with gr.Row():
                        roles = ("Robust model", "Compared with")
                        self.panels = [make_panel(*pair) for pair in zip(classifiers, roles, strict=False)]
                    gr.Markdown(LIMITS)
            # Open if its trust checks failed or were not run.
            with gr.Accordion("The report", open=report.flags != {}), gr.Row():
                gr.Markdown(describe_robustness(report))
                gr.Image(picture_of(report), show_label=False, buttons=[], interactive=False)
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
            self.cancel_button = gr.Button("Cancel", variant="stop", min_width=100)
        self.steps = gr.Slider(1, max(self.max_steps, 2), value=self.max_steps, step=1, label="Steps of the attack")

    def _bind(self) -> None:
        shown = [self.status, *itertools.chain.from_iterable(panel[1:] for panel in self.panels)]
        chosen = [self.image, self.label, self.norm, self.epsilon, self.steps]
        raw: Any = {"preprocess": False, "api_visibility": "private", "show_progress": "hidden"}

        self.attack_button.click(None, None, self.status, js=SAY_WAITING, **raw)
        # One attack at a time, of all visitors together; the others wait in the queue.
        attack = self.attack_button.click(self.attack, chosen, shown, concurrency_limit=1, **raw)
        # Whatever ends the attack. gradio closes the generator of a cancelled one, and that ends the work.
        attack.then(None, self.status, self.status, js=SAY_IF_CANCELLED, **raw)
        self.cancel_button.click(None, cancels=attack)
        self.image.change(self.choose_image, self.image, shown, cancels=attack, **raw)
        self.norm.change(self.choose_norm, self.norm, [self.epsilon, self.threat], **raw)
        self.epsilon.change(self.choose_epsilon, [self.norm, self.epsilon], self.threat, **raw)

    def _slider(self, norm: str) -> dict[str, Any]:
        scale = self.scales[norm]
        start = self.report.epsilons[-1] if norm == self.report.norm else scale.step * (scale.count // 2)
        maximum, step, value = (scale.position(place) for place in (scale.step * scale.count, scale.step, start))
        label = "Epsilon, in 1/255" if norm == "linf" else "Epsilon"
        return {"minimum": 0, "maximum": maximum, "step": step, "value": value, "label": label}

    # --- Events ---

    def choose_norm(self, norm: str) -> dict:
        slider = self._slider(norm)
        return {self.epsilon: gr.Slider(**slider), self.threat: self.choose_epsilon(norm, slider["value"])}

    def choose_epsilon(self, norm: str, position: float) -> str:
        return describe_threat(self.report, norm, self.scales[norm].epsilon(position))

    def choose_image(self, image: dict | None) -> dict:
        """Show what the models say of it without any attack."""
        shown = {component: None for panel in self.panels for component in panel[1:]}
        if image is None:
            return {**shown, self.status: INVITATION}
        try:
            picture = read_image(image["path"])
            for panel in self.panels:
                pixels = panel.classifier.pixels(picture)
                shown |= show_clean(panel, pixels[0], panel.classifier.logits(pixels))
        except ValueError as error:
            return {**shown, self.status: status_line(str(error), "error")}
        return {**shown, self.status: status_line("Press Attack.")}

    def attack(
        self, image: dict | None, label: int, norm: str, position: float, steps: float
    ) -> Iterator[dict[Any, Any]]:
        """Attack the models one after the other; yields what to show meanwhile, and last the results."""
        if image is None:
            yield {self.status: status_line("Give an image first.", "error")}
            return
        steps, begin = min(max(int(steps), 1), self.max_steps), time.monotonic()
        try:
            picture = read_image(image["path"])
            threat_model = ThreatModel(norm, self.scales[norm].epsilon(position))
            numbers = self._numbers(label)

            def work(tick: Callable[[], None]) -> list[AttackResult]:
                return [
                    attack_image(classifier, picture, number, threat_model, steps, tick)
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
                    shown = {self.status: status_line(f"Done in {time.monotonic() - begin:.1f} seconds.")}
                    for panel, result, number in zip(self.panels, results, numbers, strict=True):
                        shown |= show_result(panel, result)
                        if number is None and label != PREDICTED:
                            name = plain(self.classifiers[0].classes[label])
                            shown[panel.note] += f" It has no class *{name}*: attacked was its own prediction."
                    yield shown
        except ValueError as error:
            yield {self.status: status_line(str(error), "error")}
        except Exception:  # out of memory, for example
            traceback.print_exc()
            yield {self.status: status_line("The attack failed; the log of the app says why.", "error")}

    def _numbers(self, label: int) -> list[int | None]:
        """The number of the chosen class in each model; None where it has no such class, or none was chosen."""
        name = None if label == PREDICTED else self.classifiers[0].classes[label]
        return [one.classes.index(name) if name in one.classes else None for one in self.classifiers]


def picture_of(report: RobustnessReport) -> Image.Image:
    with tempfile.TemporaryDirectory() as folder:
        report.plot(Path(folder, "curve.png"))
        with Image.open(Path(folder, "curve.png")) as picture:
            return picture.copy()
