"""Gradio Space that computes expected robustness from predictions typed in. It needs gradio, which a Space brings.

`evaluate.utils.launch_gradio_widget` does not serve: it offers no field for `epsilons`, and it calls `gradio.inputs`,
which gradio 4 removed.
"""

import json
from pathlib import Path

import evaluate


FOLDER = Path(__file__).parent


def compute(predictions: str, references: str, epsilons: str) -> dict | None:
    """The metric's values for JSON lists of labels and comma-separated epsilons such as `0, 4/255, 8/255`."""
    metric = evaluate.load(str(FOLDER / "expected_robustness.py"), keep_in_memory=True)
    return metric.compute(
        predictions=parse_labels("predictions", predictions),
        references=parse_labels("references", references),
        epsilons=epsilons.split(","),
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
            gradio.Textbox(label="predictions", info="One list per example: its predicted label at each epsilon."),
            gradio.Textbox(label="references", info="The true label of each example."),
            gradio.Textbox(label="epsilons", info="Perturbation strengths, increasing from 0."),
        ],
        outputs=gradio.JSON(label="results"),
        examples=[
            [
                json.dumps(case["predictions"]),
                json.dumps(case["references"]),
                ", ".join(str(epsilon) for epsilon in case["epsilons"]),
            ]
            for case in test_cases
        ],
        title="Metric: expected robustness",
        description="Accuracy under attack, averaged over perturbation strengths from 0 to the largest one.",
        # The metric card without its front matter.
        article=(FOLDER / "README.md").read_text(encoding="utf-8").split("---", 2)[2],
        flagging_mode="never",
    )


if __name__ == "__main__":
    build_interface().launch(show_error=True)
