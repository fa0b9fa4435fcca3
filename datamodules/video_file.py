"""A video file, a camera or an RTSP address, decoded by PyAV.

PyAV brings FFmpeg with it, opens cameras and RTSP, and reads the header before anything is decoded. torchcodec wants
FFmpeg installed beside it and opens files only.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np

from dance_seg.errors import DataError
from dance_seg.normalise import downsampled
from dance_seg.sample import Frame
from datamodules.frame_checks import FrameChecks, Unreadable, checked
from datamodules.image_files import MAX_PIXELS
from datamodules.video import LabelledVideo, frame_range, positive, whole

_log = logging.getLogger(__name__)

ADDRESSES = ("rtsp://", "rtsps://")


class VideoFile(LabelledVideo):
    """A video without ground truth: the path of a file, the number of a camera, or an rtsp:// address.

    `frames_per_second` takes fewer frames than there are, by their time stamps; None takes all. `first` and `last`,
    both included, count the frames of the file from 0. `resolution` makes frames smaller, areas averaged. Frames are
    turned as the file's rotation says. `timeout` are the seconds after which a camera or address that says nothing is
    given up. A camera and an address cannot be rewound: `frames(start)` counts on from `start`; one that ends
    before `last` is lost: DataError.

    A file that ends before its header says ends there, with a warning; frames that are corrupt are left out, or end the
    stream, by `bad_frames`, see FrameChecks. Not every decoder says that a frame is corrupt. Raises DataError for what
    is missing, no video, without a picture, or has more than `max_pixels` pixels a frame, as its header says.
    """

    def __init__(
        self,
        path: str | int,
        frames_per_second: float | None = None,
        resolution: float = 1.0,
        first: int = 0,
        last: int | None = None,
        max_pixels: int = MAX_PIXELS,
        timeout: float = 10.0,
        bad_frames: str = "skip",
        changed_size: str = "resize",
        repeated: str = "keep",
    ) -> None:
        self.wanted_rate = None if frames_per_second is None else positive(frames_per_second, "frames_per_second")
        self.resolution = positive(resolution, "resolution", most=1.0)
        self.begin, self.end = frame_range(first, last)
        self.max_pixels, self.timeout = whole(max_pixels, "max_pixels", 1), positive(timeout, "timeout")
        self.checks = FrameChecks(bad_frames, changed_size, repeated)
        self.problems: Counter[str] = Counter()
        self.is_live = isinstance(path, int) or str(path).startswith(ADDRESSES)
        self.shown_as, self.address, self.device = _address(path)
        self.name = "camera" if self.device else "stream" if self.is_live else Path(self.address).stem
        with self._opened() as (_, stream):
            rate = self.own_rate = float(stream.average_rate or stream.guessed_rate or 25)
            in_file = int(stream.frames) or None
        self.frames_per_second = min(rate, self.wanted_rate or rate)
        self.num_frames = None
        if in_file is not None and not self.is_live:
            taken = len(range(in_file)[self.begin : self.end])
            self.num_frames = round(taken * self.frames_per_second / rate)

    def frames(self, start: int = 0) -> Iterator[Frame]:
        """The frames from number `start` on; see VideoSource."""
        self.problems = Counter()
        return checked(self._found(start), self.checks, start=start, problems=self.problems, name=self.shown_as)

    def _found(self, start: int) -> Iterator[Frame | Unreadable]:
        index, size_is_known, begun, slot = start - 1 if self.is_live else -1, False, None, -1
        for number, picture in enumerate(self._pictures()):
            if number < self.begin:
                continue
            if self.end is not None and number >= self.end:
                return
            if isinstance(picture, str):
                index += 1
                yield Unreadable(index, f"{self.shown_as}: frame {number} {picture}")
                continue
            # Raw H.264 holds no times; its frames then come at the rate that the file has, not at the one asked for.
            time = picture.time if picture.time is not None else number / self.own_rate
            begun = time if begun is None else begun
            seconds = max(0.0, time - begun)
            if self.wanted_rate is not None:
                # Each of the seconds' equal parts shows its first frame; a little more, since times are rounded.
                part = int(seconds * self.wanted_rate + 1e-3)
                if part <= slot:
                    continue
                slot = part
            index += 1
            if size_is_known and index < start - 1:
                continue  # decoded, since later frames build on it, and not converted
            size_is_known = True
            yield Frame(index, seconds, self._image(picture))

    def _image(self, picture: Any) -> np.ndarray:
        image: np.ndarray = picture.to_ndarray(format="rgb24")
        if self.resolution < 1:
            image = downsampled(image, self.resolution)
        quarters = round(picture.rotation / 90) % 4  # counter-clockwise
        return np.ascontiguousarray(np.rot90(image, quarters)) if quarters else image

    def _pictures(self) -> Iterator[Any]:
        """PyAV's frames in order of time; in the place of one that cannot be decoded, in words, why."""
        from av import FFmpegError

        with self._opened() as (container, stream):
            # Many decoders otherwise patch a damaged frame up with the one before it, without a word. Threads that each
            # decode a frame of their own would lose whole ones beside it, so those of a slice (the default) stay.
            stream.codec_context.options = {"err_detect": "crccheck+explode", "max_pixels": str(self.max_pixels)}
            number, packets = 0, container.demux(stream)
            while True:
                try:
                    packet = next(packets, None)
                except FFmpegError as error:
                    if self.is_live:
                        raise DataError(f"{self.shown_as}: lost after {number} frames: {_said(error)}") from None
                    _log.warning("%s: damaged after %d frames, and ends there: %s", self.shown_as, number, _said(error))
                    return
                if packet is None:
                    break
                try:
                    pictures: list[Any] = packet.decode()
                except FFmpegError as error:
                    pictures = [f"cannot be decoded: {_said(error)}"]
                for picture in pictures:
                    number += 1
                    is_corrupt = not isinstance(picture, str) and picture.is_corrupt
                    yield "is damaged" if is_corrupt else picture
            if self.is_live:
                raise DataError(f"{self.shown_as}: lost after {number} frames: it ended, and may come back")
            if number < stream.frames:
                _log.warning("%s: ends after %d of the %d frames it says", self.shown_as, number, stream.frames)

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        import av
        from av import FFmpegError

        av.logging.set_level(av.logging.PANIC)  # what is wrong is said by us
        options = {"max_pixels": str(self.max_pixels)}
        if self.device:
            arguments: dict[str, Any] = {"format": self.device, "timeout": self.timeout}
        elif self.is_live:
            options["rtsp_transport"] = "tcp"
            arguments = {"timeout": self.timeout}
        else:
            # A file can be a list that names others, here or on the network. It is opened by us, and nothing by FFmpeg.
            options["protocol_whitelist"] = "none"
            arguments = {}
        with ExitStack() as opened:
            try:
                given = self.address if self.is_live else opened.enter_context(open(self.address, "rb"))
                container = av.open(given, options=options, metadata_errors="replace", **arguments)
            except (FFmpegError, OSError, ValueError) as error:
                waited = f" (waited {self.timeout:g} s at most)" if self.is_live else ""
                what = "cannot be reached" if self.is_live else "is no video that can be read"
                raise DataError(f"{self.shown_as} {what}: {_said(error)}{waited}") from None
            opened.enter_context(container)
            if not container.streams.video:
                raise DataError(f"{self.shown_as} holds no picture, only {len(container.streams)} other streams")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise DataError(
                    f"{self.shown_as}: its frames are of a kind that FFmpeg cannot decode, or it is damaged"
                )
            height, width = stream.codec_context.height, stream.codec_context.width
            if height < 1 or width < 1:
                raise DataError(
                    f"{self.shown_as}: the size of its frames cannot be read: it is damaged, or they have more than "
                    f"data.args.max_pixels {self.max_pixels} pixels"
                )
            if height * width > self.max_pixels:
                raise DataError(
                    f"{self.shown_as} claims frames of {height}x{width} pixels, more than data.args.max_pixels "
                    f"{self.max_pixels}; raise it, or make the video smaller"
                )
            yield container, stream


def _address(path: str | int) -> tuple[str, str, str]:
    """How a source is called in messages, what FFmpeg opens, and by which of its devices ("" for none)."""
    if isinstance(path, bool) or not isinstance(path, str | int):
        raise ValueError(f"data.args.path is {path!r}; the path of a file, the number of a camera, or rtsp://...")
    if isinstance(path, int):
        if not 0 <= path < 100:
            raise ValueError(f"data.args.path is {path}; cameras count from 0")
        import sys

        name, device = {
            "darwin": (str(path), "avfoundation"),
            "win32": (f"video={path}", "dshow"),
        }.get(sys.platform, (f"/dev/video{path}", "v4l2"))
        if device == "v4l2" and not Path(name).exists():
            there = sorted(str(other) for other in Path("/dev").glob("video*"))
            raise DataError(f"{name} (camera {path}) is missing; there are: {', '.join(there) or 'no cameras'}")
        return f"camera {path}", name, device
    if path.startswith(ADDRESSES):
        return _without_password(path), path, ""
    if "://" in path:
        raise ValueError(f"data.args.path is {path!r}; of addresses only {' and '.join(ADDRESSES)} are opened")
    file = Path(path).expanduser()
    if "\0" in path or not file.exists():
        near = [other.name for other in file.parent.iterdir()] if "\0" not in path and file.parent.is_dir() else []
        close = get_close_matches(file.name, near, n=1)
        hint = f"did you mean {file.parent / close[0]}?" if close else "data.args.path names the film"
        raise DataError(f"{path!r} is missing; {hint}")
    if file.is_dir():
        raise DataError(f"{path} is a folder; for a folder of frames write data.name=video_folder data.args.images=...")
    if not file.is_file():
        raise DataError(f"{path} is not a regular file")
    return str(path), str(file), ""


def _without_password(address: str) -> str:
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _said(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
