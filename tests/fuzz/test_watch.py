"""Whatever a reader does to its process is noticed, with the input that did it; the others are tried all the same."""

from dance_seg.errors import DataError
from tools.fuzz.changes import CHANGES, Generated, changed_file
from tools.fuzz.slot import Slot
from tools.fuzz.target import SECRET, Target, Wrong, judge
from tools.fuzz.watch import try_reader
from tools.fuzz.worker import BATCH, seed_of, try_batch

TARGET = Target([b"one 1\ntwo 2\n", b"three 3\n"], lambda data: None, (b"word",), lambda data: data + b"!")


def test_death_hanging_foreign_errors_and_wrong_figures_are_found_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("PLANTED", str(tmp_path / "count"))
    found = try_reader("planted", 0, 3, hang_seconds=2, worker="tests.fuzz.planted")
    assert [what for what, _ in found.wrong] == ["wrong: a figure"]
    assert [what.split(":")[0] for what, _ in found.crashes] == ["ended with -11", "crash"]
    assert [what for what, _ in found.hangs] == ["no end within 2 s"]
    assert all(isinstance(data, bytes) and data for _, data in [*found.crashes, *found.hangs])
    assert BATCH < found.inputs < 3 * BATCH  # the last batch whole, of the others what came before


def test_a_seed_tries_the_same_inputs_and_another_seed_others(tmp_path):
    def tried(seed: int) -> list[bytes]:
        seen: list[bytes] = []
        target = Target(TARGET.seeds, seen.append, TARGET.words, TARGET.repair)
        try_batch(target, seed, Slot(tmp_path / "slot"), lambda what, data: None, 50)
        return seen

    first = seed_of("list", 0, 0)
    assert tried(first) == tried(first) != tried(seed_of("list", 0, 1))
    assert Slot(tmp_path / "slot").count == 150


def test_every_change_changes():
    for change in CHANGES:
        assert any(change(Generated(seed), TARGET.seeds[0], TARGET) != TARGET.seeds[0] for seed in range(5)), change
    assert any(changed_file(Generated(seed), TARGET).endswith(b"!") for seed in range(9))


def test_a_refusal_is_right_if_it_is_short_and_tells_no_secret():
    def refusing(said: str):
        def check(data: bytes) -> None:
            raise DataError(said)

        return check

    def lying(data: bytes) -> None:
        raise Wrong("x")

    assert judge(refusing("a.png is damaged"), b"") == ""
    assert judge(refusing("x" * 5000), b"").startswith("wrong: a message of 5000")
    assert judge(refusing(SECRET), b"").startswith("wrong: a message holds")
    assert judge(lying, b"") == "wrong: x"
    assert judge(lambda data: data[0], b"").startswith("crash: builtins.IndexError")
