"""Label pictures and films: python -m tools.predict RUN-or-CHECKPOINT-or-ONNX SOURCE... --out DIR [--overlay 0.5].

A SOURCE is an image (PNG or JPEG), a film, or a folder of either. Written are, for NAME.png, NAME_labels.png, whose
indices are the train ids and whose colours the data set's, and NAME_overlay.png, the image beside its labels with their
names; for NAME.mp4, NAME_overlay.mp4. A file that cannot be used is named and left out, and the exit status is 1.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tools.cli import parser, run

if TYPE_CHECKING:
    import numpy as np

    from dance_seg.predict import Predictor

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")


class Work(NamedTuple):
    """A file to label, and where what comes of it goes: OUT/NAME without ending."""

    source: Path
    target: Path

    @property
    def is_video(self) -> bool:
        """Whether it is a film, by its ending."""
        return self.source.suffix.lower() in VIDEO_SUFFIXES


def main() -> int:
    """Label every source; say how many could not be used."""
    arguments_parser = parser(__doc__)
    arguments_parser.add_argument(
        "network",
        metavar="RUN",
        type=Path,
        help="a run folder, .ckpt, .safetensors or .onnx file, or folder of stages",
    )
    arguments_parser.add_argument("sources", metavar="SOURCE", type=Path, nargs="+", help="images, films or folders")
    arguments_parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="where to write")
    arguments_parser.add_argument("--checkpoint", default="best", help="of a run: best, last or a path; default: best")
    arguments_parser.add_argument("--overlay", metavar="SHARE", type=float, default=0.5, help="of colour; default 0.5")
    arguments_parser.add_argument("--resolution", type=float, help="of the images' size; default: the recipe's")
    arguments_parser.add_argument("--deadline-ms", type=float, metavar="N", help="with exits: an answer by then")
    arguments_parser.add_argument("--masks", action="store_true", help="also a label picture for each frame of a film")
    arguments = arguments_parser.parse_args()
    if not 0 <= arguments.overlay <= 1:
        raise ValueError(f"--overlay is {arguments.overlay:g}; from 0, the image alone, to 1, the colours alone")
    work = find_work(arguments.sources, arguments.out)
    from tqdm import tqdm

    from dance_seg.checkpoint import check_writable
    from dance_seg.predict import legend, load_predictor

    predictor = load_predictor(
        arguments.network,
        checkpoint=arguments.checkpoint,
        resolution=arguments.resolution,
        deadline_ms=arguments.deadline_ms,
    )
    check_writable(arguments.out)
    print(
        f"{predictor.path}: {len(predictor.classes)} classes, resolution {predictor.resolution:g}, {predictor.runs_on}"
    )
    failed = 0
    for each in tqdm(work, desc="predict", unit="file", disable=len(work) == 1 and work[0].is_video):
        try:
            if each.is_video:
                label_film(each, predictor, arguments.overlay, masks=arguments.masks)
            else:
                label_image(each, predictor, arguments.overlay)
        except ValueError as error:
            failed += 1
            tqdm.write(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    write_picture(arguments.out / "legend.png", legend(predictor.classes, predictor.palette, 320))
    print(f"{len(work) - failed} of {len(work)} labelled, in {arguments.out}")
    if failed:
        print(f"error: {failed} of {len(work)} could not be used; they are named above", file=sys.stderr)
    return 1 if failed else 0


def find_work(sources: Sequence[Path], out: Path) -> list[Work]:
    """The files that the sources name, in order, each with its place under `out`; what was written there is left out.

    Raises ValueError for a source that is not there or holds nothing, and where two files would be written to one.
    """
    from datamodules.image_files import IMAGE_SUFFIXES

    work = []
    for source in sources:
        if source.is_dir():
            found = [
                path
                for path in sorted(source.rglob("*"))
                if path.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
                and path.is_file()
                and not path.name.startswith(".")
                and not path.resolve().is_relative_to(out.resolve())
            ]
            if not found:
                endings = ", ".join((*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
                raise ValueError(f"{source}: no images or films found; files ending in {endings} are looked for")
            work += [Work(path, (out / path.relative_to(source)).with_suffix("")) for path in found]
        elif source.is_file():
            work.append(Work(source, out / source.stem))
        else:
            raise ValueError(f"{source}: no such file or folder; give images, films or folders of them")
    taken: dict[Path, Path] = {}
    for source, target in work:
        if target in taken:
            raise ValueError(
                f"{taken[target]} and {source} would both be written to {target}_labels.png; label them with another "
                "--out each"
            )
        taken[target] = source
    return work


def label_image(work: Work, predictor: "Predictor", opacity: float) -> None:
    """Write the labels of an image and a figure to look at. Raises DataError for a file that cannot be used."""
    from dance_seg.predict import figure, palette_picture
    from datamodules.image_files import exif_orientation, read_image

    image = read_image(work.source)
    labels = predictor(image, str(work.source))
    if exif_orientation(work.source) != 1:
        said = "is to be shown turned (EXIF); it was labelled as it is stored, as training and evaluation read images"
        print(f"{work.source} {said}", file=sys.stderr)
    work.target.parent.mkdir(parents=True, exist_ok=True)
    palette_picture(labels, predictor.palette).save(f"{work.target}_labels.png")
    write_picture(Path(f"{work.target}_overlay.png"), figure(image, labels, predictor, opacity))


def label_film(work: Work, predictor: "Predictor", opacity: float, *, masks: bool) -> int:
    """Write a film with the labels laid over it, and with `masks` each frame's labels; returns the number of frames.

    Raises DataError for a film that cannot be read, and then leaves no half of one.
    """
    import cv2
    from tqdm import tqdm

    from dance_seg.errors import DataError
    from dance_seg.predict import label_video, palette_picture
    from datamodules.video_file import VideoFile

    # Not cv2.VideoCapture: a film can be a list that names other files, and OpenCV would open them.
    film = VideoFile(str(work.source))
    promised, rate = film.num_frames or 0, film.frames_per_second
    work.target.parent.mkdir(parents=True, exist_ok=True)
    whole, partial = Path(f"{work.target}_overlay.mp4"), work.target.with_name(f".{work.target.name}.partial.mp4")
    writer, number = None, 0
    frames = (frame.image for frame in film.frames())
    progress = tqdm(frames, total=promised or None, desc=work.source.name, unit="frame", leave=False)
    try:
        for labels, shown in label_video(progress, predictor, opacity):
            if writer is None:
                size = (shown.shape[1], shown.shape[0])
                code = cv2.VideoWriter.fourcc(*"mp4v")
                writer = cv2.VideoWriter(str(partial), code, rate if 0 < rate < 1000 else 25.0, size)
                if not writer.isOpened():
                    raise OSError(f"{whole}: cannot be written: OpenCV has no MPEG-4 encoder here, or the disk is full")
            writer.write(cv2.cvtColor(shown, cv2.COLOR_RGB2BGR))
            if masks:
                folder = Path(f"{work.target}_labels")
                folder.mkdir(exist_ok=True)
                palette_picture(labels, predictor.palette).save(folder / f"{number:06d}.png")
            number += 1
        if writer is None:
            raise DataError(
                f"{work.source}: no film that can be read: damaged, empty, or of a kind FFmpeg does not know"
            )
        writer.release()
        partial.replace(whole)
    finally:
        if writer is not None:
            writer.release()
        partial.unlink(missing_ok=True)
    if number < promised - 1:  # headers are often off by one
        raise DataError(
            f"{work.source}: ends after {number} of {promised} frames: it is cut off or damaged; {whole} has what is "
            "there"
        )
    return number


def write_picture(path: Path, picture: "np.ndarray") -> None:
    """Write an RGB picture."""
    from PIL import Image

    Image.fromarray(picture).save(path, compress_level=1)


if __name__ == "__main__":
    run(main)
