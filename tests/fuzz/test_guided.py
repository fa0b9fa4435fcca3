"""What atheris draws is tried on the reader, and an input that fails ends it and is kept."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tools.fuzz.guided import main

PLANTED = """
from tools.fuzz.readers import READERS
from tools.fuzz.target import Target

def check(data):
    if data[:1] == b"!":
        raise KeyError("foreign")

READERS["planted"] = lambda folder: Target([b"one", b"two"], check, [b"word"], lambda data: data + b"?")
from tools.fuzz.guided_worker import main
main()
"""


@pytest.mark.skipif(find_spec("atheris") is not None, reason="atheris is installed")
def test_without_atheris_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["guided", "list", "--keep", str(tmp_path)])
    with pytest.raises(ValueError, match=r"atheris is not installed; on Linux: pip install atheris==3\.0\.0"):
        main()


def test_a_failure_ends_it_and_its_input_is_kept(tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed")
    (tmp_path / "work").mkdir()
    words = ["planted", "60", "0", str(tmp_path / "work"), str(tmp_path / "kept")]
    done = subprocess.run([sys.executable, "-c", PLANTED, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "crash: builtins.KeyError" in done.stderr
    assert (tmp_path / "kept").read_bytes()[:1] == b"!"


def test_a_reader_without_failure_ends_with_its_time(monkeypatch, tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed")
    monkeypatch.setattr(sys, "argv", ["guided", "list", "--seconds", "2", "--keep", str(tmp_path / "kept")])
    assert main() == 0
    assert not list((tmp_path / "kept").iterdir())
