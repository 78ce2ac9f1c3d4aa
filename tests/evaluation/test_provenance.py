import json
from importlib.metadata import version
from types import SimpleNamespace

import torch
from conftest import Images, make_model
from datasets import Dataset, DatasetInfo

from hf_rft.evaluation.provenance import describe_dataset, describe_model, versions


def test_versions():
    assert versions()["torch"] == version("torch")


def test_a_model_from_a_folder_is_called_by_the_folders_name_not_by_its_path(tmp_path):
    model = make_model("vit")
    model.config._name_or_path = str(tmp_path)
    assert describe_model(model)["name"] == tmp_path.name


def test_a_model_from_the_hub_keeps_its_name_and_commit():
    model = make_model("vit")
    model.config._name_or_path, model.config._commit_hash = "google/vit", "c0ffee"
    described = describe_model(model)
    assert (described["name"], described["revision"]) == ("google/vit", "c0ffee")
    assert len(described["sha256"]) == 64


def test_class_names_are_recorded_if_there_are_any():
    model = make_model("vit")
    assert describe_model(model)["class_names"] == {}
    model.config.id2label = {0: "cat", 1: "dog", 2: "fox", 3: "owl"}
    described = describe_model(model)
    assert described["class_names"] == {"0": "cat", "1": "dog", "2": "fox", "3": "owl"}
    assert json.loads(json.dumps(described)) == described


def test_a_model_without_a_configuration_is_called_by_its_class():
    assert describe_model(torch.nn.Linear(2, 2))["name"] == "Linear"


def test_a_dataset_from_the_hub_names_repository_and_revision():
    files = {"hf://datasets/ethz/food101@e06ac/data/train.parquet": {"num_bytes": 1}, "/local/file": {}}
    info = SimpleNamespace(dataset_name="food101", config_name="default", download_checksums=files)
    described = describe_dataset(SimpleNamespace(info=info, split="validation"))
    assert described == {
        "name": "ethz/food101",
        "revision": "e06ac",
        "config": "default",
        "split": "validation",
        "fingerprint": None,
    }


def test_other_datasets():
    assert describe_dataset(Images(2))["name"] is None
    kind = DatasetInfo(builder_name="imagefolder", dataset_name="imagefolder")
    assert describe_dataset(SimpleNamespace(info=kind))["name"] is None
    described = describe_dataset(Dataset.from_dict({"label": [0]}))
    assert described["revision"] is None
    assert described["fingerprint"]
