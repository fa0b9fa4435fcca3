"""The benchmark of starting: it measures what it says, in fresh processes, and says what is late."""

import json
import sys

import pytest

from tools.bench import startup


def test_each_tool_is_started_anew_and_the_slowest_of_each_round_counts(tmp_path, monkeypatch):
    """Two tools of 0.5 and 0.25 s by turns of a made-up clock."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["startup", "--runs", "2"])
    monkeypatch.setattr(startup, "verbs", lambda: ["train", "report"])
    asked = []
    monkeypatch.setattr(startup, "start", lambda *words: asked.append(words))

    def interleave(sides, runs):
        for call in sides.values():
            call()
        seconds = {"train": [0.5, 0.2], "report": [0.25, 1.4], "import": [0.4, 0.5]}
        return {name: seconds.get(name, [0.1, 0.1]) for name in sides}

    monkeypatch.setattr(startup, "interleave", interleave)
    startup.main()
    result = json.loads((tmp_path / "runs/bench/startup.json").read_text())
    assert result["ratios"]["help_seconds"] == {"median": pytest.approx(0.95), "min": 0.5, "max": 1.4}
    assert result["ratios"]["help_seconds/report"]["max"] == 1.4
    assert result["notes"]["targets"] == "import_seconds 0.45 s, above 0.3 s"
    assert asked == [
        ("-c", "pass"),
        ("-c", "import dance_seg"),
        ("-m", "tools.train", "--help"),
        ("-m", "tools.report", "--help"),
    ]


def test_a_start_that_fails_is_no_figure():
    startup.start("-c", "pass")
    with pytest.raises(ValueError, match="ended with 1: KeyError: 'no'"):
        startup.start("-c", "raise KeyError('no')")
