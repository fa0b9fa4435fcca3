"""Follows the channels of a network through one forward pass, to see which of them are one and the same.

Each position along a parameter's channel dimension is a label. The pass runs on the meta device, and every operation
says which labels it ties: an addition ties those of its operands, a convolution the labels of its input to its
weight's second dimension, a concatenation lays them in a row. Labels that are tied are one channel; channels that lie
in the same tensors form a group. Whatever an operation does to a channel that is not understood here freezes it: the
channel stays. So does a channel that would not be silent when its weights are zero (a sigmoid makes 0.5 of it), which
is why a cut network equals the uncut one with those channels zeroed.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dance_seg.cost.macs import collect, usual_kernels, without_values
from dance_seg.early_exit.exits import outputs_of
from dance_seg.network_slimming.channels import Group, Groups, Member

FROZEN = 0  # the label of all channels that stay


@usual_kernels()
def trace_groups(model: nn.Module, input_size: tuple[int, int], *, batch: int = 2, in_channels: int = 3) -> Groups:
    """The groups of channels of a model that takes images (N, 3, H, W), without running it on any value.

    The channels of the images and of the model's outputs stay. The model is left as it is. Raises whatever the model
    raises for a size it cannot take.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
    >>> [(group.name, group.channels, len(group.members)) for group in trace_groups(model, (8, 8))]
    [('0.weight', 8, 7)]
    """
    copied = walkable(model)
    tracer = _Tracer(copied)
    with torch.no_grad(), tracer:
        for output in collect(outputs_of(copied, images_without_values(copied, (batch, in_channels, *input_size)))):
            tracer.freeze(tracer.of(output), "the network's output keeps its classes")
    return tracer.groups()


def walkable(model: nn.Module) -> nn.Module:
    """A copy without values to walk through, in evaluation mode.

    Layers that mix their kernels for each image are to compute with one kernel after the other in it, since a mixed
    kernel does not tell whose channels it has.
    """
    copied = without_values(model).eval()
    for module in copied.modules():
        if hasattr(module, "synthesis"):
            module.synthesis = "loop"  # type: ignore[assignment]
    return copied


def images_without_values(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Images for a walk through a network: of its own type, and without any value."""
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return torch.empty(shape, device="meta", dtype=next(dtypes, torch.float32))


class _Ties:
    """Labels that are tied to one another: a forest in an array, joined many at a time."""

    def __init__(self) -> None:
        self.parent = np.zeros(1, np.int64)  # label 0 is FROZEN

    def new(self, count: int) -> np.ndarray:
        labels = np.arange(len(self.parent), len(self.parent) + count)
        self.parent = np.concatenate([self.parent, labels])
        return labels

    def root(self, labels: np.ndarray) -> np.ndarray:
        roots = self.parent[labels]
        while True:
            above = self.parent[roots]
            if np.array_equal(above, roots):
                self.parent[labels] = roots
                return roots
            roots = above

    def tie(self, first: np.ndarray, second: np.ndarray) -> None:
        while True:
            one, two = self.root(first), self.root(second)
            apart = one != two
            if not apart.any():
                return
            low, high = np.minimum(one, two)[apart], np.maximum(one, two)[apart]
            np.minimum.at(self.parent, high, low)  # a label tied to several joins the lowest; the next round the rest


class _Axis(NamedTuple):
    """One dimension of a tensor that holds channels."""

    labels: np.ndarray  # (size,)
    slot: tuple[str, int] | None = None  # the parameter and its dimension, while it is no more than a view of it


class _Traced(NamedTuple):
    """What is known of one tensor: an _Axis, or None where there are no channels, for each dimension."""

    axes: tuple[_Axis | None, ...]
    silent: bool = True  # whether a channel is zero here once the weights that make it are


class _Tracer(TorchDispatchMode):
    """Follows the channels through the operations that run while it is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ties = _Ties()
        self.known: dict[int, tuple[Tensor, _Traced]] = {}  # by identity; the tensors are held so that ids stay theirs
        saved = model.state_dict().keys()  # a buffer that no checkpoint holds could not be made narrow again
        named = (*model.named_parameters(), *model.named_buffers())
        self.names = {id(tensor): name for name, tensor in named if name in saved}
        self.group_norms = {id(module.weight) for module in model.modules() if isinstance(module, nn.GroupNorm)}
        self.slots: dict[tuple[str, int], np.ndarray] = {}
        self.reads: set[tuple[str, int]] = set()
        self.makes: set[tuple[str, int]] = set()  # tied weights may do both
        self.reasons: dict[str, None] = {}
        self.path: list[str] = []
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda module, inputs, name=name: self.path.append(name))
            module.register_forward_hook(lambda module, inputs, output: self._leave(), always_call=True)

    def _leave(self) -> None:
        if self.path:
            self.path.pop()

    # Labels of tensors ---------------------------------------------------------------------------------------------

    def of(self, tensor: Any) -> _Traced:
        """What is known of a tensor; parameters and buffers of the model get labels when they are first seen."""
        if id(tensor) in self.known:
            return self.known[id(tensor)][1]
        name = self.names.get(id(tensor))
        if name is None or not tensor.ndim:
            return _Traced((None,) * tensor.ndim)
        return _Traced(tuple(self._slot(name, dim, size) for dim, size in enumerate(tensor.shape)))

    def _slot(self, name: str, dim: int, size: int) -> _Axis | None:
        if size == 1:
            return None
        if (name, dim) not in self.slots:
            self.slots[name, dim] = self.ties.new(size)
        return _Axis(self.slots[name, dim], (name, dim))

    def axis_of(self, tensor: Tensor, dim: int) -> _Axis | None:
        """One dimension of a tensor; of a parameter no other dimension gets labels (those of a kernel never do)."""
        if id(tensor) not in self.known and id(tensor) in self.names:
            return self._slot(self.names[id(tensor)], dim, tensor.shape[dim])
        return self.of(tensor).axes[dim]

    def is_silent(self, tensor: Any) -> bool:
        """Whether a weight or bias is zero for a channel that is silenced; one that was computed may not be."""
        return id(tensor) in self.names or self.of(tensor).silent

    def set(self, tensor: Any, axes: Sequence[_Axis | None], silent: bool = True) -> None:
        if isinstance(tensor, Tensor):
            self.known[id(tensor)] = (tensor, _Traced(tuple(axes), silent))

    def silent_along(self, tensor: Tensor, dim: int) -> bool:
        """Whether a tensor has the channels of that dimension, counted from the last, and is zero for silent ones."""
        known = self.of(tensor)
        return known.silent and len(known.axes) >= -dim and known.axes[dim] is not None

    def can_be_cut(self, what: "_Traced | _Axis | None") -> bool:
        """Whether a tensor, or one dimension, has channels that are not frozen by now."""
        axes = what.axes if isinstance(what, _Traced) else (what,)
        return any(axis is not None and self.ties.root(axis.labels).any() for axis in axes)

    def freeze(self, what: "_Traced | _Axis | None", reason: str) -> None:
        """Let the channels of a tensor or of one dimension stay."""
        axes = what.axes if isinstance(what, _Traced) else (what,)
        for axis in axes:
            if axis is not None and self.can_be_cut(axis):
                self.ties.tie(axis.labels, np.full(len(axis.labels), FROZEN))
                module = next((name for name in reversed(self.path) if name), "the network")
                self.reasons.setdefault(f"{module}: {reason}")

    def tie(self, axes: Iterable[_Axis | None], reason: str) -> _Axis | None:
        """Tie dimensions of one size; those that have channels stay if another has none."""
        axes = list(axes)
        present = [axis for axis in axes if axis is not None]
        if not present:
            return None
        first = present[0]
        for axis in present[1:]:
            self.ties.tie(first.labels, axis.labels)
        if len(present) < len(axes):
            self.freeze(first, reason)
        return _Axis(first.labels)

    def make(self, weight: _Axis | None) -> None:
        """A weight's dimension makes channels, and is silenced with them, even if it is tied to one that reads."""
        if weight is not None and weight.slot is not None:
            self.makes.add(weight.slot)

    def read(self, weight: _Axis | None, given: _Axis | None, silent: bool) -> None:
        """A weight's dimension sums over that of what it is given."""
        if weight is not None and weight.slot is not None:
            self.reads.add(weight.slot)
        self.tie((weight, given), "reads channels that are not the network's own")
        if not silent:
            self.freeze(given, "reads channels that are not zero when they are cut")

    # Operations ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Perform one operation and say what it does to channels."""
        kwargs = kwargs or {}
        name = operation._overloadpacket.__name__
        rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
        if rule is None and torch.Tag.pointwise in operation.tags:
            rule = _pointwise
        if rule is None:
            with self:
                output = operation.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
            rule = _unknown
        changed = args[0] if name.endswith("_") and isinstance(args[0], Tensor) else None
        if torch.Tag.inplace_view in operation.tags:
            rule = _unknown
        output = operation(*args, **kwargs)
        rule(self, operation, args, kwargs, output)
        if changed is not None and changed._base is not None and not self.of(changed).silent:
            self.freeze(self.of(changed._base), "written to through a view")
        return output

    # Groups --------------------------------------------------------------------------------------------------------

    def groups(self) -> Groups:
        """What was found: channels that lie in the same tensors, with the same number of positions, in order."""
        places: dict[int, dict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(list))
        for slot, labels in self.slots.items():
            roots = self.ties.root(labels)
            for position in np.flatnonzero(roots != FROZEN):
                places[int(roots[position])][slot].append(int(position))
        alike: dict[tuple[Any, ...], list[dict[tuple[str, int], list[int]]]] = defaultdict(list)
        for channel in places.values():
            if any(not self._only_reads(slot) for slot in channel):  # what is only read has no weights that make it
                alike[tuple((slot, len(positions)) for slot, positions in channel.items())].append(channel)
        found = []
        for signature, channels in alike.items():
            slots = [slot for slot, _ in signature]
            maker = next(slot for slot in slots if not self._only_reads(slot))
            channels.sort(key=lambda channel: channel[maker])
            members = tuple(
                Member(slot[0], slot[1], np.array([channel[slot] for channel in channels]), self._only_reads(slot))
                for slot in slots
            )
            found.append(Group(maker[0], members))
        order = {name: number for number, name in enumerate(self.names.values())}
        return Groups(tuple(sorted(found, key=lambda group: order[group.name])), tuple(self.reasons))

    def _only_reads(self, slot: tuple[str, int]) -> bool:
        return slot in self.reads and slot not in self.makes


Rule = Callable[[_Tracer, Any, tuple[Any, ...], dict[str, Any], Any], None]


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _unknown(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    for tensor in _tensors([*args, *kwargs.values()]):
        tracer.freeze(tracer.of(tensor), f"{operation._overloadpacket.__name__} is not known here")


def _same(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    """A copy, or another view of the same dimensions."""
    known = tracer.of(args[0])
    tracer.set(output, known.axes, known.silent)


def _like(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    """A new tensor of that shape."""
    tracer.set(output, [axis and _Axis(axis.labels) for axis in tracer.of(args[0]).axes], False)


def _pointwise(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    operands = _tensors([*args, *kwargs.values()])
    name = operation._overloadpacket.__name__.removesuffix("_")
    axes: list[_Axis | None] = []
    for dim in range(-output.ndim, 0):
        wide = [tensor for tensor in operands if tensor.ndim >= -dim and tensor.shape[dim] == output.shape[dim] > 1]
        axes.append(tracer.tie((tracer.of(tensor).axes[dim] for tensor in wide), f"{name} with a tensor of fixed size"))
    silent = any(axes) and _stays_silent(tracer, operation, name, args, kwargs, operands, axes)
    tracer.set(output, axes, silent)


def _stays_silent(
    tracer: _Tracer,
    operation: Any,
    name: str,
    args: Any,
    kwargs: Any,
    operands: list[Tensor],
    axes: Sequence[_Axis | None],
) -> bool:
    """Whether an element-by-element operation leaves a channel that is zero at zero."""
    # Of each dimension whose channels may be cut, which operands are zero for them; one that lacks them is not.
    dims = [dim for dim in range(-len(axes), 0) if tracer.can_be_cut(axes[dim])]
    zero = [[tracer.silent_along(tensor, dim) for tensor in operands] for dim in dims]
    if name == "mul":
        return all(map(any, zero))
    if name in ("div", "_prelu_kernel"):
        return operands[0] is args[0] and all(silent[0] for silent in zero)
    if not all(map(all, zero)):
        return False
    if len(operands) > 1:
        return name in ("add", "sub", "lerp")
    with torch.utils._python_dispatch._disable_current_modes():
        zeros = [torch.zeros(1) if isinstance(arg, Tensor) else arg for arg in args]
        named = {key: torch.zeros(1) if isinstance(arg, Tensor) else arg for key, arg in kwargs.items()}
        try:
            return bool(operation(*zeros, **named) == 0)
        except (RuntimeError, TypeError, NotImplementedError):
            return False


def _convolution(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    images, weight, bias, *_ = args
    transposed, groups = args[6], args[8]
    known = tracer.of(images)
    given, first, second = known.axes[1], tracer.axis_of(weight, 0), tracer.axis_of(weight, 1)
    shift = (tracer.of(bias).axes[0],) if bias is not None else ()
    for axis in (known.axes[0], *known.axes[2:]):
        tracer.freeze(axis, "a convolution slides over channels")
    if id(weight) in tracer.known:  # computed, so that its kernel may have labels too
        for axis in tracer.of(weight).axes[2:]:
            tracer.freeze(axis, "they span a convolution's kernel")
    silent = tracer.is_silent(weight) and (bias is None or tracer.is_silent(bias))
    if groups == 1:
        outer, inner = (second, first) if transposed else (first, second)  # of the weight: what it makes, what it reads
        made = tracer.tie((outer, *shift), "a bias of fixed size")
        tracer.make(outer)
        tracer.read(inner, given, known.silent)
    elif groups == images.shape[1] and (not transposed or weight.shape[1] == 1):
        # Depthwise: each channel makes its own, or several in a row.
        repeated = given and _Axis(np.repeat(given.labels, output.shape[1] // images.shape[1]))
        made = tracer.tie((first, repeated, *shift), "a depthwise convolution of channels that stay")
        tracer.make(first)
    elif transposed:
        for axis in (first, second, given, *shift):
            tracer.freeze(axis, "a transposed convolution in groups")
        made = None
    else:
        # Every group of the convolution loses the channel at the same place, so that all remain equally wide.
        made = tracer.tie((first, *shift), "a bias of fixed size")
        for axis in (given, made):
            if axis is not None:
                rows = axis.labels.reshape(groups, -1)
                tracer.ties.tie(rows[1:].ravel(), np.tile(rows[0], groups - 1))
        tracer.make(first)
        tracer.read(second, given and _Axis(given.labels[: weight.shape[1]]), known.silent)
    tracer.set(output, (None, made, *(None,) * (output.ndim - 2)), silent)


def _batch_norm(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    images, affine, rest = args[0], args[1:3], args[3:5]
    known = tracer.of(images)
    tensors = [tensor for tensor in (*affine, *rest) if isinstance(tensor, Tensor)]
    axis = tracer.tie((known.axes[1], *(tracer.axis_of(tensor, 0) for tensor in tensors)), "a norm of fixed size")
    for other in (known.axes[0], *known.axes[2:]):
        tracer.freeze(other, "normalised over")
    silent = all(isinstance(tensor, Tensor) and tracer.is_silent(tensor) for tensor in affine)
    first = output[0] if isinstance(output, tuple | list) else output
    tracer.set(first, (None, axis, *(None,) * (images.ndim - 2)), silent)


def _group_norm(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    images, weight, bias, groups = args[0], args[1], args[2], args[6]
    known = tracer.of(images)
    affine = [tensor for tensor in (weight, bias) if isinstance(tensor, Tensor)]
    axis = tracer.tie((known.axes[1], *(tracer.axis_of(tensor, 0) for tensor in affine)), "a norm of fixed size")
    for other in (known.axes[0], *known.axes[2:]):
        tracer.freeze(other, "normalised over")
    if weight is None or id(weight) not in tracer.group_norms:
        tracer.freeze(axis, "a group norm whose number of groups could not follow")
    elif axis is not None:
        # A group of the norm goes as a whole: what is left is then normalised as before.
        rows = axis.labels.reshape(groups, -1)
        tracer.ties.tie(rows[:, 1:].ravel(), np.repeat(rows[:, 0], rows.shape[1] - 1))
    silent = len(affine) == 2 and all(map(tracer.is_silent, affine))
    tracer.set(output[0], (None, axis, *(None,) * (images.ndim - 2)), silent)


def _layer_norm(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    images, shape = args[0], args[1]
    known = tracer.of(images)
    over = len(shape)
    for tensor in args[2:4]:
        if isinstance(tensor, Tensor):
            tracer.freeze(tracer.of(tensor), "normalised over its channels")
    for axis in known.axes[-over:]:
        tracer.freeze(axis, "normalised over its channels")
    tracer.set(output[0], (*known.axes[:-over], *known.axes[-over:]), False)


def _product(first: int) -> Rule:
    """A matrix product (..., n, k) x (..., k, m) whose factors begin at that argument; what comes before is added."""

    def rule(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
        left, right = args[first], args[first + 1]
        one, two = tracer.of(left), tracer.of(right)
        summed = two.axes[-2] if right.ndim > 1 else two.axes[-1]
        rows = (one.axes[-2],) if left.ndim > 1 else ()
        columns = (two.axes[-1],) if right.ndim > 1 else ()
        if _is_weight(two.axes):
            tracer.read(summed, one.axes[-1], one.silent)
            for axis in columns:
                tracer.make(axis)
        elif _is_weight(one.axes):
            tracer.read(one.axes[-1], summed, two.silent)
            for axis in rows:
                tracer.make(axis)
        else:
            tracer.tie((one.axes[-1], summed), "a product with a tensor of fixed size")
            if not (one.silent or two.silent):
                tracer.freeze(summed, "sums over channels that are not zero when they are cut")
        batch = [
            tracer.tie(pair, "a product with a tensor of fixed size")
            for pair in zip(one.axes[:-2], two.axes[:-2], strict=False)
        ]
        axes = [*batch, *rows, *columns]
        silent = (
            (one.silent or not any(map(tracer.can_be_cut, rows)))
            and (two.silent or not any(map(tracer.can_be_cut, columns)))
            and (one.silent or two.silent or not any(map(tracer.can_be_cut, batch)))
        )
        if first:
            added = args[0]
            for dim in range(-min(added.ndim, len(axes)), 0):
                if added.shape[dim] == output.shape[dim] > 1:
                    axes[dim] = tracer.tie((axes[dim], tracer.of(added).axes[dim]), "a bias of fixed size")
            silent = silent and all(
                tracer.silent_along(added, dim) for dim in range(-len(axes), 0) if tracer.can_be_cut(axes[dim])
            )
        tracer.set(output, [axis and _Axis(axis.labels) for axis in axes], silent)

    return rule


def _is_weight(axes: Sequence[_Axis | None]) -> bool:
    return any(axis is not None and axis.slot is not None for axis in axes)


def _attention(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    query, key, value = (tracer.of(tensor) for tensor in args[:3])
    for known in (query, key):
        tracer.freeze(known, "attention compares them")
    for axis in value.axes[:-1]:
        tracer.freeze(axis, "attention compares them")
    first = output[0] if isinstance(output, tuple | list) else output
    tracer.set(first, (*(None,) * (first.ndim - 1), value.axes[-1]), value.silent)


def _permute(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    known, name = tracer.of(args[0]), operation._overloadpacket.__name__
    order = list(range(args[0].ndim))
    if name == "permute":
        order = [dim % len(order) for dim in args[1]]
    elif len(order) > 1:
        one, two = (0, 1) if name.startswith("t") and len(args) == 1 else (args[1], args[2])
        order[one], order[two] = order[two], order[one]
    tracer.set(output, [known.axes[dim] for dim in order], known.silent)


def _reshape(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Dimensions merged and split. A split of channels into parts that could each be cut lets them stay."""
    known = tracer.of(args[0])
    axes: list[_Axis | None] = []
    for source, target in _blocks(tuple(args[0].shape), tuple(output.shape)):
        sizes, parts = [args[0].shape[dim] for dim in source], [output.shape[dim] for dim in target]
        own = [known.axes[dim] for dim in source]
        axes += _reshaped(tracer, own, sizes, parts)
    tracer.set(output, axes, known.silent)


def _reshaped(tracer: _Tracer, axes: list[_Axis | None], sizes: list[int], parts: list[int]) -> list[_Axis | None]:
    channels = [number for number, axis in enumerate(axes) if axis is not None]
    if not channels:
        return [None] * len(parts)
    if len(channels) == 1:
        number = channels[0]
        axis = axes[number]
        assert axis is not None
        before, after = prod(sizes[:number]), prod(sizes[number + 1 :])
        # Where one of the parts is as it was, with the same before and after it, nothing happened to the channels.
        for place, part in enumerate(parts):
            if part == len(axis.labels) and prod(parts[:place]) == before and prod(parts[place + 1 :]) == after:
                return [axis if other == place else None for other in range(len(parts))]
        whole = np.tile(np.repeat(axis.labels, after), before)
        if len([part for part in parts if part > 1]) == 1:
            return [_Axis(whole) if part > 1 else None for part in parts]
        for place, part in enumerate(parts):  # each channel may lie in several places of a merged dimension
            table = whole.reshape(prod(parts[:place]), part, -1)
            if (table == table[:1, :, :1]).all():
                return [_Axis(table[0, :, 0]) if other == place else None for other in range(len(parts))]
    for axis in axes:
        tracer.freeze(axis, "its channels are divided among heads or groups")
    return [None] * len(parts)


def _blocks(source: tuple[int, ...], target: tuple[int, ...]) -> Iterable[tuple[list[int], list[int]]]:
    """The dimensions of two shapes of one size, side by side in the smallest blocks of equal size.

    >>> list(_blocks((2, 6, 5), (2, 3, 2, 5)))
    [([0], [0]), ([1], [1, 2]), ([2], [3])]
    """
    one = two = 0
    while one < len(source) or two < len(target):
        first, second = [one][: len(source) - one], [two][: len(target) - two]
        one, two = one + len(first), two + len(second)
        while (left := prod(source[dim] for dim in first)) != (right := prod(target[dim] for dim in second)):
            if left < right:
                first.append(one)
                one += 1
            else:
                second.append(two)
                two += 1
        yield first, second


def _part(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    """A part of a tensor along one dimension, which loses or keeps it; channels that are divided so stay."""
    known, name = tracer.of(args[0]), operation._overloadpacket.__name__
    default = 0 if name in ("slice", "unbind", "select") else kwargs.get("dim", 0)
    dim = (
        args[2] if "split" in name and len(args) > 2 else args[1] if "split" not in name and len(args) > 1 else default
    )
    dim %= args[0].ndim
    for part in output if isinstance(output, list | tuple) else [output]:
        axes = list(known.axes)
        if part.ndim < args[0].ndim:
            del axes[dim]
            tracer.freeze(known.axes[dim], "its channels are taken apart")
        elif part.shape[dim] != args[0].shape[dim]:
            axes[dim] = None
            tracer.freeze(known.axes[dim], "its channels are taken apart")
        tracer.set(part, axes, known.silent)


def _cat(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    parts = [tensor for tensor in args[0] if tensor.numel() or tensor.ndim == output.ndim]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % output.ndim
    known = [tracer.of(tensor) for tensor in parts]
    axes: list[_Axis | None] = []
    for other in range(output.ndim):
        if other != dim:
            axes.append(tracer.tie((part.axes[other] for part in known), "joined to a tensor of fixed size"))
        elif not any(part.axes[dim] for part in known):
            axes.append(None)
        else:
            rows = [
                axis.labels if (axis := part.axes[dim]) is not None else np.full(tensor.shape[dim], FROZEN)
                for part, tensor in zip(known, parts, strict=True)
            ]
            axes.append(_Axis(np.concatenate(rows)))
    tracer.set(output, axes, all(part.silent or not tracer.can_be_cut(part) for part in known))


def _stack(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % output.ndim
    known = [tracer.of(tensor) for tensor in args[0]]
    axes = [tracer.tie((part.axes[n] for part in known), "stacked") for n in range(output.ndim - 1)]
    tracer.set(
        output, [*axes[:dim], None, *axes[dim:]], all(part.silent or not tracer.can_be_cut(part) for part in known)
    )


def _strided(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Other strides of the same shape, as pooling in channels_last leaves behind; else anything may have happened."""
    same = tuple(args[0].shape) == tuple(args[1])
    (_same if same else _unknown)(tracer, operation, args, kwargs, output)


def _squeeze(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    known, given = tracer.of(args[0]), args[0]
    if output.ndim > given.ndim:
        dim = args[1] % output.ndim
        tracer.set(output, [*known.axes[:dim], None, *known.axes[dim:]], known.silent)
        return
    dims = args[1] if len(args) > 1 else range(given.ndim)
    dims = [dims] if isinstance(dims, int) else dims
    gone = {dim % given.ndim for dim in dims if given.shape[dim] == 1}
    tracer.set(output, [axis for dim, axis in enumerate(known.axes) if dim not in gone], known.silent)


def _expand(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    known = tracer.of(args[0])
    tracer.set(output, (*(None,) * (output.ndim - args[0].ndim), *known.axes), known.silent)


def _reduce(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    """A sum, mean or extreme over dimensions; only a sum of channels is the same without those that are zero."""
    known, given, name = tracer.of(args[0]), args[0], operation._overloadpacket.__name__
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    dims = range(given.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    over = {dim % given.ndim for dim in dims}
    for dim in over:
        if name != "sum" or not known.silent:
            tracer.freeze(known.axes[dim], f"{name} over its channels")
    kept = bool(args[2] if len(args) > 2 else kwargs.get("keepdim", False))
    axes = [None if dim in over else axis for dim, axis in enumerate(known.axes) if kept or dim not in over]
    outputs = output if isinstance(output, list | tuple) else [output]
    for tensor in outputs:
        tracer.set(tensor, axes, known.silent and name in ("sum", "mean", "amax", "amin", "max", "min"))


def _spatial(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    """Pooling, interpolation and padding of the last two dimensions."""
    known = tracer.of(args[0])
    first = output[0] if isinstance(output, list | tuple) else output
    axes = list(known.axes)
    name = operation._overloadpacket.__name__
    for dim in range(len(axes)):
        place = len(axes) - 1 - dim  # from the last; padding may move channels and leave their number
        changes = any(args[1][2 * place : 2 * place + 2]) if name == "constant_pad_nd" else place < 2
        if changes or first.shape[dim] != args[0].shape[dim]:
            tracer.freeze(axes[dim], f"{name} over its channels")
            axes[dim] = None
    filled = name == "constant_pad_nd" and bool(args[2] if len(args) > 2 else 0)
    tracer.set(first, axes, known.silent and not filled)


def _softmax(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    known = tracer.of(args[0])
    tracer.freeze(known.axes[args[1]], "softmax over its channels")
    tracer.set(output, known.axes, False)


def _dropout(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    _same(tracer, operation, args, kwargs, output[0] if isinstance(output, tuple) else output)


def _nothing(tracer: _Tracer, operation: Any, args: Any, kwargs: Any, output: Any) -> None:
    """A tensor that comes from no other."""


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Rule] = {
    **_named(_convolution, "convolution _convolution"),
    **_named(
        _batch_norm,
        "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_no_update "
        "_batch_norm_with_update cudnn_batch_norm",
    ),
    **_named(_group_norm, "native_group_norm"),
    **_named(_layer_norm, "native_layer_norm _fused_rms_norm"),
    **_named(_product(0), "mm bmm mv"),
    **_named(_product(1), "addmm baddbmm addmv"),
    **_named(
        _attention,
        "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
        "_scaled_dot_product_efficient_attention _scaled_dot_product_fused_attention_overrideable",
    ),
    **_named(_permute, "permute transpose t"),
    **_named(_reshape, "view _unsafe_view reshape _reshape_alias"),
    **_named(_part, "slice select split split_with_sizes unsafe_split unsafe_split_with_sizes unbind narrow"),
    **_named(_cat, "cat"),
    **_named(_stack, "stack"),
    **_named(_strided, "as_strided"),
    **_named(_squeeze, "squeeze unsqueeze"),
    **_named(_expand, "expand"),
    **_named(_reduce, "sum mean amax amin max min var var_mean std argmax"),
    **_named(
        _spatial,
        "max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d "
        "upsample_bilinear2d upsample_nearest2d upsample_bicubic2d _upsample_nearest_exact2d _upsample_bilinear2d_aa "
        "constant_pad_nd reflection_pad2d replication_pad2d",
    ),
    **_named(  # those that torch does not tag as element by element
        _pointwise,
        "hardswish hardsigmoid hardtanh hardshrink softshrink leaky_relu elu celu mish softplus threshold "
        "_prelu_kernel",
    ),
    **_named(_softmax, "_softmax _log_softmax _safe_softmax"),
    **_named(_dropout, "native_dropout"),
    **_named(_same, "clone _to_copy alias detach contiguous lift_fresh lift view_as_real"),
    **_named(_like, "zeros_like ones_like empty_like rand_like randn_like full_like bernoulli"),
    **_named(
        _nothing,
        "empty empty_strided new_empty new_zeros new_ones new_full zeros ones full arange linspace scalar_tensor rand "
        "randn randint eye _local_scalar_dense",
    ),
}
