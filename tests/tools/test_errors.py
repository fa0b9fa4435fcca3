"""What a person does wrong is said in one line on stderr, without a traceback, and with exit status 2."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tools.__main__ import verbs
from tools.cli import run

ROOT = Path(__file__).parent.parent.parent
RECIPE = "recipes/camvid_data_slimming.yaml"


def call(*words):
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tools.train", RECIPE, "optimizer.lrr=1"], "lrr"),
        (["tools.train", RECIPE, "data.name=camvit"], "choose one of"),
        (["tools.train", RECIPE, "data.args.root=/nowhere"], "/nowhere"),
        (["tools.train", "recipes/shapes_dense.yaml", "model.args.arch=fpm"], "model.args.arch"),
        (["tools.evaluate", "runs/no_such_run"], "no_such_run"),
        (["tools.measure_cost", "runs/no_such_run"], "no_such_run"),
        (["tools.score_complexity", "recipes/camvid_dense.yaml"], "data_slimming"),
        (["tools.check_data", RECIPE, "data.args.root=/nowhere"], "/nowhere"),
        (["tools.compare", "runs/no_such_run"], "no_such_run"),
        (["tools.report", "runs/no_such_run"], "no_such_run"),
        (["tools.search", "runs/no_such_run", "--budget-macs", "1e9"], "no_such_run"),
        (["tools.search", "runs/no_such_run"], "there is no budget"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_that_names_it(words, said, tmp_path, monkeypatch, capsys):
    if words[0] == "tools.train":
        words = [*words, "--runs", str(tmp_path)]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        run(import_module(words[0]).main)
    assert ended.value.code == 2
    assert_one_line(capsys.readouterr().err, said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tools.train", "recipes/camvid_dens.yaml"], "did you mean recipes/camvid_dense.yaml"),
        (["tools", "trian"], "choose one of"),
    ],
)
def test_so_it_is_in_a_process_of_its_own(words, said):
    done = call(*words)
    assert done.returncode == 2, done.stderr
    assert_one_line(done.stderr, said)


def assert_one_line(printed, said):
    assert "Traceback" not in printed
    line = printed.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize("verb", verbs())
def test_every_verb_says_what_it_takes(verb):
    done = call("tools", verb, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
