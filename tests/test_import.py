import subprocess
import sys

import pytest


@pytest.mark.parametrize("statement", ["import hf_rft", "from hf_rft import RobustTrainer, evaluate_robustness"])
def test_slow_packages_are_imported_when_used(statement):
    """Beyond what `Trainer` itself imports: `import hf_rft` shall hardly take longer."""
    slow = ("timm", "evaluate", "matplotlib", "scipy.stats")
    command = f"import sys; {statement}; print(*(name for name in {slow} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", command], check=True, capture_output=True, text=True)
    assert result.stdout.split() == []
