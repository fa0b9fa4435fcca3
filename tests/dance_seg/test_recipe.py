"""A recipe is literal data: what is wrong in it is said by key, value and choice; nothing in it is executed."""

import os
import re

import pytest

from dance_seg.errors import RecipeError
from dance_seg.recipe import (
    load_recipe,
    parse_recipe,
    recipe_differences,
    recipe_from_record,
    recipe_record,
    save_recipe,
)

GOOD = """
data: {name: shapes, args: {batch_size: 8}}
model: {name: smp, args: {arch: fpn, encoder_name: resnet18}}
data_slimming: {scales: [0.5, 1.0], quantiles: [0.5]}
"""


def test_a_missing_section_is_off_and_overrides_win():
    recipe = parse_recipe(
        "data: {name: shapes}\nmodel: {name: smp}",
        ["trainer.max_epochs=3", "data.args.batch_size=4", "optimizer.lr=1e-3"],
    )
    assert recipe.data_slimming is None
    assert recipe.trainer.max_epochs == 3
    assert recipe.data.args == {"batch_size": 4}
    assert recipe.optimizer.lr == 0.001


def test_a_recipe_survives_being_written_and_read(tmp_path):
    recipe = parse_recipe(GOOD, name="one")
    assert recipe_from_record(recipe_record(recipe)) == recipe
    save_recipe(recipe, tmp_path / "one.yaml")
    assert load_recipe(tmp_path / "one.yaml") == recipe


def test_names_that_look_like_numbers_stay_names_wherever_they_stand(tmp_path):
    texts = ["a drive 0016E5", "1e-3", "010", "off", "0016E5"]
    quoted = ", ".join(f"'{text}'" for text in texts)
    recipe = parse_recipe(GOOD, [f"tracking.tags=[{quoted}]", "data.args.hold_out=[0016E5]"], name="one")
    assert list(recipe.tracking.tags) == texts
    assert recipe.data.args["hold_out"] == ["0016E5"]
    save_recipe(recipe, tmp_path / "one.yaml")
    assert load_recipe(tmp_path / "one.yaml") == recipe


def test_the_name_is_the_file_unless_given(tmp_path):
    (tmp_path / "street.yaml").write_text(GOOD)
    assert load_recipe(tmp_path / "street.yaml").name == "street"
    assert load_recipe(tmp_path / "street.yaml", ["name=other"]).name == "other"


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (GOOD, ["sed=1"], "sed"),
        (GOOD, ["optimizer.lrr=1"], "lr"),
        (GOOD, ["data_slimming.scale=1"], "scales"),
        (GOOD, ["optimizer.lr=fast"], "optimizer.lr"),
        (GOOD, ["optimizer.lr=.nan"], "optimizer.lr is nan"),
        (GOOD, ["optimizer.lr=-1"], "positive"),
        (GOOD, ["optimizer.name=rmsprop"], "optimizer.name"),
        (GOOD, ["trainer.max_epochs=0"], "trainer.max_epochs is 0"),
        (GOOD, ["trainer.max_epochs=many"], "trainer.max_epochs"),
        (GOOD, ["trainer.devices=3"], "data.args.batch_size 8"),
        (GOOD, ["data_slimming.quantiles=[0.5,0.6]"], "one fewer"),
        (GOOD, ["trainer.choose_from=0.1"], "full-resolution tail"),
        (GOOD, ["name=../../x"], "names a folder"),
        (GOOD, ["seed=-1"], "seed"),
        (GOOD, ["nonsense"], "section.key=value"),
        (GOOD, ["data.args.root=${oc.env:HOME}"], "nothing is interpolated"),
        (GOOD + "tracking: {project: '${oc.env:HOME}'}", [], "tracking.project"),
        ("data: {name: shapes}", [], "model"),
        ("just words", [], "mapping"),
        ("", [], "mapping"),
        ("a: [1, 2", [], "not valid YAML"),
        ("a: &x [1]\nb: *x", [], "aliases"),
        ("a: !!python/object/apply:os.system ['true']", [], "tags"),
        ("model: {name: smp, _target_: os.system}\ndata: {name: shapes}", [], "_target_"),
        (GOOD + "on: no", [], "line 5: on means something else to YAML than it looks like; write 'on'"),
        (GOOD + "trainer: {compile: off}", [], "trainer.compile, line 5: off means something else"),
        (GOOD, ["trainer.compile=yes"], "trainer.compile: line 1: yes means something else"),
        (GOOD, ["trainer.max_epochs=010"], "write decimal digits"),
        (GOOD, ["trainer.max_epochs=1:30"], "write decimal digits"),
        (GOOD, ["optimizer.lr=1e400"], "optimizer.lr is inf"),
        (GOOD, ["optimizer.betas=[0.9, 2]"], "optimizer.betas"),
        (GOOD, ["optimizer.poly_power=-1"], "optimizer.poly_power"),
        (GOOD, ["data.args.flip=.nan"], "data.args.flip is nan"),
        (GOOD, ["trainer.max_epochs=1000000000"], "at most 1000000"),
        (GOOD, ["data.args.batch_size=99999999"], "data.args.batch_size is 99999999"),
        (GOOD, ["seed=" + "9" * 5000], "a number of 5000 digits"),
        (GOOD + "seed: 1\nseed: 2", [], "the key seed is given twice"),
        (GOOD + "loss: {name: focal}", [], "it takes: cross_entropy"),
        (GOOD, ["tracking.group=???"], "tracking.group is ???"),
        (GOOD, ['start_from="a\\0b"'], "cannot be seen"),
        (GOOD, ["data.args.root=!!python/object/apply:pathlib.Path [/]"], "data.args.root: line 1: YAML tags"),
        (GOOD, ["data.args.root=[&a x, *a]"], "YAML aliases"),
        (GOOD, ["data.args.root=" + "[" * 5000], "nested too deeply"),
        (GOOD, ["a." * 5000 + "b=1"], "section.key=value"),
        (GOOD, ["data.args={'${oc.env:HOME}': 1}"], "interpolate nothing"),
        (GOOD, ["model.args._target_=os.system"], "model.args._target_: no option has such a name"),
        ("data: !!python/object/new:os.system [id]", [], "data, line 1: YAML tags"),
        ("a: " + "[" * 5000, [], "nested too deeply"),
        (GOOD, ["name=" + "a" * 300], "at most 100"),
    ],
)
def test_what_is_wrong_is_named(text, overrides, said):
    with pytest.raises(RecipeError, match=re.escape(said)) as error:
        parse_recipe(text, overrides, at="mine.yaml")
    assert str(error.value).startswith("mine.yaml: ")
    assert len(str(error.value)) < 800


def test_no_value_of_the_environment_is_ever_read(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "s3cret")
    with pytest.raises(ValueError, match="interpolated") as error:
        parse_recipe(GOOD, ["tracking.group=${oc.env:SECRET_KEY}"])
    assert os.environ["SECRET_KEY"] not in str(error.value)


def test_a_secret_that_the_shell_wrote_out_is_refused_and_not_told(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    with pytest.raises(RecipeError, match=r"tracking\.group holds the value of .* WANDB_API_KEY") as error:
        parse_recipe(GOOD, ["tracking.group=x-0123456789abcdef0123"])
    assert os.environ["WANDB_API_KEY"] not in str(error.value)
    monkeypatch.delenv("WANDB_API_KEY")
    assert parse_recipe(GOOD, ["tracking.group=x-0123456789abcdef0123"]).tracking.group


def test_an_alias_bomb_is_refused_before_it_expands():
    bomb = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(ValueError, match="aliases"):
        parse_recipe(bomb)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "camvid_dense.yaml").write_text(GOOD)
    with pytest.raises(ValueError, match=r"did you mean .*camvid_dense\.yaml"):
        load_recipe(tmp_path / "camvid_dens.yaml")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="UTF-8"):
        load_recipe(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(ValueError, match="no recipe"):
        load_recipe(tmp_path / "b.yaml")


def test_differences_name_the_key_and_both_values():
    one, two = parse_recipe(GOOD), parse_recipe(GOOD, ["seed=1", "data.args.batch_size=4"])
    assert recipe_differences(one, two) == ["data.args.batch_size: 8 / 4", "seed: 0 / 1"]
    assert recipe_differences(one, one) == []
