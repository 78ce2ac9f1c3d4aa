"""Loading robust models with the evidence of their robustness, from the Hub or a folder."""

import os
from pathlib import Path
from typing import NamedTuple

from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..evaluation.report import RobustnessReport
from ..threat_model import ThreatModel, format_epsilon
from ..utils.values import SHARE
from .download import download
from .evidence import check_base, read_evidence
from .safe_loading import is_adapter, load_classifier, load_config


class RobustModel(NamedTuple):
    """A model with the evidence of its robustness."""

    model: PreTrainedModel
    processor: BaseImageProcessor
    report: RobustnessReport


def load_robust_model(
    repo_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    threat_model: ThreatModel | None = None,
    min_expected_robustness: float | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    merge: bool = False,
) -> RobustModel:
    """Load a robust model together with the evidence of its robustness, or refuse it.

    Args:
        repo_or_path (`str`):
            Repository on the Hub, or a local folder.
        revision (`str`, *optional*):
            Branch, tag or commit.
        threat_model ([`ThreatModel`], *optional*):
            The norm and the epsilon that the model must have been evaluated against.
        min_expected_robustness (`float`, *optional*):
            The least expected robustness, in [0, 1]: up to the epsilon of `threat_model` if it is given, otherwise up
            to the report's largest.
        token, cache_dir:
            As in `huggingface_hub`.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run code that comes with the model. Models saved by [`RobustTrainer`] have none.
        merge (`bool`, *optional*, defaults to `False`):
            Merge an adapter (of peft) into its base model: faster, and an ordinary transformers model. Its logits
            differ from those that were measured by rounding only.

    Returns:
        [`RobustModel`]: `(model, processor, report)`, with the model in evaluation mode.

    Raises:
        ValueError: if the evidence is missing, belongs to other weights or states no threat model, or if the model
            does not meet the requirements.
    """
    if not isinstance(repo_or_path, str | os.PathLike):
        raise ValueError(f"`repo_or_path={repo_or_path!r}` must be a folder or the name of a repository.")
    if threat_model is not None and not isinstance(threat_model, ThreatModel):
        raise ValueError(
            f"`threat_model={threat_model!r}` must be a ThreatModel, such as ThreatModel('linf', '8/255')."
        )
    if min_expected_robustness is not None and min_expected_robustness not in SHARE:
        raise ValueError(
            f"`min_expected_robustness={min_expected_robustness!r}` must lie in [0, 1]: it is a mean accuracy."
        )
    folder = download(repo_or_path, revision=revision, token=token, cache_dir=cache_dir, with_code=trust_remote_code)
    report = read_evidence(folder, name=str(repo_or_path), trust_remote_code=trust_remote_code)
    check_requirements(report, str(repo_or_path), threat_model, min_expected_robustness)
    hub_options = {"token": token, "cache_dir": cache_dir}
    if is_adapter(folder):
        check_base(folder, report, name=str(repo_or_path), **hub_options)
    config = load_config(folder, trust_remote_code=trust_remote_code)
    model = load_classifier(folder, config, trust_remote_code=trust_remote_code, **hub_options)
    if merge and is_adapter(folder):
        model = model.merge_and_unload()
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return RobustModel(model.eval(), processor, report)


def check_requirements(
    report: RobustnessReport, name: str, threat_model: ThreatModel | None, min_expected_robustness: float | None
) -> None:
    """Refuse a model whose report does not meet the requirements, naming them and what was measured."""
    if threat_model is not None:
        grid = [format_epsilon(epsilon) for epsilon in report.epsilons]
        required = format_epsilon(threat_model.epsilon)
        if report.norm != threat_model.norm or threat_model.epsilon not in report.epsilons[1:]:
            raise ValueError(
                f"{name} does not meet the required threat model {threat_model.norm} {required}: it was evaluated "
                f"against {report.norm} at {', '.join(grid)}. Evaluate it with `hf-rft evaluate`."
            )
        report = report.up_to(threat_model.epsilon)
    if min_expected_robustness is not None and report.claimed_expected_robustness < min_expected_robustness:
        raise ValueError(
            f"{name} has an expected robustness of {report.claimed_expected_robustness:.4f} ({report.norm} up to "
            f"{format_epsilon(report.epsilons[-1])}), below `min_expected_robustness={min_expected_robustness}`."
        )
