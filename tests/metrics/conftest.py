import evaluate
import pytest


@pytest.fixture(scope="session", autouse=True)
def caches_of_evaluate(tmp_path_factory):
    """`evaluate.load` copies scripts to one folder and examples to another: both are new here, not the user's own.

    One pair for all tests of a process: Python imports the copies as one package, which has one folder.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path_factory.mktemp("metrics"))
        yield
