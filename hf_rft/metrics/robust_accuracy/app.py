"""Gradio Space that computes robust accuracy from predictions typed in. It needs gradio, which a Space brings.

`evaluate.utils.launch_gradio_widget` does not serve: it wants every column filled, but `clean_predictions` may be
left out, and it calls `gradio.inputs`, which gradio 4 removed.
"""

import json
from pathlib import Path

import evaluate


FOLDER = Path(__file__).parent


def compute(predictions: str, references: str, clean_predictions: str) -> dict | None:
    """The metric's values for JSON lists of labels; empty text stands for clean predictions that are not known."""
    metric = evaluate.load(str(FOLDER / "robust_accuracy.py"), keep_in_memory=True)
    return metric.compute(
        predictions=parse_labels("predictions", predictions),
        references=parse_labels("references", references),
        clean_predictions=parse_labels("clean_predictions", clean_predictions) if clean_predictions.strip() else None,
    )


def parse_labels(name: str, text: str) -> list:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`{name}` must be a JSON list such as [0, 2, 1]; {error}.") from error


def build_interface():
    import gradio  # pyright: ignore[reportMissingImports]

    # The file next to this one: its folder comes first on the path when Python runs this one as a script.
    from tests import test_cases  # pyright: ignore[reportAttributeAccessIssue]

    return gradio.Interface(
        fn=compute,
        inputs=[
            gradio.Textbox(label="predictions", info="The predicted label of each adversarial example."),
            gradio.Textbox(label="references", info="The true label of each example."),
            gradio.Textbox(label="clean_predictions", info="Optional: the predicted label of each clean example."),
        ],
        outputs=gradio.JSON(label="results"),
        examples=[
            [
                json.dumps(case["predictions"]),
                json.dumps(case["references"]),
                json.dumps(case["clean_predictions"]) if "clean_predictions" in case else "",
            ]
            for case in test_cases
        ],
        title="Metric: robust accuracy",
        description="Share of examples that an attack with one perturbation budget does not fool.",
        # The metric card without its front matter.
        article=(FOLDER / "README.md").read_text(encoding="utf-8").split("---", 2)[2],
        flagging_mode="never",
    )


if __name__ == "__main__":
    build_interface().launch(show_error=True)
