import logging
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from conftest import make_adapted, make_model
from peft import LoraConfig, get_peft_model

from hf_rft.data.augmentation import SeededAugmentation
from hf_rft.data.labels import class_numbers
from hf_rft.models.adapters import add_lora
from hf_rft.models.classifier import check_batch, check_labels
from hf_rft.training.checks import check_dataset, check_parallelism


def rows(*labels, column="label"):
    return datasets.Dataset.from_dict({column: list(labels)})


def test_good_datasets_pass():
    check_dataset("train_dataset", None, 3)
    check_dataset("train_dataset", rows(0, 1, 2), 3)
    check_dataset("train_dataset", rows(0, 1, 2).with_transform(lambda batch: {"other": batch["label"]}), 3)
    check_dataset("train_dataset", (item for item in []), 3)  # no length to look at


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (rows(), "`train_dataset` is empty"),
        (rows(0, 3), r"`train_dataset` holds labels from 0 to 3, but the model has 3 classes \(0 to 2\)"),
        (rows(-1, 2, column="labels"), "labels down to -1; negative ones mark unlabelled examples, leave them out"),
        (rows(0, 7).with_transform(lambda batch: batch), "load it with `num_labels=8`"),
        (SeededAugmentation(rows(0, 3), lambda example: example, seed=0), "labels from 0 to 3"),
        ({"a": rows(0), "b": rows(5)}, r"`train_dataset\['b'\]` holds labels from 5 to 5"),
    ],
)
def test_bad_datasets_are_refused(dataset, message):
    with pytest.raises(ValueError, match=message):
        check_dataset("train_dataset", dataset, 3)


# --- Classes of the data and of the model ---


def named(*names):
    return SimpleNamespace(id2label=dict(enumerate(names)))


CLOTHES = named("T-shirt", "trouser", "pullover", "dress")


@pytest.mark.parametrize(
    ("class_names", "config", "expected"),
    [
        (["T-shirt", "trouser", "pullover", "dress"], CLOTHES, [0, 1, 2, 3]),
        (["T-shirt", "trouser"], CLOTHES, [0, 1]),
        (["dress", "T-shirt", "pullover"], CLOTHES, [3, 0, 2]),
        (["cat", "dog"], named("LABEL_0", "LABEL_1", "LABEL_2"), [0, 1]),
        (["cat", "dog"], SimpleNamespace(id2label=None), [0, 1]),
        (["cat", "dog"], None, [0, 1]),
        # As in ImageNet: the second crane goes by different names, and the model calls both the same.
        (
            ["tench", "crane", "goldfish", "jay", "crane2"],
            named("tench", "crane", "goldfish", "jay", "crane"),
            [*range(5)],
        ),
    ],
)
def test_numbers_that_the_model_gives_to_the_classes_of_the_data(class_names, config, expected):
    assert class_numbers("`dataset`", class_names, config) == expected


@pytest.mark.parametrize(
    ("class_names", "config", "message"),
    [
        (
            ["cat", "dog", "owl"],
            CLOTHES,
            r"The model has no classes \['cat', 'dog', 'owl'\]; its classes are \['T-shirt'",
        ),
        (["T-shirt", "dog"], CLOTHES, r"The model has no classes \['dog'\]"),  # one of two is no majority
        (["trouser", "T-shirt", "dress", "owl"], CLOTHES, r"The model has no classes \['owl'\]"),  # and which number?
        (["crane", "jay"], named("crane", "jay", "crane"), r"Several classes of the model have the names \['crane'\]"),
    ],
)
def test_classes_that_are_not_the_models_are_refused(class_names, config, message):
    with pytest.raises(ValueError, match=message) as raised:
        class_numbers("`dataset`", class_names, config)
    remedy = "Give images of its classes (`dataset`), rename the data's classes, or, if their numbers are the model's"
    assert remedy in str(raised.value) and "cast the label column to `datasets.Value('int64')`." in str(raised.value)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"labels": torch.tensor([0])}, r"has no \['pixel_values'\], its keys are \['labels'\]"),
        ({"pixel_values": torch.zeros(1, 3, 2, 2)}, r"has no \['labels'\]"),
        (
            {"pixel_values": torch.zeros(1, 3, 2, 2), "labels": torch.tensor([0]), "mask": torch.zeros(1)},
            r"further tensors \['mask'\]; only `pixel_values` can be attacked",
        ),
        ({"pixel_values": torch.zeros(1, 3, 2, 2), "labels": torch.tensor([3])}, "A batch holds labels from 3 to 3"),
    ],
)
def test_bad_batches_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        check_batch(inputs, 3)


@pytest.mark.parametrize("labels", [torch.zeros(1, 3), torch.zeros(1), torch.zeros(1, 1, dtype=torch.long)])
def test_other_kinds_of_labels_are_refused(labels):
    with pytest.raises(ValueError, match="one class index per image, got torch.*regression and several labels"):
        check_batch({"pixel_values": torch.zeros(1, 3, 2, 2), "labels": labels}, 3)


def test_labels_that_a_transform_makes_are_left_to_it():
    check_dataset("train_dataset", rows("cat", "dog").with_transform(lambda batch: batch), 2)


def test_check_labels_accepts_the_whole_range():
    check_labels("Here", torch.tensor([0, 1, 2]), 3)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """What the plugin sets is set back."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")


def with_processes(
    *,
    fsdp=None,
    zero_stage=None,
    tp_size=1,
    family="vit",
    is_adapted=False,
    dataset=None,
    accelerator_config=None,
    **args,
):
    """What the check looks at of a trainer."""
    if fsdp is not None:
        fsdp = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", **fsdp})
    state = SimpleNamespace(fsdp_plugin=fsdp, deepspeed_plugin=SimpleNamespace(zero_stage=zero_stage))
    config = {"even_batches": True, "dispatch_batches": None, **(accelerator_config or {})}
    return SimpleNamespace(
        args=SimpleNamespace(
            **{
                "n_gpu": 1,
                "world_size": 2,
                "torch_compile": False,
                "weight_averaging": None,
                "awp_gamma": None,
                "head_warmup_steps": 0,
                **args,
            },
            accelerator_config=SimpleNamespace(**config),
        ),
        accelerator=SimpleNamespace(state=state, parallelism_config=SimpleNamespace(tp_size=tp_size)),
        is_fsdp_enabled=fsdp is not None,
        is_deepspeed_enabled=zero_stage is not None,
        model=make_adapted(family) if is_adapted else make_model(family),
        train_dataset=dataset,
    )


@pytest.mark.parametrize("options", [{}, {"fsdp": {}}, {"zero_stage": 1}, {"zero_stage": 2}])
def test_supported_parallelism_passes(options, caplog):
    check_parallelism(with_processes(**options))
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_gpu": 2, "world_size": 1}, "2 GPUs in one process .* start one process per GPU with `accelerate launch`"),
        ({"accelerator_config": {"even_batches": False}}, "`even_batches=False` lets some .*; leave it True"),
        ({"tp_size": 2}, r"share one batch \(\{'tp_size': 2\}\) are not supported.* Use data parallelism only"),
        ({"zero_stage": 3}, "`zero_stage: 3` is not supported.* Set `zero_stage: 2`, or use FSDP2"),
        ({"fsdp": {"fsdp_version": 1}}, "`fsdp_version: 1` flattens the weights.* set it to 2"),
        ({"fsdp": {"state_dict_type": "SHARDED_STATE_DICT"}}, "saves no model .* set it to FULL_STATE_DICT"),
        ({"fsdp": {"cpu_ram_efficient_loading": True}}, "`fsdp_cpu_ram_efficient_loading: true` .* set it to false"),
        ({"fsdp": {"cpu_offload": True}}, "`fsdp_offload_params: true` .* set it to false"),
        ({"fsdp": {}, "torch_compile": True}, "`torch_compile=True` is untested .* set it to False"),
        ({"fsdp": {}, "weight_averaging": "ema"}, "`weight_averaging='ema'` needs whole weights .* or use DDP"),
        ({"fsdp": {}, "head_warmup_steps": 0.1}, "`head_warmup_steps=0.1` needs whole weights"),
        ({"zero_stage": 2, "awp_gamma": 0.01}, "`awp_gamma=0.01` needs whole weights on each process"),
        ({"zero_stage": 1, "weight_averaging": "ema"}, "`weight_averaging='ema'` needs whole weights"),
        ({"fsdp": {}, "is_adapted": True}, r"FSDP: adapters \(peft\) are untested with sharded weights; use DDP"),
        ({"fsdp": {}, "family": "convnext"}, "cannot shard a ConvNextForImageClassification.* use DDP"),
    ],
)
def test_parallelism_that_would_go_wrong_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_parallelism(with_processes(**options))


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])


def test_parts_of_unknown_length_are_warned_about(caplog):
    check_parallelism(with_processes(dataset=Stream()))
    assert not caplog.records
    check_parallelism(with_processes(dataset=Stream(), accelerator_config={"dispatch_batches": False}))
    assert "leave `dispatch_batches` out" in caplog.text


def test_adapters_that_would_not_be_saved_whole_are_refused(make_trainer):
    model = make_model("vit")
    model._hf_peft_config_loaded = True  # as after `add_adapter`, for which the newest peft is too old
    with pytest.raises(
        ValueError, match="adapters of `add_adapter`, which are saved without the head; call `peft.get_"
    ):
        make_trainer(model)
    with pytest.raises(
        ValueError, match="`freeze_batch_norm=False` changes .* not saved with an adapter; leave it True"
    ):
        make_trainer(make_adapted("timm"), freeze_batch_norm=False)
    make_trainer(make_adapted("vit"), freeze_batch_norm=False)  # has no BatchNorm


@pytest.mark.parametrize("base_model", ["/home/somebody/model", None])
def test_an_adapter_of_a_model_that_is_not_on_the_hub_is_not_pushed(make_trainer, hub, base_model):
    model = add_lora(make_model("vit"), r=2)
    model.peft_config["default"].base_model_name_or_path = base_model
    with pytest.raises(
        ValueError, match=f"would publish an adapter of the base model {base_model!r}, which is not on"
    ):
        make_trainer(model, push_to_hub=True)


def test_a_head_that_would_be_lost_is_named(make_trainer, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("hf_rft"), "propagate", True)
    make_trainer(make_adapted("vit"))
    assert "head" not in caplog.text
    make_trainer(get_peft_model(make_model("vit"), LoraConfig(target_modules=["q_proj"])))
    assert "The classification head of `model` is frozen, and not saved" in caplog.text


def test_an_adapter_of_another_name_is_refused(make_trainer):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}
    model = get_peft_model(make_model("vit"), LoraConfig(**options), adapter_name="robust")
    with pytest.raises(ValueError, match=r"active adapters \['robust'\], .*leave `adapter_name`"):
        make_trainer(model)
