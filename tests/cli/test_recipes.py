import pytest

from hf_rft.cli.recipes import FOLDER, find_file, find_recipes, names_of


HINGE = "fashion_mnist/efficientnet_lite0_hinge"


def test_names_lead_to_files():
    assert HINGE in names_of() and "multi_gpu" in names_of("accelerate_configs")
    assert not any(name.startswith("accelerate_configs") for name in names_of())
    for name in names_of():
        assert find_file("--config", name) == find_file("--config", f"{name}.yaml") == FOLDER / f"{name}.yaml"
    assert find_file("--accelerate_config", "fsdp", "accelerate_configs").name == "fsdp.yaml"


def test_a_file_of_the_users_comes_before_one_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / f"{HINGE}.yaml"
    own.parent.mkdir()
    own.write_text("seed: 1")
    assert find_file("--config", f"{HINGE}.yaml").resolve() == own
    assert [path.resolve() for path in find_recipes("configs:", "fashion_mnist")] == [own]


def test_a_folder_stands_for_its_recipes():
    assert [path.stem.rpartition("_")[2] for path in find_recipes("configs:", "fashion_mnist")] == [
        *("constant", "hinge", "linear", "standard")
    ]
    assert find_recipes("configs:", HINGE) == [FOLDER / f"{HINGE}.yaml"]


@pytest.mark.parametrize(
    "name, hint",
    [
        ("fashion_mnist/efficientnet_lite0_hnge", f"Did you mean {HINGE}?"),
        ("nothing", f"The package comes with {', '.join(names_of())}."),
    ],
)
def test_a_name_that_is_none_is_refused_with_those_there_are(name, hint):
    with pytest.raises(ValueError) as refused:
        find_file("--config", name)
    assert str(refused.value).startswith(f"--config {name} is neither a file nor the name of one. {hint}")
