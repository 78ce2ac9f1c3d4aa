"""What protects the machine that makes the study's assets: its downloads are not trusted."""

import importlib.util
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest


def load_script():
    path = Path(__file__).parents[1] / "recipes" / "study" / "make_assets.py"
    spec = importlib.util.spec_from_file_location("make_assets", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_assets = load_script()


class Malicious:
    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("call", [(exec, ("raise SystemExit",)), (np.load, ("x.npy",))], ids=["builtin", "numpy"])
def test_a_pickle_that_calls_a_function_is_refused(call):
    data = pickle.dumps([np.arange(3), Malicious(call)])
    with pytest.raises(pickle.UnpicklingError, match="not an array"):
        make_assets.ArrayUnpickler(io.BytesIO(data)).load()


def test_an_array_as_old_numpy_wrote_it_is_read():
    data = pickle.dumps(np.arange(6).reshape(2, 3), protocol=4, fix_imports=False)
    assert data.count(b"\x16numpy._core.multiarray") == 1
    old = data.replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray")
    old = old[:2] + b"\x95" + (len(old) - 11).to_bytes(8, "little") + old[11:]  # the length of the rest
    assert make_assets.ArrayUnpickler(io.BytesIO(old)).load().tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_file_with_another_hash_is_refused_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "animal_mnist-0.4-py3-none-any.whl", "w") as wheel:
        wheel.writestr("animal_mnist/data/Animal_MNIST/animal_data_version_3.gz", b"other bytes")
    with pytest.raises(ValueError, match=r"animal_data_version_3\.gz of animal-mnist==0\.4 has sha256"):
        make_assets.read_file("silhouettes", tmp_path)
