"""The judged candidates of a search, in memory or in a file that several processes share and that outlives them.

The file is an Optuna journal, so that Optuna's tools read it too: one study, one trial for each candidate that
somebody began to judge. A candidate has a place, (generation, index), and whose trial is the first living one of a
place may judge it. Optuna leaves trials of killed processes running for ever, and its heartbeat needs a database, so
trials say here who judges them: a process that is known to be dead, or was not heard of for a while, loses its place.
"""

import json
import math
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, NamedTuple

from dance_seg.errors import DataError, first_line, short
from dance_seg.supernet.space import SearchSpace, Subnet

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

STUDY = "search"
PATIENCE_S = 120.0
"""After so long without a sign of life from another machine's process, its candidate is judged by somebody else."""

SHORTEST_WAIT_S, LONGEST_WAIT_S = 0.01, 1.0
LINE_BEGINS = b'{"op_code"'


class Proposal(NamedTuple):
    """A network to judge, and its cost."""

    subnet: Subnet
    cost: float


class Scored(NamedTuple):
    """A score, higher is better, and plain data to keep beside it, such as the thresholds it was reached with."""

    score: float
    details: Mapping[str, Any] = {}


class Candidate(NamedTuple):
    """A judged network."""

    generation: int
    number: int  # in its generation
    subnet: Subnet
    cost: float
    score: float
    details: Mapping[str, Any] = {}

    def as_record(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**self._asdict(), "subnet": self.subnet.as_record(), "details": dict(self.details)}


Score = Callable[[Subnet], float | Scored]


class Store:
    """The candidates of one search. `path` None keeps them in memory.

    `identity` is plain data that tells this search from any other: only a file with an equal one is gone on with.
    Raises DataError, naming the file, for a file of another search or one that is none.
    """

    def __init__(self, path: str | Path | None, space: SearchSpace, identity: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path).absolute()
        self.space = space
        self.identity = json.loads(json.dumps({"space": space.as_record(), **identity}))
        self.storage = in_memory() if self.path is None else open_journal(self.path)
        self.study = self._begin()
        self.finished: dict[tuple[int, int], Candidate] = {}
        self._settled = 0  # trials before this one are over and were looked at
        self._heard: dict[int, tuple[int, float]] = {}  # trial -> its beats, and when there was last a new one

    def __str__(self) -> str:
        return "the search in memory" if self.path is None else str(self.path)

    def closed(self, generation: int) -> int | None:
        """How many candidates were proposed in a generation; None when nobody has yet."""
        with self._reading():
            num = self.storage.get_study_user_attrs(self.study).get(f"generation {generation}")
            if num is not None and not isinstance(num, int):
                raise TypeError(f"generation {generation} has {short(num)} candidates")
            return num

    def close(self, generation: int, num: int) -> None:
        """Write how many candidates a generation has.

        Raises DataError when another process, or this one before it was killed, proposed another number.
        """
        self._check_identity()
        before = self.closed(generation)
        if before is None:
            self.storage.set_study_user_attr(self.study, f"generation {generation}", num)
        elif before != num:
            raise self._differs(f"{before} candidates were proposed in generation {generation}, and here {num}")

    def judged(self, generation: int) -> list[Candidate]:
        """The judged candidates of a generation, in order."""
        self._living(generation)
        return [self.finished[place] for place in sorted(self.finished) if place[0] == generation]

    def judge(
        self, generation: int, proposals: Sequence[Proposal], score: Score, told: Callable[[], None]
    ) -> list[Candidate]:
        """Judge what nobody else does, wait for the others, and return the judged proposals in order.

        `told` is called whenever there are more. A candidate whose judgement raises is free again for whoever comes.
        Raises DataError when another process proposed something else in a place, and ValueError for a score that is
        no number.
        """
        wait, num = SHORTEST_WAIT_S, -1
        while True:
            living = self._living(generation)
            done = self.judged(generation)
            subnets = {candidate.number: candidate.subnet for candidate in done}
            subnets |= {index: self.space.subnet(trial.user_attrs["subnet"]) for index, trial in living.items()}
            self._check_proposals(generation, subnets, proposals)
            if len(done) > num:
                num, wait = len(done), SHORTEST_WAIT_S
                told()
            if num == len(proposals):
                return done
            over = {candidate.number for candidate in done}
            places = [index for index in range(len(proposals)) if index not in over]
            free = next((index for index in places if index not in living or self._is_abandoned(living[index])), None)
            if free is None:
                time.sleep(wait)
                wait = min(2 * wait, LONGEST_WAIT_S)
                continue
            if free in living:
                self._give_up(living[free]._trial_id)
            self._judge_one(generation, free, proposals[free], score)

    def _judge_one(self, generation: int, index: int, proposal: Proposal, score: Score) -> None:
        """Judge a candidate, unless another process was faster to take it."""
        import optuna

        mine = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING,
            user_attrs={
                "generation": generation,
                "index": index,
                "subnet": proposal.subnet.as_record(),
                "cost": proposal.cost,
                "judge": this_process(),
                "beats": 0,
            },
        )
        trial = self.storage.create_new_trial(self.study, template_trial=mine)
        try:
            first = self._living(generation).get(index)
            if first is None or first._trial_id != trial:
                self._give_up(trial)
                return
            with self._beating(trial):
                given = score(proposal.subnet)
            found = given if isinstance(given, Scored) else Scored(given)
            value = float(found.score)
            if not math.isfinite(value):
                raise ValueError(f"the score is {value} for {proposal.subnet}; a score is a finite number")
            with suppress(optuna.exceptions.UpdateFinishedTrialError):  # we were thought dead, and it was taken over
                if found.details:
                    self.storage.set_trial_user_attr(trial, "details", dict(found.details))
                self.storage.set_trial_state_values(trial, optuna.trial.TrialState.COMPLETE, [value])
        except BaseException:
            self._give_up(trial)
            raise

    def _living(self, generation: int) -> dict[int, "FrozenTrial"]:
        """For each index that is being judged or was: the trial that counts, which is the first."""
        with self._reading():
            return self._read_living(generation)

    def _read_living(self, generation: int) -> dict[int, "FrozenTrial"]:
        from optuna.trial import TrialState

        trials = self.storage.get_all_trials(self.study, deepcopy=False)
        living: dict[int, FrozenTrial] = {}
        settling = True
        for trial in trials[self._settled :]:
            settling = settling and trial.state.is_finished()
            self._settled += settling
            if trial.state not in (TrialState.RUNNING, TrialState.COMPLETE) or "generation" not in trial.user_attrs:
                continue
            place = (trial.user_attrs["generation"], trial.user_attrs["index"])
            if not all(type(number) is int for number in place):
                raise TypeError(f"a candidate at {short(place)}")
            if place in self.finished:
                continue
            if place[0] == generation:
                living.setdefault(place[1], trial)
            if trial.state == TrialState.COMPLETE:
                self.finished[place] = self._candidate(trial)
        return living

    def _candidate(self, trial: "FrozenTrial") -> Candidate:
        """The record of a judged trial."""
        said, value = trial.user_attrs, trial.value
        assert value is not None
        subnet = self.space.subnet(said["subnet"])
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in (said["cost"], value)):
            raise TypeError(f"a cost of {short(said['cost'])} and a score of {short(value)}")
        return Candidate(said["generation"], said["index"], subnet, said["cost"], value, said.get("details", {}))

    def _reading(self) -> AbstractContextManager[None]:
        """Errors of Optuna in the words of this project."""
        return _readable(self)

    def _is_abandoned(self, trial: "FrozenTrial") -> bool:
        """Whether nobody judges a trial any more that says it runs."""
        if is_dead(trial.user_attrs["judge"]):
            return True
        beats, since = self._heard.get(trial._trial_id, (-1, 0.0))
        if trial.user_attrs["beats"] != beats:  # by our own clock: machines' clocks differ
            self._heard[trial._trial_id] = (trial.user_attrs["beats"], time.monotonic())
            return False
        return time.monotonic() - since > PATIENCE_S

    def _give_up(self, trial: int) -> None:
        """Make a place free, unless it was judged meanwhile."""
        import optuna

        with suppress(optuna.exceptions.UpdateFinishedTrialError):
            self.storage.set_trial_state_values(trial, optuna.trial.TrialState.FAIL)

    @contextmanager
    def _beating(self, trial: int) -> Iterator[None]:
        """Say now and then that we live."""
        import optuna

        if self.path is None:
            yield
            return
        over = Event()

        def beat() -> None:
            beats = 0
            while not over.wait(PATIENCE_S / 4):
                beats += 1
                try:
                    self.storage.set_trial_user_attr(trial, "beats", beats)
                except optuna.exceptions.UpdateFinishedTrialError:
                    return
                except OSError:  # a file system that is away for a moment
                    continue

        thread = Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _begin(self) -> int:
        """The study of this search, written now or before."""
        import optuna

        with self._reading():
            names = [study.study_name for study in self.storage.get_all_studies()]
        others = [name for name in names if name != STUDY]
        if others:
            raise DataError(f"{self}: holds {', '.join(others)[:80]}, which is no search of ours; name another file")
        if not names:
            sampler = optuna.samplers.RandomSampler()  # never asked
            with self._reading():
                optuna.create_study(
                    study_name=STUDY, storage=self.storage, sampler=sampler, direction="maximize", load_if_exists=True
                )
        with self._reading():
            study = self.storage.get_study_id_from_name(STUDY)
            if "search" not in self.storage.get_study_user_attrs(study):
                self.storage.set_study_user_attr(study, "search", self.identity)
        self.study = study
        self._check_identity()
        return study

    def _check_identity(self) -> None:
        """Refuse the file of another search; a search that began at the same moment may have written it."""
        with self._reading():
            there = self.storage.get_study_user_attrs(self.study).get("search")
        if there == self.identity:
            return
        raise DataError(
            f"{self}: belongs to another search: {differences(there, self.identity)}; name another file, or search as "
            "it did"
        )

    def _check_proposals(self, generation: int, there: Mapping[int, Subnet], proposals: Sequence[Proposal]) -> None:
        """Refuse to go on when what is proposed in a place is not what it was."""
        for index, subnet in there.items():
            here = proposals[index].subnet if index < len(proposals) else "nothing"
            if subnet != here:
                raise self._differs(f"candidate {index} of generation {generation} was {subnet}, and here is {here}")

    def _differs(self, what: str) -> DataError:
        return DataError(
            f"{self}: {what}; costs must depend on the network alone (counted MACs, or one latency table for all)"
        )


def differences(there: Any, here: Mapping[str, Any]) -> str:
    """What differs between two records, for people; of what they are about, each thing on its own."""
    if not isinstance(there, Mapping):
        return f"it says {short(there)}"
    if isinstance(there.get("about"), Mapping):
        there, here = (
            {**record, "about": None, **{f"about {key}": value for key, value in record.get("about", {}).items()}}
            for record in (there, here)
        )
    keys = [key for key in {**there, **here} if there.get(key) != here.get(key)][:10]
    return "; ".join(
        f"{str(key)[:80]} is {short(there.get(key))} there and {short(here.get(key))} here" for key in keys
    )


def in_memory() -> "BaseStorage":
    """A storage that ends with the process."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.storages.InMemoryStorage()


def open_journal(path: Path) -> "BaseStorage":
    """The journal in a file, made when there is none. Raises DataError for a file that is none."""
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage

    class MendingLock(JournalFileOpenLock):
        """Whoever was killed in the middle of a line must not spoil the next."""

        def acquire(self) -> bool:
            held = super().acquire()
            try:
                cut_torn_line(path)
            except BaseException:  # whoever asked for the lock does not hold it yet, and so would not let go
                self.release()
                raise
            return held

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file for the storage of the search")
    path.parent.mkdir(parents=True, exist_ok=True)
    refuse_foreign(path)
    with _readable(path):
        return JournalStorage(JournalFileBackend(str(path), lock_obj=MendingLock(str(path))))


@contextmanager
def _readable(named: object) -> Iterator[None]:
    """What Optuna says of a journal whose lines make no sense comes in many kinds of errors."""
    try:
        yield
    except DataError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{named}: cannot be read as the storage of a search ({why}); name another file") from None


def refuse_foreign(path: Path) -> None:
    """Raise DataError for a file that begins as no journal does, before anything is written to it."""
    if not path.exists():
        return
    with path.open("rb") as file:
        begin = file.read(len(LINE_BEGINS))
    if not LINE_BEGINS.startswith(begin):
        raise DataError(f"{path}: is no storage of a search; name another file")


def cut_torn_line(path: Path) -> None:
    """Cut off the end of a journal that a killed process did not finish; to be called with the lock held."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


# Who judges ---------------------------------------------------------------------------------------------------------


def this_process() -> dict[str, Any]:
    """A name of this process that no other has: machine, number, and when it began, since numbers come again."""
    return {"machine": this_machine(), "process": os.getpid(), "began": state_and_begin(os.getpid())[1]}


def is_dead(process: Mapping[str, Any]) -> bool:
    """Whether a process is known to have ended; of another machine's nothing is known.

    >>> is_dead(this_process())
    False
    """
    if process["machine"] != this_machine() or os.name == "nt":
        return False
    try:
        os.kill(process["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    state, began = state_and_begin(process["process"])
    return state in ("Z", "X") or began != process["began"]


def state_and_begin(process: int) -> tuple[str, int | None]:
    """The letter of a process's state and the tick it began at; nothing where the system does not tell."""
    with suppress(OSError, IndexError, ValueError):
        said = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return said[0], int(said[19])
    return "", None


@cache
def this_machine() -> str:
    """A name of the machine since it was started, and of the container, in which process numbers mean something."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return f"{platform.node()} {uuid.getnode():x}"
