"""Frames at their own pace: the queue is bounded, the policy says which are dropped, nobody waits for ever."""

import threading

import numpy as np
import pytest

from dance_seg.errors import DataError
from dance_seg.sample import Frame
from datamodules.paced import paced

IMAGE = np.zeros((2, 2, 3), np.uint8)


def frames(count, rate=None):
    for index in range(count):
        yield Frame(index, index / rate if rate else 0.0, IMAGE)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(("policy", "left"), [("drop_oldest", [7, 8, 9]), ("drop_newest", [0, 1, 2])])
def test_of_frames_that_nobody_takes_the_policy_keeps_as_many_as_the_queue_holds(policy, left):
    with paced(frames(10), queue=3, policy=policy, timeout=10) as stream:
        assert stream.wait_until_read(10)
        assert [frame.index for frame in stream] == left
        assert (stream.passed, stream.dropped) == (3, 7)


def test_frames_dropped_while_one_is_worked_on_count_when_the_next_is_taken():
    more = threading.Event()

    def in_two_parts():
        yield from frames(1)
        assert more.wait(10)
        yield from list(frames(5))[1:]

    with paced(in_two_parts(), queue=1, timeout=10) as stream:
        assert next(stream).index == 0
        more.set()
        assert stream.wait_until_read(10)
        assert stream.dropped == 0  # 1, 2 and 3 are gone, and who goes on after frame 0 would see them
        assert (next(stream).index, stream.dropped) == (4, 3)


def test_a_queue_without_a_bound_would_keep_every_frame():
    with paced(frames(10), queue=1000, timeout=10) as stream:
        assert stream.wait_until_read(10)
        assert [frame.index for frame in stream] == list(range(10))


def test_a_consumer_that_keeps_up_sees_every_frame_in_order():
    ready = threading.Semaphore(1)

    def one_at_a_time():
        for frame in frames(20):
            assert ready.acquire(timeout=10)
            yield frame

    seen = []
    with paced(one_at_a_time(), queue=1, timeout=10) as stream:
        for frame in stream:
            seen.append(frame.index)
            ready.release()
        assert stream.dropped == 0
    assert seen == list(range(20))


def test_the_delay_is_the_time_from_a_frames_arrival_to_its_being_taken():
    clock = Clock()
    with paced(frames(3), queue=3, clock=clock, timeout=10) as stream:
        assert stream.wait_until_read(10)
        clock.now += 0.5
        next(stream)
        assert stream.delay == 0.5
        clock.now += 0.25
        next(stream)
        assert (stream.delay, stream.longest_delay) == (0.75, 0.75)


def test_a_frame_does_not_come_before_its_time():
    clock = Clock()
    with paced(frames(2, rate=1 / 3600), clock=clock, timeout=0.2) as stream:  # the second is due in an hour
        assert next(stream).index == 0
        with pytest.raises(DataError, match=r"no frame came within 0.2 s after 1 frames"):
            next(stream)


def test_without_real_time_every_frame_is_seen_and_none_is_read_ahead():
    read = []

    def noted():
        for frame in frames(5):
            read.append(frame.index)
            yield frame

    stream = paced(noted(), realtime=False, queue=1)
    assert next(stream).index == 0
    assert read == [0]
    assert [frame.index for frame in stream] == [1, 2, 3, 4]
    assert (stream.passed, stream.dropped, stream.delay) == (5, 0, 0.0)


def test_an_error_of_the_source_comes_after_the_frames_before_it():
    def broken():
        yield from frames(2)
        raise DataError("film.mp4: lost")

    with paced(broken(), timeout=10) as stream:
        assert stream.wait_until_read(10)
        assert [next(stream).index, next(stream).index] == [0, 1]
        with pytest.raises(DataError, match=r"film.mp4: lost"):
            next(stream)
        with pytest.raises(StopIteration):
            next(stream)


def test_closing_ends_the_thread_and_closes_the_source():
    closed = []

    def endless():
        try:
            index = 0
            while True:
                yield Frame(index, index * 0.001, IMAGE)
                index += 1
        finally:
            closed.append(True)

    with paced(endless(), queue=2, timeout=10) as stream:
        next(stream)
    assert closed == [True]
    assert not stream._thread.is_alive()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"policy": "wait"}, "policy is 'wait'; choose drop_oldest or drop_newest"),
        ({"queue": 0}, "^queue is 0; at least 1"),
        ({"timeout": 0}, "^timeout is 0; a number of seconds above 0"),
    ],
)
def test_other_values_are_refused_in_words(given, message):
    with pytest.raises(ValueError, match=message):
        paced(frames(1), **given)
