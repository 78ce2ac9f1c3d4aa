"""What the benchmarks read off a piece of work: seconds, peak memory, passes through the model, operations.

Each instrument is a context manager `(device, reading)` that puts what it found into the dictionary `reading`.
"""

import contextlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from hf_rft.models.classifier import CountedForward


Reading = dict[str, Any]

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def nothing(device: torch.device, reading: Reading) -> Iterator[None]:
    """For steps that only warm up."""
    yield


@contextlib.contextmanager
def seconds(device: torch.device, reading: Reading) -> Iterator[None]:
    """Of the clock, and of the processor: the second does not run while other work has the core."""
    synchronize(device)
    start, start_of_cpu = time.perf_counter(), time.process_time()
    yield
    synchronize(device)
    reading["seconds"], reading["cpu_seconds"] = time.perf_counter() - start, time.process_time() - start_of_cpu


@contextlib.contextmanager
def peak_memory(device: torch.device, reading: Reading) -> Iterator[None]:
    """Bytes allocated above what was allocated at the start, where that was most.

    On GPU torch's allocator keeps this number. On CPU the profiler notes each allocation and each release of torch's
    allocator: their running sum is the same number, whatever malloc keeps for itself. It does not see the release of
    what was allocated before the start, nor what libraries allocate by themselves (scratch memory of oneDNN).
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield
        reading["peak_bytes"] = torch.cuda.max_memory_allocated(device) - before
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    reading["peak_bytes"] = max(accumulate(event.nbytes() for event in events), default=0)


def _conv_backward_flops(grad_out, x, w, _bias, _stride, _padding, _dilation, transposed, *rest, out_shape=None, **_):
    """Each of the two gradients costs what the forward pass costs.

    torch's own formula takes the weight gradient of a grouped convolution for that of a dense one: of a depthwise one
    with c channels, c times too much.
    """
    output_mask = rest[-1]
    return (output_mask[0] + output_mask[1]) * conv_flop_count(x, w, grad_out, transposed=transposed)


FORMULAS: Any = {torch.ops.aten.convolution_backward: _conv_backward_flops}


class _OneSum(contextlib.nullcontext):
    """In place of the tracker by which `FlopCounterMode` keeps a sum for each module: its hooks on their inputs do not
    work where `torch.autograd.grad` differentiates with respect to one."""

    parents = ("Global",)


@contextlib.contextmanager
def work(device: torch.device, reading: Reading, *, num_labels: int) -> Iterator[None]:
    """Images that passed through a model forward and backward, and floating-point operations.

    A pass is one through the classifier, the linear layer with `num_labels` outputs: copies of the model that an
    attack may use are counted as well. Operations are those of matrix products and convolutions, two for a
    multiplication with its addition, counted by torch's `FlopCounterMode`.
    """
    counted = CountedForward(lambda logits: logits)

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.Linear) and module.out_features == num_labels:
            counted(output)

    handle = nn.modules.module.register_module_forward_hook(count)
    flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    flops.mod_tracker = _OneSum()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with flops:
            yield
    finally:
        handle.remove()
    reading["forward"], reading["backward"] = counted.passes
    reading["flops"] = flops.get_total_flops()


@contextlib.contextmanager
def profile(device: torch.device, reading: Reading) -> Iterator[None]:
    """The operations that took longest, on the device itself."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        yield
        synchronize(device)
    reading["profile"] = profiler.key_averages().table(
        sort_by=f"self_{device.type}_time_total", row_limit=15, max_name_column_width=60
    )


class Roofs(NamedTuple):
    """What a machine can do at the most."""

    flops: float  # a second, in a matrix product
    bandwidth: float  # bytes a second, read and written


aten = torch.ops.aten
_NOTHING_MOVES = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten._unsafe_view}
_OVERWRITE = {aten.copy_, aten.fill_, aten.zero_}


class _Operations(TorchDispatchMode):
    """Floating-point operations of each tensor operation, and the bytes of all tensors it reads and writes."""

    def __init__(self):
        super().__init__()
        self.counts: list[tuple[float, int]] = []
        self._formulas = FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        operation = func.overloadpacket
        if func.is_view or operation in _NOTHING_MOVES:
            return output
        formula = self._formulas.get(operation)
        flops = formula(*args, **kwargs, out_val=output) if formula else 0
        read = args[1:] if operation in _OVERWRITE else args
        if operation is aten.convolution_backward and not args[-1][1]:
            read = (args[0], args[2])  # without the gradient of the weights, the images are not needed
        tensors = [one for one in tree_leaves((read, kwargs, output)) if torch.is_tensor(one)]
        self.counts.append((flops, sum(one.numel() * one.element_size() for one in tensors)))
        return output


@contextlib.contextmanager
def roofline(device: torch.device, reading: Reading, *, roofs: Roofs) -> Iterator[None]:
    """Seconds that the tensor operations would take if each computed, or moved its tensors, as fast as `roofs` allow.

    An operation has the longer of the two times (Williams et al. 2009, "Roofline"). This is an estimate, not a strict
    bound: tensors that stay in a nearer cache move faster than a copy, and a compiler can spare moves altogether.
    """
    with _Operations() as operations:
        yield
    seconds = [(flops / roofs.flops, moved / roofs.bandwidth) for flops, moved in operations.counts]
    reading["roofline_seconds"] = sum(max(pair) for pair in seconds)
    reading["moving_seconds"] = sum(moving for computing, moving in seconds if moving > computing)


def measure_roofs(device: torch.device, dtype: torch.dtype) -> Roofs:
    return Roofs(matmul_peak(device, dtype), copy_bandwidth(device))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second (on CPU: a second of a core) while a tensor is copied: on CPU one of 4 MB, about
    what an activation has there, on GPU one of 1 GB."""
    source = torch.ones(2**28 if device.type == "cuda" else 2**20, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / _least_seconds(device, lambda: target.copy_(source))


def clock(device: torch.device) -> str:
    """Which of the two times tells how busy the device was: on CPU that of the cores, which other work may share."""
    return "seconds" if device.type == "cuda" else "cpu_seconds"


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second (on CPU: a second of a core) of a matrix product: what the machine can do at the most."""
    size = 8192 if device.type == "cuda" else 768
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _least_seconds(device, lambda: a @ b)


def _least_seconds(device: torch.device, function: Callable[[], Any]) -> float:
    times = []
    for _ in range(50):
        reading: Reading = {}
        with seconds(device, reading):
            function()
        times.append(reading[clock(device)])
    return min(times)


def median_and_range(values: list[float], digits: int = 3) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Of what stays between two steps: parameters, buffers and the optimizer's state."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def machine(device: torch.device) -> dict[str, Any]:
    """What a time depends on, apart from the program."""
    import timm
    import transformers

    processor = platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    commit = None
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return {
        "processor": processor,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "timm": timm.__version__,
        "commit": commit,
    }
