"""What README shows runs: every command of its sh blocks, and its Python example as it stands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tools.make_shapes import write_layout

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# README says how to try a command first; with this the tests do.
SHORT = re.search(r"append\s+`([^`]+)`", README).group(1).split()
SHORT.remove("name=try")  # which is for trying beside the real run; later commands are about that one
QUICK = ["data.args.batch_size=4", "trainer.accelerator=cpu", "data.args.statistics_images=4"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


COMMANDS = [line.split("   #")[0].strip() for block in blocks("sh") for line in block.splitlines() if line.strip()]
TOOLS = [command for command in COMMANDS if command.startswith("python -m tools.")]


def test_the_first_commands_are_the_demo_and_the_tests_and_every_target_exists():
    makes = [shlex.split(command)[1] for command in COMMANDS if command.startswith("make")]
    assert makes[:2] == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    for target in makes:
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), target


@pytest.mark.long
def test_the_commands_work_one_after_the_other(tmp_path):
    write_layout("camvid", tmp_path / "camvid", 40, size=(120, 160))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
        "DANCE_SEG_CACHE": str(tmp_path / "cache"),
    }
    assert len(TOOLS) >= 7
    for command in TOOLS:
        words = [re.sub(r"(^|=)DIR(?=$|/)", rf"\1{tmp_path / 'camvid'}", word) for word in shlex.split(command)]
        words = [found for w in words for found in (sorted(map(str, tmp_path.glob(w))) if "*" in w else [w])]
        if words[2] == "tools.train":
            words += [*SHORT, *QUICK]
            words += ["data.args.num_train=16", "data.args.num_val=4"] if "shapes" in words[3] else []
        if words[2] == "tools.search":
            words += ["--lowest", "0", "--initial", "2", "--iterations", "1"]
        if words[2] == "tools.distill_video":
            short = "trainer.max_epochs=1,data.args.num_train=8,data.args.num_val=2,data.args.batch_size=4"
            words += ["--frames", "12", "data.args.size=[64,64]", f"teacher.args.overrides=[{short}]"]
        done = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    for name in ("camvid_dense", "camvid_data_slimming"):
        for file in ("recipe.yaml", "metrics.jsonl", "cost.json", "plan.json", "report.html"):
            assert (tmp_path / "runs" / name / file).is_file(), file
    assert list((tmp_path / "labelled").rglob("*.png"))


def test_the_library_example_trains_a_users_own_module_and_is_short(tmp_path, monkeypatch):
    import torch
    from torch import nn

    (example,) = (block for block in blocks("python") if "Trainer(" in block)
    assert len([line for line in example.splitlines() if line.strip()]) < 25

    class MySet(torch.utils.data.Dataset):
        def __init__(self, count):
            self.count = count

        def __len__(self):
            return self.count

        def __getitem__(self, index):
            generator = torch.Generator().manual_seed(index)
            image = torch.rand(3, 72, 80, generator=generator) * (index + 1) / self.count
            return image, torch.randint(0, 3, (72, 80), generator=generator)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DANCE_SEG_CACHE", str(tmp_path / "cache"))
    names = {
        "torch": torch,
        "my_network": lambda: nn.Conv2d(3, 3, 3, padding=1),
        "my_train_set": MySet(12),
        "my_val_set": MySet(4),
        "my_classes": ["a", "b", "c"],
    }
    exec(compile(example, "README.md", "exec"), names)
    assert names["trainer"].current_epoch == 2
    assert names["trainer"].global_step == sum(summary.steps for summary in names["data"].schedule)


def test_the_slimming_example_cuts_a_users_own_network_which_trains_on():
    import torch
    from torch import nn

    (example,) = (block for block in blocks("python") if "slim(" in block)

    def my_network():
        return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 3, 1))

    names = {"torch": torch, "my_network": my_network}
    exec(compile(example, "README.md", "exec"), names)
    network, optimizer = names["network"], names["optimizer"]
    assert network[0].out_channels == 16
    network(torch.rand(2, 3, 64, 64)).square().mean().backward()
    before = network[0].weight.detach().clone()
    optimizer.step()
    assert not torch.equal(network[0].weight, before)


@pytest.mark.parametrize("line", re.findall(r"^[├└│ ─]*── ?(\S.*)$", README, flags=re.MULTILINE))
def test_every_file_of_the_tree_exists(line):
    names = re.findall(r"[\w.]+(?:\.py|\.md|\.toml|\.txt|/)(?=\s|$|:)", line)
    folders = {"dance_seg", "datamodules", "recipes", "tools", "tests"}
    for name in names:
        bare = name.strip("/")
        found = [*ROOT.glob(bare), *(p for f in folders for p in (ROOT / f).rglob(Path(bare).name))]
        assert found, name
