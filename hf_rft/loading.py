"""Models and datasets by name: what the libraries say when that fails, with the argument that caused it."""

import contextlib
import textwrap
from collections.abc import Iterator
from typing import Any

from transformers import AutoImageProcessor, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from .untrusted import load_classifier, load_config


@contextlib.contextmanager
def naming(argument: str, value: Any, remedy: str) -> Iterator[None]:
    """Turn whatever is raised inside, where only `value` can be the cause, into a `ValueError` that names it.

    Meant for single calls of a library that loads something: these raise anything, down to the parser of the file.
    """
    try:
        yield
    except Exception as error:
        reason, cause = f"{type(error).__name__}: {error}", error.__cause__
        while cause is not None:  # `datasets` says only there what was wrong
            reason, cause = f"{reason} Cause: {type(cause).__name__}: {cause}", cause.__cause__
        reason = textwrap.shorten(reason, 500, placeholder=" ...")
        raise ValueError(f"{argument} {value!r} cannot be loaded; {remedy}. ({reason})") from error


def load_model_and_processor(
    argument: str, name_or_path: str, **hub_options
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A classifier as it is, and its image processor.

    Args:
        argument (`str`):
            Who names the model, for the messages.
        name_or_path (`str`):
            Repository on the Hub or local folder.
        hub_options:
            Of `from_pretrained`.

    Raises:
        ValueError: if it cannot be loaded, or some of its weights would be random.
    """
    with naming(argument, name_or_path, "give a Hub id or a folder with an image classifier and its processor"):
        config = load_config(name_or_path, **hub_options)
        processor = AutoImageProcessor.from_pretrained(name_or_path, **{"trust_remote_code": False, **hub_options})
        model, found = load_classifier(name_or_path, config, output_loading_info=True, **hub_options)
    parameters = {name for name, _ in model.named_parameters()}
    random = sorted({str(key) for key in found["missing_keys"]} & parameters)
    if random:
        raise ValueError(
            f"{argument} {name_or_path!r} holds no weights {random[:5]}, which would be random numbers; give a model "
            "that was trained as an image classifier."
        )
    return model, processor
