"""Folding BatchNorm into the weights of the preceding convolution while a model is attacked.

In evaluation mode, BatchNorm scales and shifts each channel by fixed numbers, which the convolution in front of it can
do for free. A training attack passes through the model many times with the same weights, so folding them once saves
every BatchNorm.
"""

import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Graph, Tracer
from torch.nn.utils.fusion import fuse_conv_bn_weights
from transformers import PreTrainedModel

from .classifier import blank_image, in_mode, logits_of


class FoldablePair(NamedTuple):
    """A convolution whose output goes only into a BatchNorm."""

    convolution: nn.Conv2d
    batch_norm: nn.BatchNorm2d


FoldedWeights = dict[FoldablePair, tuple[nn.Parameter, nn.Parameter]]  # weight and bias of the convolution


def find_foldable_pairs(model: nn.Module) -> list[FoldablePair]:
    """The pairs in a model that can be folded, in evaluation mode, without changing its outputs beyond rounding.

    `torch.fx` traces the model or, if that fails, the parts of it that can be traced.

    Returns:
        `list[FoldablePair]`: empty if nothing could be traced, or if parameters are narrower than float32, where
        folded weights would be rounded once more.
    """
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    with in_mode(model, training=False):
        pairs = _pairs_within(model)
    return [pair for pair in pairs if all(names[id(one)] == 1 for one in pair)]


def folded_weights(pairs: Sequence[FoldablePair]) -> FoldedWeights:
    """What the convolutions need in order to do the work of their BatchNorms, from the present weights.

    A pair is skipped if either `forward` has been replaced since the pair was found.
    """
    return {pair: _folded_weights(*pair) for pair in pairs if not any(_has_own_forward(one) for one in pair)}


@contextlib.contextmanager
def folded(weights: FoldedWeights) -> Iterator[None]:
    """Let convolutions do the work of their BatchNorms, which must be in evaluation mode.

    Folded weights pass no gradient to the model's own. Afterwards, all modules are restored.
    """
    own = [(convolution, convolution.weight, convolution.bias) for convolution, _ in weights]
    try:
        for (convolution, batch_norm), (weight, bias) in weights.items():
            rest = _after_batch_norm(batch_norm)
            assert rest is not None and not batch_norm.training, "see `find_foldable_pairs`"
            convolution.weight, convolution.bias = weight, bias
            vars(batch_norm)["forward"] = rest  # shadows the method of the class
        yield
    finally:
        for (convolution, weight, bias), (_, batch_norm) in zip(own, weights, strict=True):
            convolution.weight, convolution.bias = weight, bias
            vars(batch_norm).pop("forward", None)


def exactly_foldable_pairs(model: PreTrainedModel) -> list[FoldablePair]:
    """[`find_foldable_pairs`] of an image classifier, or none unless [`folding_is_exact`] on a noise image."""
    pairs = find_foldable_pairs(model)
    if not pairs:
        return []
    blank = blank_image(model)
    noise = torch.rand(blank.shape, generator=torch.Generator().manual_seed(0)).to(blank)
    try:
        return pairs if folding_is_exact(model, pairs, noise) else []
    except (RuntimeError, ValueError):  # the model does not take images of this size
        return []


@torch.no_grad()
def folding_is_exact(model: nn.Module, pairs: Sequence[FoldablePair], images: torch.Tensor) -> bool:
    """Whether folding leaves the logits of `images` unchanged up to rounding, in evaluation mode.

    A model traced in parts might use the output of a convolution in a way that no single part shows.
    """
    with in_mode(model, training=False):
        expected = logits_of(model(pixel_values=images))
        with folded(folded_weights(pairs)):
            found = logits_of(model(pixel_values=images))
    return bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())


class _Tracer(Tracer):
    """Descends to modules without children and stops there: some of those compute a padding from the image size."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.BatchNorm2d) or not any(True for _ in m.children())


def _pairs_within(module: nn.Module) -> list[FoldablePair]:
    if not any(isinstance(one, nn.BatchNorm2d) for one in module.modules()):
        return []
    try:
        graph = _Tracer().trace(module)
    except Exception:  # anything: this runs the module's own code on placeholders instead of tensors
        return [pair for child in module.children() for pair in _pairs_within(child)]
    return _pairs_of_graph(graph, dict(module.named_modules()))


def _pairs_of_graph(graph: Graph, modules: dict[str, nn.Module]) -> list[FoldablePair]:
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    pairs = []
    for node in graph.nodes:
        users = list(node.users)
        if node.op != "call_module" or [user.op for user in users] != ["call_module"]:
            continue
        names = (str(node.target), str(users[0].target))
        if any(calls[name] != 1 or name in read for name in names):
            continue
        convolution, batch_norm = (modules[name] for name in names)
        if _can_fold(convolution, batch_norm):
            pairs.append(FoldablePair(convolution, batch_norm))
    return pairs


def _can_fold(convolution: Any, batch_norm: Any) -> bool:
    return (
        # Exact types only: other subclasses may normalise their weights, which would undo the folding.
        type(convolution) in (nn.Conv2d, _timm_layer("Conv2dSame"))
        and _after_batch_norm(batch_norm) is not None
        and batch_norm.running_mean is not None
        and torch.promote_types(convolution.weight.dtype, torch.float32) == convolution.weight.dtype
        # Hooks would see other values.
        and not any(one._forward_hooks or one._forward_pre_hooks for one in (convolution, batch_norm))
        and not any(_has_own_forward(one) for one in (convolution, batch_norm))
    )


def _has_own_forward(module: nn.Module) -> bool:
    """Whether this instance's `forward` was replaced, as accelerate's hooks do."""
    return "forward" in vars(module)


def _timm_layer(name: str) -> type | None:
    """A timm layer, without importing timm: a model that has such a layer has already imported it."""
    return getattr(sys.modules.get("timm.layers"), name, None)


def _after_batch_norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What a module computes after its batch normalisation; None if unknown."""
    if type(module) is nn.BatchNorm2d:
        return lambda images: images
    if type(module) is _timm_layer("BatchNormAct2d"):
        return lambda images: module.act(module.drop(images))
    return None


@torch.no_grad()
def _folded_weights(convolution: nn.Conv2d, batch_norm: nn.BatchNorm2d) -> tuple[nn.Parameter, nn.Parameter]:
    statistics = (batch_norm.running_mean, batch_norm.running_var, batch_norm.eps)
    weight, bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, *statistics, batch_norm.weight, batch_norm.bias
    )
    return nn.Parameter(weight, False), nn.Parameter(bias, False)
