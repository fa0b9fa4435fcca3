"""Write a run's network as ONNX or safetensors: python -m tools.export RUN [--to onnx|safetensors|both] [key=value].

An ONNX file is run beside the network on validation images and put in place only when both agree. It takes RGB pixels,
uint8 (N, 3, H, W), and gives logits; what else a program needs to know is in its metadata (dance_seg.*). A network with
exits becomes a folder of files, one per exit, for images of one size. Overrides such as data.args.root=DIR say where
the images are; without them drawn pictures are used.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tools.cli import parser, run, write_json

if TYPE_CHECKING:
    import numpy as np

    from dance_seg.early_exit.exits import ExitNetwork


class Shown(NamedTuple):
    """What the file and the network are compared on."""

    images: "list[np.ndarray]"  # RGB uint8 (H, W, 3), as the network gets them
    labels: "list[np.ndarray]"  # train ids uint8 (H, W) at their own size; empty where there are none
    origin: str  # in words


def main() -> int:
    """Export, compare, and print what was found."""
    arguments_parser = parser(__doc__, figures=True)
    arguments_parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, such as runs/camvid_dense")
    arguments_parser.add_argument("overrides", metavar="key=value", nargs="*", help="such as data.args.root=DIR")
    arguments_parser.add_argument("--to", choices=("onnx", "safetensors", "both"), default="onnx", help="default: onnx")
    arguments_parser.add_argument("--out", metavar="DIR", type=Path, help="default: the run's folder export")
    arguments_parser.add_argument("--checkpoint", default="best", help="best, last or a path; default: best")
    arguments_parser.add_argument(
        "--size", metavar=("H", "W"), type=int, nargs=2, help="default: the training crop; with exits the images'"
    )
    arguments_parser.add_argument("--one-size", action="store_true", help="an ONNX file for --size only")
    arguments_parser.add_argument("--images", type=int, default=8, help="how many to compare on; default 8")
    arguments_parser.add_argument("--check", metavar="FILE", type=Path, help="compare this ONNX file, write none")
    arguments = arguments_parser.parse_intermixed_args()
    if arguments.size and min(arguments.size) < 1:
        raise ValueError(f"--size {arguments.size}: height and width in pixels, such as --size 360 480")
    if arguments.images < 1:
        raise ValueError(f"--images is {arguments.images}; at least one is needed to compare on")
    if arguments.run.is_file():
        raise ValueError(
            f"{arguments.run}: is a file; give the run folder that it came from, such as runs/camvid_dense, and "
            "--checkpoint for one of its checkpoints; python -m tools.predict takes files"
        )
    from dance_seg.build import load_run
    from dance_seg.early_exit.exits import ExitNetwork
    from dance_seg.export import check_onnx, drawn_images, export_onnx, export_safetensors

    model, record, path = load_run(arguments.run, arguments.checkpoint)
    size = tuple(arguments.size or record["recipe"]["data"]["args"].get("crop", (352, 480)))
    folder, name = arguments.out or arguments.run / "export", arguments.run.resolve().name
    figures: dict[str, Any] = {"checkpoint": str(path)}
    print(path)
    if arguments.check is None and arguments.to != "onnx":
        written = export_safetensors(model, folder / f"{name}.safetensors", record=record)
        print(f"written to {written}: {written.stat().st_size / 1e6:.1f} MB, weights and the record that rebuilds them")
        figures["safetensors"] = str(written)
    if isinstance(model, ExitNetwork) and (arguments.check is not None or arguments.to != "safetensors"):
        shown = shown_images(record, arguments.overrides, arguments.images, size)
        written = arguments.check or folder / f"{name}_stages"
        given = tuple(arguments.size) if arguments.size else None
        figures |= stages(model, record, written, shown, given, write=arguments.check is None)
    elif arguments.check is not None or arguments.to != "safetensors":
        if arguments.one_size:
            shown = Shown(drawn_images([size]), [], "a drawn picture of that size")  # validation has other sizes
        else:
            shown = shown_images(record, arguments.overrides, arguments.images, size)
        file = arguments.check or folder / f"{name}.onnx"
        if arguments.check is not None:
            found = check_onnx(model, file, shown.images, shown.labels)
        else:
            found = export_onnx(
                model,
                file,
                input_size=size,
                record=record,
                images=shown.images,
                labels=shown.labels,
                any_size=not arguments.one_size,
            )
        done = "compared with" if arguments.check is not None else "written to"
        print(f"{done} {file}: {file.stat().st_size / 1e6:.1f} MB, compared on {shown.origin}")
        print(f"  the same class on {found.argmax:.6f} of {found.pixels} pixels")
        print(
            f"  largest difference of a logit {found.largest_difference:.2g}, largest logit {found.largest_logit:.3g}"
        )
        if found.miou_network is not None and found.miou_file is not None:
            print(f"  mIoU on these images: network {found.miou_network:.4f}, file {found.miou_file:.4f}")
        times = latency(model, file, size)
        ours, eager = times["onnxruntime_ms"], times["eager_ms"]
        print(
            f"  {ours:.1f} ms by onnxruntime ({times['provider']}), {eager:.1f} ms by torch, "
            f"{times['onnxruntime_vs_eager_ms']:.2f} of it: {size[0]}x{size[1]}, {times['threads']} threads"
        )
        figures |= {"onnx": str(file), "compared_on": shown.origin, **asdict(found), **times}
    write_json(arguments.json, figures)
    return 0


def stages(
    model: "ExitNetwork",
    record: dict[str, Any],
    folder: Path,
    shown: Shown,
    size: tuple[int, int] | None,
    *,
    write: bool,
) -> dict[str, Any]:
    """Write the stages of a network with exits, or check those that are there; print and return what was found.

    The size is that of the first image shown where none is given, since the files take no other.
    """
    from dance_seg.export import Sizes, drawn_images
    from dance_seg.export_exits import StagesOnnx, check_stages, export_stages

    if not write:
        size = StagesOnnx(folder).sizes.only
    rows, columns, *_ = size or shown.images[0].shape
    padded = Sizes(model.stride, model.minimum_size).padded
    images = [image for image in shown.images if padded(*image.shape[:2]) == padded(rows, columns)]
    origin = (
        shown.origin if len(images) == len(shown.images) else f"those of this size, {len(images)}, of {shown.origin}"
    )
    if not images:
        images, origin = drawn_images([(rows, columns)] * len(shown.images)), "drawn pictures, none other has this size"
    if write:
        found = export_stages(model, folder, record=record, size=(rows, columns), images=images)
    else:
        found = check_stages(model, folder, images)
    times = stage_times(model, folder, (rows, columns))
    done = "written to" if write else "compared with"
    print(f"{done} {folder}: {len(found)} stages for images of {rows}x{columns}, compared on {origin}")
    print("  exit      MB  same class  largest difference  largest logit  ms by onnxruntime  ms by torch")
    for number, (each, files, torchs) in enumerate(
        zip(found, times["onnxruntime_ms"], times["eager_ms"], strict=True), 1
    ):
        megabytes = (folder / f"stage_{number}.onnx").stat().st_size / 1e6
        print(
            f"  {number:4}  {megabytes:6.1f}  {each.argmax:10.6f}  {each.largest_difference:18.2g}  "
            f"{each.largest_logit:13.3g}  {files:17.1f}  {torchs:11.1f}"
        )
    return {"onnx": str(folder), "compared_on": origin, "exits": [asdict(each) for each in found], **times}


def shown_images(record: dict[str, Any], overrides: Sequence[str], number: int, size: tuple[int, int]) -> Shown:
    """Images of the split that the run validated on, spread over it; drawn ones where the data is not there."""
    import numpy as np

    from dance_seg.export import drawn_images
    from dance_seg.recipe import recipe_from_record
    from datamodules import build_datamodule

    recipe = recipe_from_record(record["recipe"], overrides=overrides)
    try:
        datamodule = build_datamodule(recipe)
        split = datamodule.validate_on
        source = datamodule.source(split)
    except (ValueError, OSError) as error:
        if overrides:
            raise  # the user said where the data is
        reason = " ".join(str(error).split())
        return Shown(
            drawn_images([size] * number), [], f"{number} drawn pictures, since the data is not there ({reason})"
        )
    if list(datamodule.classes) != record["labels"]["classes"]:
        raise ValueError(
            f"the run was trained on the classes {', '.join(record['labels']['classes'])}; the data has "
            f"{', '.join(datamodule.classes)}"
        )
    from datamodules.transforms import EvaluationImages

    loaded = EvaluationImages(source, datamodule.resolution)
    chosen = np.unique(np.linspace(0, len(loaded) - 1, min(number, len(loaded))).round().astype(int))
    batches = [loaded[int(index)] for index in chosen]
    return Shown(
        [batch.images[0].permute(1, 2, 0).numpy() for batch in batches],
        [batch.labels[0].numpy() for batch in batches],
        f"{len(batches)} images of {recipe.data.name} {split} at resolution {datamodule.resolution:g}",
    )


def latency(model: Any, file: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Milliseconds of one forward by onnxruntime and by torch on the CPU, taking turns; medians."""
    import statistics

    import numpy as np
    import torch

    from dance_seg.cost.latency import interleave
    from dance_seg.export import OnnxFile, drawn_images
    from dance_seg.normalise import normalise

    threads = torch.get_num_threads()
    opened, model = OnnxFile(file, threads=threads), model.cpu().eval()
    pixels = np.ascontiguousarray(drawn_images([size])[0].transpose(2, 0, 1)[None])
    tensor = torch.from_numpy(pixels)
    with torch.inference_mode():
        sides = {"onnxruntime": lambda: opened.logits(pixels), "eager": lambda: model(normalise(tensor))}
        times = {side: [1000 * second for second in seconds] for side, seconds in interleave(sides, 7, 2).items()}
    pairs = zip(times["onnxruntime"], times["eager"], strict=True)
    return {
        "onnxruntime_ms": statistics.median(times["onnxruntime"]),
        "eager_ms": statistics.median(times["eager"]),
        "onnxruntime_vs_eager_ms": statistics.median(ours / eager for ours, eager in pairs),
        "latency_size": list(size),
        "threads": threads,
        "provider": opened.provider,
    }


def stage_times(model: "ExitNetwork", folder: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Milliseconds to each exit's logits by onnxruntime and by torch on the CPU, taking turns; medians."""
    import statistics
    from contextlib import closing

    import numpy as np
    import torch

    from dance_seg.cost.latency import interleave
    from dance_seg.export import drawn_images
    from dance_seg.export_exits import StagesOnnx
    from dance_seg.normalise import normalise

    threads = torch.get_num_threads()
    sides = {"onnxruntime": StagesOnnx(folder, threads=threads), "eager": model.cpu().eval()}
    images = normalise(torch.from_numpy(np.ascontiguousarray(drawn_images([size])[0].transpose(2, 0, 1)[None])))

    def come_to(exit: int, network: Any) -> None:
        with closing(network.exits(images, [place == exit for place in range(model.num_exits)])) as walk:
            for _ in range(exit + 1):
                next(walk)

    calls = {
        f"{side} {exit}": partial(come_to, exit, network)
        for exit in range(model.num_exits)
        for side, network in sides.items()
    }
    with torch.inference_mode():
        seconds = interleave(calls, 7, 2)
    milliseconds = {
        f"{side}_ms": [1000 * statistics.median(seconds[f"{side} {exit}"]) for exit in range(model.num_exits)]
        for side in sides
    }
    return {**milliseconds, "latency_size": list(size), "threads": threads}


if __name__ == "__main__":
    run(main)
