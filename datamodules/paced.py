"""Frames at the pace of their own time: a thread fills a bounded queue, and who is too slow misses frames."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from dance_seg.errors import DataError
from dance_seg.sample import Frame

POLICIES = ("drop_oldest", "drop_newest")


def paced(
    frames: Iterable[Frame],
    *,
    realtime: bool = True,
    queue: int = 4,
    policy: str = "drop_oldest",
    timeout: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> "Paced":
    """Frames as a camera would give them, for a consumer that may be slower than the video.

    With realtime=False every frame is handed on when it is asked for, without a thread. Otherwise a frame arrives at
    its own time, `frame.seconds` after the first, and waits in a queue of at most `queue` frames. When that is full,
    drop_oldest lets go of the one that waited longest (what is shown is as new as can be), drop_newest of the one that
    arrives. The indices of the frames tell which are missing. `timeout` is the longest wait for a frame, in seconds.
    Raises ValueError for other values; iterating raises DataError when no frame comes in time, and what the frames
    raise, once the queue is empty.

    >>> source = [Frame(index, 0.0, None) for index in range(3)]
    >>> with paced(source, realtime=False) as stream:
    ...     print([frame.index for frame in stream], stream.dropped)
    [0, 1, 2] 0
    """
    if policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}; choose {' or '.join(POLICIES)}")
    if queue < 1:
        raise ValueError(f"queue is {queue}; at least 1 frame has to be able to wait")
    if not 0 < timeout <= 3600:
        raise ValueError(f"timeout is {timeout}; a number of seconds above 0 and at most 3600")
    return Paced(frames, realtime, queue, policy, timeout, clock)


class Paced:
    """An iterator of frames that knows how late each is; close it, or use it in a `with`, to end its thread."""

    def __init__(
        self,
        frames: Iterable[Frame],
        realtime: bool,
        queue: int,
        policy: str,
        timeout: float,
        clock: Callable[[], float],
    ) -> None:
        self.delay = 0.0  # seconds that the frame handed on last had waited since it arrived
        self.longest_delay = 0.0
        self.dropped = 0  # frames that nobody saw, up to when the last one was handed on
        self.passed = 0  # frames that were handed on
        self._frames = iter(frames)
        self._size, self._policy, self._timeout, self._clock = queue, policy, timeout, clock
        self._dropped = 0  # up to now
        self._waiting: deque[tuple[float, Frame]] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._is_over = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if realtime:
            self._thread = threading.Thread(target=self._fill, name="frames", daemon=True)
            self._thread.start()

    def __iter__(self) -> Iterator[Frame]:
        return self

    def __next__(self) -> Frame:
        if self._thread is None:
            frame = next(self._frames)
        else:
            arrived, frame = self._take()
            self.delay = max(0.0, self._clock() - arrived)
            self.longest_delay = max(self.longest_delay, self.delay)
        self.passed += 1
        return frame

    def _take(self) -> tuple[float, Frame]:
        with self._changed:
            in_time = self._changed.wait_for(lambda: self._waiting or self._is_over, self._timeout)
            # Those that are dropped from here on are not missing yet to who stops at this frame and goes on after it.
            self.dropped = self._dropped
            if self._waiting:
                return self._waiting.popleft()
            if not in_time:
                raise DataError(f"the stream: no frame came within {self._timeout:g} s after {self.passed} frames")
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            raise StopIteration

    def _fill(self) -> None:
        """The thread: wait for each frame's time, put it into the queue."""
        begun: float | None = None
        try:
            for frame in self._frames:
                now = self._clock()
                begun = now - frame.seconds if begun is None else begun
                if self._stop.wait(max(0.0, begun + frame.seconds - now)):
                    break
                self._put(frame)
        except BaseException as error:  # it belongs to who takes the frames
            self._error = error
        finally:
            close = getattr(self._frames, "close", None)
            if close is not None:
                close()
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _put(self, frame: Frame) -> None:
        with self._changed:
            if len(self._waiting) >= self._size:
                self._dropped += 1
                if self._policy == "drop_newest":
                    return
                self._waiting.popleft()
            self._waiting.append((self._clock(), frame))
            self._changed.notify_all()

    def wait_until_read(self, timeout: float) -> bool:
        """Wait, at most `timeout` seconds, until the last frame has been read; whether it was."""
        with self._changed:
            return self._thread is None or self._changed.wait_for(lambda: self._is_over, timeout)

    def close(self) -> None:
        """End the thread; frames that still wait are lost. Waits for a frame that is being read, `timeout` at most."""
        self._stop.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(self._timeout)
        with self._changed:
            self._waiting.clear()

    def __enter__(self) -> "Paced":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
