"""Every configuration of accelerate that comes with the package, as accelerate itself reads it."""

from types import SimpleNamespace

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import make_model

from hf_rft.cli import recipes
from hf_rft.training.checks import check_parallelism


FOLDER = recipes.FOLDER / "accelerate_configs"
PROCESSES = {  # of what kind, and how many
    "single_gpu": ("NO", 1),
    "multi_gpu": ("MULTI_GPU", 8),
    "fsdp": ("FSDP", 8),
    "deepspeed_zero2": ("DEEPSPEED", 8),
    "multi_node": ("MULTI_GPU", 32),
}


def test_every_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(PROCESSES)


@pytest.mark.parametrize("name", PROCESSES)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # refuses unknown keys
    assert (config.distributed_type, config.num_processes) == PROCESSES[name]
    assert not config.use_cpu
    assert config.mixed_precision in (None, "no")  # the recipe's own argument decides
    assert config.num_machines == (4 if name == "multi_node" else 1)
    header = (FOLDER / f"{name}.yaml").read_text().split("\n\n")[0]
    assert f"hf-rft train --accelerate_config {name}" in header
    assert f"`{name}.yaml`" in (FOLDER / "README.md").read_text()


def test_divided_weights_are_set_up_so_that_they_are_supported(monkeypatch):
    config = load_config_from_file(str(FOLDER / "fsdp.yaml")).fsdp_config
    assert config  # as `accelerate launch` hands it on
    for name, value in config.items():
        monkeypatch.setenv(name.upper(), str(value).lower() if isinstance(value, bool) else str(value))
    fsdp = FullyShardedDataParallelPlugin()
    assert fsdp.fsdp_version == 2 and fsdp.reshard_after_forward is True
    check_parallelism(trainer(fsdp_plugin=fsdp))


def test_deepspeed_divides_what_may_be_divided():
    config = load_config_from_file(str(FOLDER / "deepspeed_zero2.yaml")).deepspeed_config
    check_parallelism(trainer(deepspeed_plugin=SimpleNamespace(zero_stage=config["zero_stage"])))
    # The trainer's own arguments decide.
    assert config["gradient_clipping"] == config["gradient_accumulation_steps"] == "auto"


def trainer(*, fsdp_plugin=None, deepspeed_plugin=None):
    """What the check looks at of a trainer."""
    config = SimpleNamespace(even_batches=True, dispatch_batches=None)
    methods = {"weight_averaging": None, "awp_gamma": None, "head_warmup_steps": 0}
    return SimpleNamespace(
        args=SimpleNamespace(n_gpu=1, world_size=8, torch_compile=False, accelerator_config=config, **methods),
        accelerator=SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=fsdp_plugin, deepspeed_plugin=deepspeed_plugin), parallelism_config=None
        ),
        is_fsdp_enabled=fsdp_plugin is not None,
        is_deepspeed_enabled=deepspeed_plugin is not None,
        model=make_model("vit"),
        train_dataset=None,
    )
