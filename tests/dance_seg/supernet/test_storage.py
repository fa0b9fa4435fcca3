"""A search that is killed, shared or given the wrong file."""

import json
import multiprocessing
import os
import signal
import time
from collections import Counter
from threading import Event, Thread

import pytest

from dance_seg.errors import DataError
from dance_seg.supernet import storage as storage_module
from dance_seg.supernet.front import Front, front
from dance_seg.supernet.search import Budget, Evolution, evolve, random_search
from dance_seg.supernet.space import SearchSpace
from dance_seg.supernet.storage import Store, is_dead, this_process
from tests.dance_seg.supernet.toy_space import BUDGET, SMALL, SPACE, cost, places, score

FRONT = Front(population=6, generations=4)
UNDISTURBED = evolve(SPACE, cost, score, BUDGET, SMALL)
NUM = len(UNDISTURBED.history)

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def started(call, *args):
    """A process that makes the call."""
    process = multiprocessing.get_context("fork").Process(target=call, args=args)
    process.start()
    return process


def logged(log, subnet):
    """The score, after a line in a log of what was judged."""
    with open(log, "a") as file:
        file.write(f"{subnet}\n")
    return score(subnet)


def killed_at(path, log, number):
    """A search that is killed while it judges its candidate `number`."""
    judged = []

    def last(subnet):
        judged.append(subnet)
        if len(judged) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return logged(log, subnet)

    evolve(SPACE, cost, last, BUDGET, SMALL, storage=path)


def same(found):
    assert places(found.history) == places(UNDISTURBED.history)
    assert found.best == UNDISTURBED.best


# Killed


@needs_fork
@pytest.mark.parametrize("number", range(1, NUM + 1))
def test_killed_at_any_candidate_and_started_again_it_finds_the_same(tmp_path, number):
    path, log = tmp_path / "search.journal", tmp_path / "log"
    process = started(killed_at, path, log, number)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    same(evolve(SPACE, cost, lambda subnet: logged(log, subnet), BUDGET, SMALL, storage=path))
    # What was judged before the kill was not judged again.
    assert Counter(log.read_text().splitlines()) == Counter(str(one.subnet) for one in UNDISTURBED.history)


@needs_fork
def test_killed_again_and_again_it_comes_to_the_end(tmp_path):
    path, log = tmp_path / "search.journal", tmp_path / "log"
    for _ in range(NUM // 2):
        process = started(killed_at, path, log, 3)
        process.join()
    same(evolve(SPACE, cost, score, BUDGET, SMALL, storage=path))
    assert max(Counter(log.read_text().splitlines()).values()) == 1


def test_a_line_that_a_killed_process_did_not_finish_costs_nothing(tmp_path):
    path = tmp_path / "search.journal"
    interrupted_at(path, 5)
    path.write_bytes(path.read_bytes() + b'{"op_code": 4, "worker_id": "ab')
    same(evolve(SPACE, cost, score, BUDGET, SMALL, storage=path))
    assert all(json.loads(line) for line in path.read_text().splitlines())


def interrupted_at(path, number):
    """A search in which judging the candidate `number` raises."""
    judged = []

    def failing(subnet):
        judged.append(subnet)
        if len(judged) == number:
            raise KeyboardInterrupt
        return score(subnet)

    with pytest.raises(KeyboardInterrupt):
        evolve(SPACE, cost, failing, BUDGET, SMALL, storage=path)


@pytest.mark.parametrize("number", [1, 6, 7, NUM])
def test_after_an_error_the_same_process_goes_on(tmp_path, number):
    interrupted_at(tmp_path / "search.journal", number)
    same(evolve(SPACE, cost, score, BUDGET, SMALL, storage=tmp_path / "search.journal"))


def test_a_finished_search_is_read_without_asking_for_costs_or_scores(tmp_path):
    def never(subnet):
        raise AssertionError(subnet)

    evolve(SPACE, cost, score, BUDGET, SMALL, storage=tmp_path / "search.journal")
    same(evolve(SPACE, never, never, BUDGET, SMALL, storage=tmp_path / "search.journal"))


def test_a_search_may_go_on_for_more_generations(tmp_path):
    path = tmp_path / "new folder" / "search.journal"
    few = Evolution(**{**vars(SMALL), "iterations": 2})
    assert len(evolve(SPACE, cost, score, BUDGET, few, storage=path).history) == 10
    same(evolve(SPACE, cost, score, BUDGET, SMALL, storage=path))
    assert len(evolve(SPACE, cost, score, BUDGET, few, storage=path).history) == 10


@needs_fork
def test_a_killed_front_goes_on_to_the_same_front(tmp_path):
    whole = front(SPACE, cost, score, FRONT)

    def killed(number):
        judged = []

        def last(subnet):
            judged.append(subnet)
            if len(judged) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return score(subnet)

        front(SPACE, cost, last, FRONT, storage=tmp_path / f"{number}.journal")

    for number in (1, 7, 18):
        started(killed, number).join()
        found = front(SPACE, cost, score, FRONT, storage=tmp_path / f"{number}.journal")
        assert places(found.history) == places(whole.history)
        assert places(found.front) == places(whole.front)


@needs_fork
@pytest.mark.parametrize("protection", ["is_dead", "cut_torn_line"])
def test_without_its_protection_a_killed_search_would_not_go_on(tmp_path, monkeypatch, protection):
    """The control: nobody looks whether who judges still lives, or leaves half a line in the file."""
    path, log = tmp_path / "search.journal", tmp_path / "log"
    started(killed_at, path, log, 5).join()
    if protection == "cut_torn_line":
        path.write_bytes(path.read_bytes() + b'{"op_code": 4, "worker_id": "ab')
    monkeypatch.setattr(storage_module, protection, lambda _: False)

    class Waiting(Exception):
        pass

    def wait(_seconds):
        raise Waiting

    monkeypatch.setattr(storage_module.time, "sleep", wait)
    with pytest.raises((Waiting, ValueError)):
        evolve(SPACE, cost, score, BUDGET, SMALL, storage=path)


# Shared


@needs_fork
@pytest.mark.parametrize("seed", [0, 1])
def test_processes_on_one_storage_judge_every_candidate_once_and_find_the_same(tmp_path, seed):
    path, log = tmp_path / "search.journal", tmp_path / "log"

    def take_part(place):
        def slow(subnet):
            time.sleep(0.002 * (1 + (hash(str(subnet)) + place) % 5))
            return logged(log, subnet)

        found = evolve(SPACE, cost, slow, BUDGET, SMALL, seed=seed, storage=path)
        (tmp_path / f"found{place}").write_text(repr(places(found.history)))

    processes = [started(take_part, place) for place in range(3)]
    for process in processes:
        process.join()
    alone = evolve(SPACE, cost, score, BUDGET, SMALL, seed=seed)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert Counter(log.read_text().splitlines()) == Counter(str(one.subnet) for one in alone.history)
    for place in range(3):
        assert (tmp_path / f"found{place}").read_text() == repr(places(alone.history))


@needs_fork
def test_what_a_killed_process_was_judging_is_judged_by_the_other(tmp_path):
    path, log = tmp_path / "search.journal", tmp_path / "log"
    process = started(killed_at, path, log, 4)
    found = evolve(SPACE, cost, lambda subnet: time.sleep(0.005) or score(subnet), BUDGET, SMALL, storage=path)
    process.join()
    same(found)


def claimed(path, judge):
    """A store in which a process of another machine judges the first candidate."""
    interrupted_at(path, 1)
    store = Store(path, SPACE, identity_in(path))
    import optuna

    said = {
        "generation": 0, "index": 0, "subnet": UNDISTURBED.history[0].subnet.as_record(),
        "cost": 1.0, "judge": judge, "beats": 0,
    }  # fmt: skip
    trial = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, user_attrs=said)
    return store, store.storage.create_new_trial(store.study, template_trial=trial)


def identity_in(path):
    record = next(json.loads(line) for line in path.read_text().splitlines() if '"search":' in line)
    return {name: value for name, value in record["user_attr"]["search"].items() if name != "space"}


def test_a_process_of_another_machine_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "PATIENCE_S", 0.1)
    claimed(tmp_path / "search.journal", {"machine": "elsewhere", "process": os.getpid(), "began": 1})
    same(evolve(SPACE, cost, score, BUDGET, SMALL, storage=tmp_path / "search.journal"))


def test_a_process_that_shows_signs_of_life_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "PATIENCE_S", 0.5)
    path = tmp_path / "search.journal"
    store, trial = claimed(path, {"machine": "elsewhere", "process": os.getpid(), "began": 1})
    over, judged = Event(), []

    def live_and_finish():
        import optuna

        for beats in range(1, 11):  # for twice as long as patience lasts
            over.wait(0.1)
            store.storage.set_trial_user_attr(trial, "beats", beats)
        store.storage.set_trial_state_values(trial, optuna.trial.TrialState.COMPLETE, [score(first)])

    first = UNDISTURBED.history[0].subnet
    thread = Thread(target=live_and_finish)
    thread.start()
    found = evolve(SPACE, cost, lambda one: judged.append(one) or score(one), BUDGET, SMALL, storage=path)
    thread.join()
    assert first not in judged
    assert [one.subnet for one in found.history] == [one.subnet for one in UNDISTURBED.history]


def test_a_long_judgement_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "PATIENCE_S", 0.02)
    path = tmp_path / "search.journal"
    seen, deadline = [], time.monotonic() + 10

    def slow(subnet):
        while not seen and time.monotonic() < deadline:
            time.sleep(0.01)
            seen.extend(line for line in path.read_text().splitlines() if '"beats":1' in line.replace(" ", ""))
        return score(subnet)

    same(evolve(SPACE, cost, slow, BUDGET, SMALL, storage=path))
    assert seen


def test_who_was_thought_dead_and_finishes_late_changes_nothing(tmp_path):
    path, judged = tmp_path / "search.journal", []

    def stalled(subnet):
        judged.append(subnet)
        if len(judged) == 3:  # somebody else gives our candidate up while we judge it
            store = Store(path, SPACE, identity_in(path))
            store._give_up(store._living(0)[2]._trial_id)
            return 1000.0
        return score(subnet)

    same(evolve(SPACE, cost, stalled, BUDGET, SMALL, storage=path))
    assert judged[2] == judged[3]


@needs_fork
def test_a_killed_process_is_dead_even_before_anybody_asked_how_it_ended():
    process = started(time.sleep, 60)
    here = {**this_process(), "process": process.pid, "began": storage_module.state_and_begin(process.pid)[1]}
    assert not is_dead(here)
    assert is_dead({**here, "began": -1})  # its number was given to another process
    assert not is_dead({**here, "machine": "elsewhere"})
    os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not is_dead(here) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert is_dead(here)  # still a zombie
    process.join()
    assert is_dead(here)


# Wrong


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"budget": Budget(140)}, "budget is {'limit': 300, 'unit': 'MACs'} there and {'limit': 140"),
        ({"options": Evolution(**{**vars(SMALL), "parents": 3})}, "options is"),
        ({"about": {"checkpoint": "b"}}, "about checkpoint is None there and 'b' here"),
        ({"about": {"latency": "0123456789abcdef"}}, "about latency is None there and '0123456789abcdef' here"),
        ({"about": {"statistics_images": 32}}, "about statistics_images is None there and 32 here"),
        ({"space": SearchSpace({**SPACE.values, "place5": (1, 2, 3)})}, "space is"),
    ],
)
def test_the_storage_of_another_search_is_refused(tmp_path, other, says):
    path = tmp_path / "search.journal"
    given = {"space": SPACE, "budget": BUDGET, "options": SMALL}
    evolve(**given, cost=cost, score=score, storage=path)
    before = path.read_bytes()
    with pytest.raises(DataError, match="belongs to another search") as error:
        evolve(**{**given, **other}, cost=cost, score=score, storage=path)
    assert str(error.value).startswith(str(path))
    assert says in str(error.value)
    assert path.read_bytes() == before


def test_a_search_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "search.journal"
    evolve(SPACE, cost, score, BUDGET, SMALL, storage=path)
    with pytest.raises(DataError, match="method is 'evolution' there and 'random search' here"):
        random_search(SPACE, cost, score, BUDGET, SMALL, storage=path)
    with pytest.raises(DataError, match="method is 'evolution' there and 'front' here"):
        front(SPACE, cost, score, FRONT, storage=path)


@pytest.mark.parametrize("content", ["hello", "hello\n", "{}\n{}\n", '{"op_code": 0}\n{}\n'])
def test_a_file_that_is_no_storage_is_refused_and_left_as_it_is(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(DataError, match=r"notes\.txt: .*name another file"):
        evolve(SPACE, cost, score, BUDGET, SMALL, storage=path)
    assert path.read_text() == content


def test_a_folder_and_a_study_of_somebody_else_are_refused(tmp_path):
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    with pytest.raises(DataError, match="is a folder"):
        evolve(SPACE, cost, score, BUDGET, SMALL, storage=tmp_path)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.journal")))
    optuna.create_study(study_name="theirs", storage=storage)
    with pytest.raises(DataError, match="holds theirs"):
        evolve(SPACE, cost, score, BUDGET, SMALL, storage=tmp_path / "study.journal")


def test_costs_that_change_between_processes_are_refused(tmp_path):
    path = tmp_path / "search.journal"
    interrupted_at(path, 8)  # in the second generation
    with pytest.raises(DataError, match="costs must depend on the network alone"):
        evolve(SPACE, lambda subnet: 635 - cost(subnet), score, BUDGET, SMALL, storage=path)


def test_an_error_while_a_journal_is_mended_leaves_no_lock(tmp_path, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("dance_seg.supernet.storage.cut_torn_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evolve(SPACE, cost, score, BUDGET, SMALL, storage=tmp_path / "search.journal")
    assert (tmp_path / "search.journal").exists()
    assert not list(tmp_path.glob("*.lock"))
