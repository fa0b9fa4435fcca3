"""MACs of one forward, and of one training step, counted from the operations that a network really performs.

One MAC is one multiplication and one addition; other counters' FLOPs are two per MAC. The network runs on torch's meta
device, where tensors have a shape and no values, so nothing is computed and any size costs a fraction of a second.
What counts:

- convolutions, transposed and grouped ones too: outputs x weights per output (for transposed ones inputs x weights
  per input);
- matrix products, so linear layers, and kernels that a network synthesises or mixes for itself;
- attention: both its products, whichever kernel torch picks; four products backward, without what fused kernels
  compute a second time;
- interpolation: per output the weights it is mixed with, 2 linear, 4 bilinear, 8 trilinear, 16 bicubic, none nearest.

Biases, normalisation, activations, pooling, softmax, sums, copies and random numbers count as no MACs, as is usual.
Anything else is listed as uncounted, and a count with such a list is a lower bound.

Beside the MACs stand the bytes that each operation reads and writes: its tensors once each, weights too, whether a
cache holds them or not. Those of operations that count as no MACs are kept under "everything else".
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dance_seg.batch_norm import local_batch_norm


@dataclass(frozen=True)
class Cost:
    """The price of one forward of one image at one input size."""

    macs: int
    parameters: int
    activations: int  # elements that convolutions, matrix products and attention write
    input_size: tuple[int, int]  # (H, W)
    uncounted: tuple[str, ...]  # operations met and not counted; empty for our own models
    by_operation: Mapping[str, int] = field(default_factory=dict, hash=False)  # kind of operation -> MACs

    def as_record(self) -> dict[str, Any]:
        """What cost.json says of one forward pass."""
        return {
            "gmacs": self.macs / 1e9,
            "parameters": self.parameters,
            "input_size": list(self.input_size),
            "uncounted": list(self.uncounted),
        }


@dataclass(frozen=True)
class TrainingCost:
    """The price of training on one image at one input size: forward in training mode, and backward."""

    forward_macs: int
    backward_macs: int
    input_size: tuple[int, int]  # (H, W)
    uncounted: tuple[str, ...]  # operations met and not counted

    @property
    def macs(self) -> int:
        """Forward and backward together."""
        return self.forward_macs + self.backward_macs


def count_macs(model: nn.Module, input_size: tuple[int, int], *, batch: int = 1, in_channels: int = 3) -> Cost:
    """The cost of inference per image of size (H, W): in evaluation mode, without gradients.

    The model is left as it is. `batch` matters only for a network that does some work once per batch, which is then
    shared by the images. Raises whatever the model raises for a size it cannot take.

    >>> cost = count_macs(nn.Conv2d(3, 8, kernel_size=3, padding=1), (10, 20))
    >>> cost.macs == 3 * 3 * 3 * 8 * 10 * 20, cost.parameters, cost.activations
    (True, 224, 1600)
    """

    def forward(model: nn.Module, images: Tensor, counter: OperationCounter) -> None:
        model.eval()
        with torch.no_grad(), counter:
            collect(model(images))

    counter = counted(model, forward, (batch, in_channels, *input_size))
    return Cost(
        macs=share(counter.macs["forward"].total(), batch),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        activations=share(counter.activations, batch),
        input_size=(input_size[0], input_size[1]),
        uncounted=tuple(sorted(counter.uncounted)),
        by_operation={kind: share(macs, batch) for kind, macs in sorted(counter.macs["forward"].items())},
    )


def count_training_macs(
    model: nn.Module, input_size: tuple[int, int], *, batch: int = 2, in_channels: int = 3
) -> TrainingCost:
    """The cost of training per image of size (H, W): forward in training mode, and backward from every output.

    Parameters that take no gradient are not charged for one, nor is the image. A module that is kept in evaluation
    mode when the model is set to training stays so. Counted at two images by default, since batch normalisation
    after global pooling refuses one. The model is left as it is.

    >>> cost = count_training_macs(nn.Conv2d(3, 8, kernel_size=3, padding=1), (10, 20))
    >>> cost.forward_macs == cost.backward_macs == 3 * 3 * 3 * 8 * 10 * 20  # the weight's gradient alone
    True
    """

    counter = counted(model, forward_and_backward, (batch, in_channels, *input_size))
    return TrainingCost(
        forward_macs=share(counter.macs["forward"].total(), batch),
        backward_macs=share(counter.macs["backward"].total(), batch),
        input_size=(input_size[0], input_size[1]),
        uncounted=tuple(sorted(counter.uncounted)),
    )


def forward_and_backward(model: nn.Module, images: Tensor, counter: "OperationCounter") -> None:
    """What a training step asks of the network, from the images to the gradients of all outputs."""
    model.train()
    with torch.enable_grad(), local_batch_norm(model), counter:
        outputs = [output for output in collect(model(images)) if output.requires_grad]
        counter.phase = "backward"
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def counted(
    model: nn.Module, run: Callable[[nn.Module, Tensor, "OperationCounter"], None], shape: tuple[int, ...]
) -> "OperationCounter":
    """The operations of `run(copy of the model, images, counter)`, on the meta device wherever that is possible."""
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]), usual_kernels():
        with suppress(Exception):
            counter = OperationCounter()
            run(without_values(model), torch.empty(shape, device="meta"), counter)
            return counter
        # Either the model looks at values (an exit taken by confidence, say), which the meta device does not have,
        # or it refuses this size, and then does so again, with its own message.
        counter = OperationCounter()
        run(deepcopy(unwrapped(model)).cpu(), torch.zeros(shape), counter)
        return counter


@contextmanager
def usual_kernels() -> Iterator[None]:
    """Torch as it is by default. When told to be deterministic it takes interpolation on a device without values
    apart into single steps, which are neither what runs nor what a look at a network expects.
    """
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def without_values(model: nn.Module) -> nn.Module:
    """A copy of the model whose parameters and buffers have shapes and no values, so that it takes no memory."""
    model = unwrapped(model)
    replaced: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        replaced[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        replaced[id(buffer)] = torch.empty_like(buffer, device="meta")
    return deepcopy(model, replaced)


def collect(output: Any) -> list[Tensor]:
    """The tensors in a model's output: a tensor, or tuples, lists, dicts or a generator of outputs."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = output.values()
    if isinstance(output, Iterable) and not isinstance(output, str):
        return [tensor for part in output for tensor in collect(part)]
    return []


def share(total: int, batch: int) -> int:
    """One image's part, rounded up."""
    return -(-total // batch)


def tensor_bytes(tensor: Tensor) -> int:
    """The bytes of memory behind a tensor; an expanded one has fewer than its elements would need.

    >>> tensor_bytes(torch.zeros(2, 3)), tensor_bytes(torch.zeros(2, 1).expand(2, 3))
    (24, 8)
    """
    wanted = tensor.numel() * tensor.element_size()
    try:
        return min(wanted, tensor.untyped_storage().nbytes())
    except (NotImplementedError, RuntimeError):  # a sparse tensor, or a subclass, without memory of its own
        return wanted


class OperationCounter(TorchDispatchMode):
    """Counts the MACs of the operations that run while it is active, and their bytes, apart for each phase."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self.macs: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}
        self.bytes: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}
        self.activations = 0
        self.uncounted: set[str] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one operation and perform it."""
        kwargs = kwargs or {}
        name = operation._overloadpacket.__name__.removesuffix("_")  # mul_ is mul, in place
        counting = COUNTED.get(name) if operation.namespace == "aten" else None
        if counting is None and not is_free(operation, name):
            with self:
                output = operation.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
            self.uncounted.add(operation._overloadpacket._qualified_op_name)
        kind = EVERYTHING_ELSE if counting is None else counting[0]
        output = self.perform(operation, kind, args, kwargs)
        if not operation.is_view and name not in IDLE:
            moved = collect((args, tuple(kwargs.values()), output))
            self.bytes[self.phase][kind] += sum(tensor_bytes(tensor) for tensor in moved)
        if counting is not None:
            _, formula = counting
            self.macs[self.phase][kind] += formula(args, kwargs, output)
            if kind != "interpolation":
                written = output[0] if isinstance(output, tuple) else output
                self.activations += written.numel() if self.phase == "forward" else 0
        return output

    def perform(self, operation: Any, kind: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation of a kind; a counter that also times it does so here."""
        return operation(*args, **kwargs)


def is_free(operation: Any, name: str) -> bool:
    """Whether the operation counts as no MACs by the convention at the top of this file."""
    if operation.is_view or any(tag in FREE_TAGS for tag in operation.tags):
        return True
    return operation.namespace == "aten" and (name in FREE or name.removesuffix("_backward") in FREE)


EVERYTHING_ELSE = "everything else"
"""The kind of all operations that count as no MACs."""

IDLE = {"empty", "empty_strided", "empty_permuted", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view"}
"""Operations that touch no memory."""

FREE_TAGS = {
    getattr(torch.Tag, name)
    for name in ("pointwise", "reduction", "view_copy", "inplace_view")
    if hasattr(torch.Tag, name)  # torch has been adding tags; the names below hold what older ones leave out
}
NORMALISATION = """
    native_batch_norm native_layer_norm native_group_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit
    _native_batch_norm_legit_no_training _batch_norm_with_update _batch_norm_no_update batch_norm_stats batch_norm_elemt
    batch_norm_gather_stats batch_norm_gather_stats_with_counts batch_norm_backward_reduce batch_norm_backward_elemt
    batch_norm batch_norm_update_stats _fused_rms_norm _weight_norm_interface renorm
"""
POOLING = """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool2d
    adaptive_max_pool2d adaptive_max_pool3d max_pool2d_with_indices max_pool3d_with_indices max_unpool2d max_unpool3d
    fractional_max_pool2d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d
"""
ACTIVATIONS_AND_LOSSES = """
    _softmax _softmax_backward_data _safe_softmax _masked_softmax _log_softmax _log_softmax_backward_data hardtanh
    hardswish hardsigmoid hardshrink leaky_relu elu celu glu mish softplus softshrink threshold log_sigmoid
    log_sigmoid_forward _prelu_kernel rrelu_with_noise native_dropout nll_loss_forward nll_loss nll_loss2d_forward
    nll_loss2d binary_cross_entropy binary_cross_entropy_with_logits mse_loss smooth_l1_loss huber_loss
"""
SUMS_AND_ORDERS = """
    sum nansum mean var std var_mean std_mean norm linalg_vector_norm prod any all amax amin aminmax max min argmax
    argmin median mode logsumexp cumsum cumprod logcumsumexp cummax cummin trace sort topk kthvalue bincount histc
    unique_dim _unique _unique2 unique_consecutive nonzero count_nonzero equal searchsorted bucketize isin
"""
COPIES = """
    cat stack clone copy _to_copy _copy_from _unsafe_view as_strided as_strided_scatter constant_pad_nd
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d im2col
    col2im pixel_shuffle pixel_unshuffle channel_shuffle roll flip rot90 repeat repeat_interleave index index_put
    _unsafe_index _unsafe_index_put _index_put_impl _unsafe_masked_index _unsafe_masked_index_put_accumulate
    index_select index_add index_copy index_fill index_reduce gather take put scatter scatter_add scatter_reduce
    masked_fill masked_select masked_scatter embedding embedding_dense slice slice_scatter select select_scatter
    diagonal diagonal_scatter diag_embed unfold tril triu resize set _local_scalar_dense _pin_memory _resize_output
    unsafe_split unsafe_split_with_sizes split_copy split_with_sizes_copy unbind_copy lift
"""
NEW_TENSORS = """
    empty empty_strided empty_permuted empty_like new_empty new_empty_strided new_zeros new_ones new_full zeros
    zeros_like ones ones_like full full_like arange linspace eye scalar_tensor fill zero rand randn rand_like
    randn_like randint randint_like randperm bernoulli normal uniform exponential multinomial random tril_indices
    triu_indices _efficientzerotensor
"""
FREE = frozenset(
    " ".join((NORMALISATION, POOLING, ACTIVATIONS_AND_LOSSES, SUMS_AND_ORDERS, COPIES, NEW_TENSORS)).split()
)


def convolution_macs(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> int:
    """Outputs x weights of one; a transposed convolution spreads each input instead of gathering each output."""
    images, weight, transposed = args[0], args[1], args[6]
    return convolution_product(images.shape, weight.shape, output.shape, transposed)


def convolution_backward_macs(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """As much as forward for the gradient of the input, and again for that of the weight, where they are wanted."""
    gradient, images, weight, transposed, wanted = args[0], args[1], args[2], args[7], args[10]
    forward = convolution_product(images.shape, weight.shape, gradient.shape, transposed)
    return forward * (bool(wanted[0]) + bool(wanted[1]))


def convolution_product(images: Sequence[int], weight: Sequence[int], output: Sequence[int], transposed: bool) -> int:
    """MACs from the shapes (N, C, ...) of input and output, and (outputs, inputs per group, ...) of the weight.

    >>> convolution_product((1, 4, 8, 8), (6, 2, 3, 3), (1, 6, 8, 8), False)  # two groups
    6912
    """
    return prod(images if transposed else output) * prod(weight[1:])


def product_macs(first: int) -> Callable[[tuple[Any, ...], dict[str, Any], Any], int]:
    """The formula of a matrix product (..., n, k) x (..., k, m) whose factors begin at that argument."""

    def macs(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
        left, right = args[first].shape, args[first + 1].shape
        return prod(left) * (right[-1] if len(right) > 1 else 1)

    return macs


def attention_macs(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """Queries (N, heads, L, E) with keys (N, heads, S, E), and the result with values (N, heads, S, V)."""
    query, key, value = (tensor.shape for tensor in args[:3])
    return prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def attention_backward_macs(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """Two products for each of the forward's."""
    return 2 * attention_macs(args[1:], kwargs, output)


def mixing_macs(weights: int) -> Callable[[tuple[Any, ...], dict[str, Any], Any], int]:
    """The formula of an interpolation that mixes each output of so many inputs."""
    return lambda args, kwargs, output: weights * output.numel()


def mixing_backward_macs(weights: int) -> Callable[[tuple[Any, ...], dict[str, Any], Any], int]:
    """As forward: each gradient of an output is spread over so many inputs."""
    return lambda args, kwargs, output: weights * args[0].numel()


def grid_macs(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> int:
    """Grid sampling: its third argument says bilinear (0), nearest (1) or bicubic (2)."""
    return (4, 0, 16)[args[2]] * output.numel()


def grid_backward_macs(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> int:
    """Backward the gradient is spread by the same weights; it comes first among the arguments."""
    return (4, 0, 16)[args[3]] * args[0].numel()


ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_scaled_dot_product_attention_math_for_mps",
)
MIXED_INPUTS = {"upsample_linear1d": 2, "upsample_bilinear2d": 4, "upsample_trilinear3d": 8, "upsample_bicubic2d": 16}

Formula = Callable[[tuple[Any, ...], dict[str, Any], Any], int]
COUNTED: dict[str, tuple[str, Formula]] = {
    "convolution": ("convolution", convolution_macs),
    "_convolution": ("convolution", convolution_macs),
    "convolution_overrideable": ("convolution", convolution_macs),
    "convolution_backward": ("convolution", convolution_backward_macs),
    "mm": ("matrix product", product_macs(0)),
    "bmm": ("matrix product", product_macs(0)),
    "mv": ("matrix product", product_macs(0)),
    "dot": ("matrix product", product_macs(0)),
    "vdot": ("matrix product", product_macs(0)),
    "_int_mm": ("matrix product", product_macs(0)),
    "_scaled_mm": ("matrix product", product_macs(0)),
    "addmm": ("matrix product", product_macs(1)),
    "_addmm_activation": ("matrix product", product_macs(1)),
    "addmv": ("matrix product", product_macs(1)),
    "baddbmm": ("matrix product", product_macs(1)),
    "addbmm": ("matrix product", product_macs(1)),
    **dict.fromkeys(ATTENTION, ("attention", attention_macs)),
    **{f"{name}_backward": ("attention", attention_backward_macs) for name in ATTENTION},
    **{name: ("interpolation", mixing_macs(weights)) for name, weights in MIXED_INPUTS.items()},
    **{f"{name}_backward": ("interpolation", mixing_backward_macs(weights)) for name, weights in MIXED_INPUTS.items()},
    "grid_sampler_2d": ("interpolation", grid_macs),
    "grid_sampler_2d_backward": ("interpolation", grid_backward_macs),
}
