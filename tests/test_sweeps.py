"""Every sweep drives tools.train with values that its recipe takes."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from dance_seg.recipe import load_recipe, recipe_record
from dance_seg.report.runs import flat

ROOT = Path(__file__).parent.parent
SWEEPS = sorted((ROOT / "recipes" / "sweeps").glob("*.yaml"))


def values_of(parameter: dict) -> list:
    """All values of a parameter, or the ends of its range."""
    return parameter.get("values") or [parameter[key] for key in ("value", "min", "max") if key in parameter]


def read(path: Path) -> tuple[dict, Path]:
    """A sweep and the recipe that its command names."""
    sweep = yaml.safe_load(path.read_text())
    (recipe,) = re.findall(r"recipes/\S+\.yaml", " ".join(sweep["command"]))
    return sweep, ROOT / recipe


def test_there_is_a_sweep():
    assert SWEEPS


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_each_parameter_of_a_sweep_is_a_key_of_its_recipe(path):
    sweep, recipe = read(path)
    keys = flat(recipe_record(load_recipe(recipe))).keys()
    assert not [name for name in sweep["parameters"] if name not in keys]


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_each_value_of_a_sweep_is_taken_by_its_recipe(path):
    sweep, recipe = read(path)
    for name, parameter in sweep["parameters"].items():
        assert values_of(parameter), name
        for value in values_of(parameter):
            found = flat(recipe_record(load_recipe(recipe, [f"{name}={value}"])))[name]
            assert found == (yaml.safe_load(value) if isinstance(value, str) else value), name


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_command_hands_what_was_drawn_to_the_trainer_under_a_name_of_its_own(path, tmp_path):
    """The agent replaces ${env} and ${args_no_hyphens} and sets WANDB_RUN_ID; this python prints its arguments."""
    sweep, recipe = read(path)
    drawn = [f"{name}={values_of(parameter)[0]}" for name, parameter in sweep["parameters"].items()]
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    command = []
    for word in sweep["command"]:
        command += {"${env}": ["/usr/bin/env"], "${args_no_hyphens}": drawn}.get(word, [word])
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "WANDB_RUN_ID": "ab12",
        "DANCE_SEG_ROOT": "/some where",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *options, root = done.stdout.splitlines()[:5]
    assert options == ["-m", "tools.train", f"recipes/{recipe.name}", "name=sweep-ab12"]
    assert root == "data.args.root=/some where"
    assert done.stdout.splitlines()[5:] == drawn


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_aims_at_a_figure_that_is_logged(path):
    sweep, _ = read(path)
    assert sweep["metric"] == {"name": "val/miou.max", "goal": "maximize"}  # the summary holds max and last
