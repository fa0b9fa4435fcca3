"""Early exits on any encoder-decoder network: a light head after chosen stages of its encoder, the network's own last.

An encoder gives its features all at once. Here its forward is recorded once (torch.fx) as a list of calls to its
layers, and the list is cut behind each stage that has an exit. Layers are looked up by name at every call, so that the
weights, their names and whatever is done to the layers later (pruning, other formats) remain the encoder's own.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from dance_seg.cost.macs import collect
from dance_seg.early_exit.exits import ExitNetwork, State, Walk, select
from dance_seg.early_exit.heads import ExitHead
from dance_seg.models.smp import SmpModel, pad_to
from dance_seg.sample import CoarseLogits


class SmpWithExits(ExitNetwork):
    """An SmpModel with early exits on its encoder: images (N, 3, H, W), normalised -> logits (N, C, H, W), any H and W.

    The arguments are SmpModel's, and those of `with_exits`, which says what they mean and what is refused.

    >>> model = SmpWithExits(arch="fpn", encoder_name="resnet18", num_classes=3, at=[8, 16]).eval()
    >>> [tuple(exit.logits.shape) for exit in model.exits(torch.zeros(1, 3, 60, 90))]  # a head runs when it is reached
    [(1, 3, 8, 12), (1, 3, 4, 6), (1, 3, 16, 24)]
    """

    def __init__(
        self,
        *,
        arch: str,
        encoder_name: str,
        num_classes: int,
        at: Sequence[int] = (8, 16),
        channels: int = 64,
        encoder_weights: str | bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        model = SmpModel(
            arch=arch,
            encoder_name=encoder_name,
            num_classes=num_classes,
            encoder_weights=encoder_weights,
            **options,
        )
        self._attach(model, at, channels)

    def _attach(self, model: SmpModel, at: Sequence[int], channels: int) -> None:
        _check_arguments(at, channels)
        features = _features(model)
        stages = [_stage(model, features, stride) for stride in at]
        self.parts = _lazy_parts(model, stages)  # no modules among them: the layers are the encoder's
        self.model, self.at = model, tuple(at)
        self.num_exits, self.num_classes = len(stages) + 1, model.num_classes
        self.stride, self.minimum_size = model.stride, model.minimum_size
        self.align_corners = (*(False for _ in stages), True)
        heads = [ContextHead(features[stage].shape[1], model.num_classes, channels) for stage in stages]
        self.heads = nn.ModuleList(heads).to(next(model.parameters()).device)
        self.train(model.training)

    def begin(self, images: Tensor) -> State:
        """The images, padded, under their name in the recording."""
        return {self.parts[0].images: pad_to(images, self.padded_size(*images.shape[-2:]))}

    def part(self, exit: int, state: State) -> tuple[State, State]:
        """The features of the stage, of all stages at the last exit; and what later parts read, by name."""
        network: Any = self.model.network
        return self.parts[exit].run(network.encoder, state)

    def head(self, exit: int, seen: State) -> Tensor:
        """The logits of an early head, or of the network's own decoder."""
        if exit < len(self.heads):
            return self.heads[exit](*seen)
        network: Any = self.model.network
        return network.segmentation_head(network.decoder(seen))

    def coarse_logits(self, images: Tensor) -> CoarseLogits:
        """The logits of the network without exits."""
        return self.model.coarse_logits(images)

    def _walk(self, images: Tensor, wanted: Sequence[bool]) -> Walk:
        """The exits; an error of the network's says which images it did not take.

        Raises ValueError in training for a batch of one image where the network normalises over a single value.
        """
        try:
            yield from super()._walk(images, wanted)
        except (ValueError, AssertionError) as error:
            shape = (*images.shape[:2], *self.padded_size(*images.shape[-2:]))
            raise ValueError(self.model._explain(error, shape)) from error


def with_exits(model: SmpModel, at: Sequence[int], channels: int = 64) -> SmpWithExits:
    """The same network, its weights not copied, with an early exit behind each encoder stage that `at` names.

    `at` holds strides, such as [8, 16]: a stage is named by how many pixels of the image one of its own would span if
    the encoder were not dilated, as SMP numbers them. DeepLabV3+ keeps its last stage at stride 16; its name is 32 all
    the same. `channels` is the width of the early heads. Raises ValueError for a stride that the encoder lacks, and
    for an encoder that cannot be stopped between its stages, with which an exit would save nothing.

    >>> model = SmpModel(arch="pspnet", encoder_name="resnet18", num_classes=3)
    >>> with_exits(model, at=[4]).num_exits
    2
    """
    network = SmpWithExits.__new__(SmpWithExits)
    nn.Module.__init__(network)
    network._attach(model, at, channels)
    return network


class ContextHead(nn.Module):
    """An exit head that knows the image as a whole: features (N, C, h, w) -> logits (N, K, h, w).

    What an early stage sees around a pixel is small; the mean over the image costs next to nothing, and what is made of
    it is added to the features everywhere. It starts as nothing.

    >>> ContextHead(128, num_classes=3)(torch.zeros(2, 128, 5, 7)).shape
    torch.Size([2, 3, 5, 7])
    """

    def __init__(self, channels_in: int, num_classes: int, channels: int = 64) -> None:
        super().__init__()
        self.context = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels_in, channels, 1), nn.ReLU(), nn.Conv2d(channels, channels_in, 1)
        )
        self.head = ExitHead(channels_in, num_classes, channels=channels)
        for weight in self.context[-1].parameters():
            nn.init.zeros_(weight)

    def forward(self, features: Tensor) -> Tensor:
        """Logits of features."""
        return self.head(features + self.context(features))


def _check_arguments(at: Any, channels: Any) -> None:
    strides = list(at) if isinstance(at, Sequence) and not isinstance(at, str) else []
    increasing = all(shallow < deep for shallow, deep in pairwise(strides))
    if not strides or not all(type(stride) is int for stride in strides) or not increasing:
        raise ValueError(f"model.args.at is {at!r}; give the strides of encoder stages, rising, such as [8, 16]")
    if type(channels) is not int or channels < 1:
        raise ValueError(f"model.args.channels is {channels!r}; give the width of the early heads, such as 64")


def _features(model: SmpModel) -> list[Tensor]:
    """What the encoder gives for two images, from the image's size down; position i has stride 2**i, or had."""
    with torch.no_grad(), _in_evaluation(model.network) as network:
        found = network.encoder(_two_images(model))
    if isinstance(found, list) and all(isinstance(feature, Tensor) for feature in found):
        return found
    raise ValueError(
        f"model.args.arch: {model.arch} with encoder {model.encoder_name} has one stride throughout; early exits need "
        "stages of growing stride, as in fpn, unet or deeplabv3plus"
    )


def _stage(model: SmpModel, features: Sequence[Tensor], stride: int) -> int:
    strides = {2**stage: stage for stage, feature in enumerate(features) if stage and feature.shape[1]}
    if stride in strides:
        return strides[stride]
    raise ValueError(
        f"model.args.at: {model.arch} with encoder {model.encoder_name} has no stage of stride {stride}; "
        f"choose of {', '.join(map(str, strides))}"
    )


# The encoder as a list of calls --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """Stands in a call's arguments for what an earlier one gave."""

    name: str


class _Call(NamedTuple):
    """One call: of a layer of the encoder, a function, a method, or for one of the encoder's attributes."""

    name: str
    kind: str  # as torch.fx calls it
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def perform(self, encoder: nn.Module, values: dict[str, Any]) -> Any:
        args, kwargs = _mapped((self.args, self.kwargs), lambda given: values[given.name])
        if self.kind == "call_module":
            return encoder.get_submodule(self.target)(*args, **kwargs)
        if self.kind == "call_function":
            return self.target(*args, **kwargs)
        if self.kind == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        return operator.attrgetter(self.target)(encoder)

    def reads(self) -> list[str]:
        """The names of the values that it takes."""
        found: list[str] = []
        _mapped((self.args, self.kwargs), lambda given: found.append(given.name))
        return found


class _Part(NamedTuple):
    """What runs between one exit and the next."""

    images: str  # the name of the images
    calls: tuple[_Call, ...]
    results: tuple[str, ...]
    keeps: tuple[str, ...]  # what later parts read

    def run(self, encoder: nn.Module, given: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
        """The results, and what later parts read, of what this one reads."""
        values = dict(given)
        for call in self.calls:
            values[call.name] = call.perform(encoder, values)
        return [values[name] for name in self.results], {name: values[name] for name in self.keeps}


class _Recorder(fx.Tracer):
    """Records calls of whole layers; only what hands out several stages is looked into."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Whether a module is called as one; timm's wrappers that list features are not."""
        return not hasattr(module, "feature_info")

    def call_module(self, module: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A slice of a sequence of layers is no layer of the encoder; its members are."""
        if isinstance(module, nn.Sequential) and all(module is not known for known in self.root.modules()):
            return forward(*args, **kwargs)
        return super().call_module(module, forward, args, kwargs)


def _lazy_parts(model: SmpModel, stages: Sequence[int]) -> tuple[_Part, ...]:
    """The encoder up to each stage, and the rest of it. Raises ValueError if it cannot be taken apart."""
    try:
        with torch.no_grad(), _in_evaluation(model.network) as network:
            encoder, example = network.encoder, _two_images(model)
            images, calls, features = recorded = _recorded(encoder)
            carried = _carried(encoder, images, calls, example)
            parts = _split(images, calls, carried, [*([features[stage]] for stage in stages), features])
            reason = _difference(encoder, parts, stages, example)
            if _recorded(encoder.train()) != recorded:
                reason = "it takes other steps while it trains"
    except Exception as error:  # whatever an encoder's code does that a recording cannot hold
        reason = str(error).split(". ")[0].splitlines()[0] if str(error) else type(error).__name__
    if reason is None:
        return parts
    raise ValueError(
        f"model.args.encoder_name: {model.encoder_name} cannot be stopped between its stages ({reason}), so an early "
        "exit would save nothing; take another: all of SMP's own can (resnet, mobilenet_v2, efficientnet, mit, vgg, "
        "mobileone, ...), and most of timm's (of those tried, not hrnet, mvitv2, selecsls, twins and xception41)"
    )


def _recorded(encoder: nn.Module) -> tuple[str, list[_Call], list[str]]:
    """The name of the images, the calls in order, and the names of the features."""
    nodes = list(_Recorder().trace(encoder).nodes)
    calls = [
        _Call(node.name, node.op, node.target, *_mapped((tuple(node.args), dict(node.kwargs)), _as_value))
        for node in nodes
        if node.op not in ("placeholder", "output")
    ]
    return nodes[0].name, calls, [node.name for node in nodes[-1].args[0]]


def _as_value(given: Any) -> Any:
    return _Value(given.name) if isinstance(given, fx.Node) else given


def _mapped(given: Any, change: Callable[[Any], Any]) -> Any:
    """The same structure with every _Value (and fx.Node) in it changed."""
    if isinstance(given, _Value | fx.Node):
        return change(given)
    if isinstance(given, tuple | list):
        return (list if isinstance(given, list) else tuple)(_mapped(value, change) for value in given)
    if isinstance(given, dict):
        return {key: _mapped(value, change) for key, value in given.items()}
    if isinstance(given, slice):
        return slice(*(_mapped(value, change) for value in (given.start, given.stop, given.step)))
    return given


def _carried(encoder: nn.Module, images: str, calls: Sequence[_Call], example: Tensor) -> set[str]:
    """The values that hold something of each image: tensors made of the images, not sizes and not weights."""
    carried, values = {images}, {images: example}
    for call in calls:
        values[call.name] = call.perform(encoder, values)
        if collect(values[call.name]) and carried.intersection(call.reads()):
            carried.add(call.name)
    return carried


def _split(
    images: str, calls: Sequence[_Call], carried: set[str], results: Sequence[Sequence[str]]
) -> tuple[_Part, ...]:
    """Parts that each make their results of what the parts before have made.

    What is not carried is made anew in every part that reads it: the number of images changes in between.
    """
    by_name = {call.name: call for call in calls}
    made, runs, read, there = {images}, [], [], list[set[str]]()
    for wanted in results:
        needed, taken, pending = set(), set(), list(wanted)
        while pending:
            name = pending.pop()
            if name in made:
                taken.add(name)
            elif name not in needed:
                needed.add(name)
                pending += by_name[name].reads()
        runs.append(tuple(call for call in calls if call.name in needed))
        read.append(taken)
        made |= needed & carried
        there.append(set(made))
    later = [sorted(there[number] & set().union(*read[number + 1 :])) for number in range(len(runs))]
    return tuple(
        _Part(images, run, tuple(wanted), tuple(keeps)) for run, wanted, keeps in zip(runs, results, later, strict=True)
    )


def _difference(encoder: nn.Module, parts: Sequence[_Part], stages: Sequence[int], example: Tensor) -> str | None:
    """Why the parts are not the encoder; None when they are."""
    whole = encoder(example)
    is_last = stages[-1] == len(whole) - 1
    for part in parts[: len(parts) - is_last]:
        if not any(call.kind == "call_module" for call in part.calls):
            return "it makes several stages in one step"
    second, first = (torch.tensor([row], device=example.device) for row in (1, 0))
    for kept, kept_then in ((None, None), (second, first)):  # all go on; the second image goes on alone
        values: dict[str, Any] = {parts[0].images: example}
        for number, part in enumerate(parts):
            found, values = part.run(encoder, values)
            values = select(values, kept_then if number else kept)
        expected = [select(feature, kept) for feature in whole]
        if len(found) != len(expected) or not all(map(_close, found, expected)):
            return "its steps do not repeat it"
    return None


def _close(found: Any, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return not found.numel() or bool((found - expected).abs().max() <= 1e-3 * expected.abs().max())


def _two_images(model: SmpModel) -> Tensor:
    """Two images that differ, of a size that fits, without drawing from the random numbers of the training."""
    height, width = model.padded_size(64, 96)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, height, width, generator=generator).to(next(model.parameters()).device)


@contextmanager
def _in_evaluation(network: nn.Module) -> Iterator[Any]:
    modes = {module: module.training for module in network.modules()}
    try:
        yield network.eval()
    finally:
        for module, mode in modes.items():
            module.training = mode
