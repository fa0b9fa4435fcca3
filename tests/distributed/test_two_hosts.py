"""Two machines are one: torchrun in two network namespaces, joined by a cable that exists only in the kernel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dance_seg.checkpoint import load_checkpoint
from dance_seg.recipe import save_recipe
from tests.tiny import tiny

ROOT = Path(__file__).parent.parent.parent
ADDRESSES = ("10.231.77.1", "10.231.77.2")


def may_make_namespaces():
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    made = subprocess.run(["ip", "netns", "add", "dance-probe"], capture_output=True).returncode == 0
    subprocess.run(["ip", "netns", "del", "dance-probe"], capture_output=True)
    return made


pytestmark = [
    pytest.mark.multinode,
    pytest.mark.slow,
    pytest.mark.skipif(not may_make_namespaces(), reason="needs root, and `ip netns` of iproute2"),
]


@pytest.fixture
def hosts():
    """The names of two network namespaces that reach each other at ADDRESSES, and nothing else."""
    names = [f"dance-{os.getpid()}-{number}" for number in (0, 1)]
    cable = [f"dance{os.getpid() % 10000}{end}" for end in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    commands += [f"ip link add {cable[0]} type veth peer name {cable[1]}"]
    for name, end, address in zip(names, cable, ADDRESSES, strict=True):
        commands += [
            f"ip link set {end} netns {name}",
            f"ip -n {name} addr add {address}/24 dev {end}",
            f"ip -n {name} link set {end} up",
            f"ip -n {name} link set lo up",
        ]
    try:
        for command in commands:
            subprocess.run(command.split(), check=True, capture_output=True, timeout=20)
        yield list(zip(names, cable, ADDRESSES, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)


def test_a_run_on_two_hosts_ends_with_the_weights_of_two_processes_on_one(hosts, tmp_path):
    cuts = ("network_slimming.start=0.2", "network_slimming.end=0.6", "network_slimming.cuts=1")
    options = ("trainer.max_epochs=3", "trainer.validate_every=3", *cuts)
    for name, devices, nodes in (("one_host", 2, 1), ("two_hosts", 1, 2)):
        recipe = tiny(
            f"trainer.devices={devices}", f"trainer.num_nodes={nodes}", *options, f"name={name}",
            slim=True, cache=tmp_path / "cache",
        )  # fmt: skip
        save_recipe(recipe, tmp_path / f"{name}.yaml")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def training(name):
        return ["-m", "tools.train", str(tmp_path / f"{name}.yaml"), "--runs", str(tmp_path)]

    done = subprocess.run(
        [sys.executable, *training("one_host")],
        env=environment,
        cwd=ROOT,
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    processes = []
    for number, (name, interface, address) in enumerate(hosts):
        launcher = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
        # Both namespaces have this machine's name, by which torchrun would tell which of the two is the endpoint's.
        place = [
            f"--rdzv-endpoint={ADDRESSES[0]}:29517",
            f"--local-addr={address}",
            f"--rdzv-conf=is_host={1 - number}",
        ]
        command = ["ip", "netns", "exec", name, sys.executable, *launcher, *place, *training("two_hosts")]
        with (tmp_path / f"{name}.log").open("w") as log:
            processes.append(
                subprocess.Popen(
                    command, env={**environment, "GLOO_SOCKET_IFNAME": interface}, cwd=ROOT, stdout=log, stderr=log
                )
            )
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0, 0], "\n".join((tmp_path / f"{name}.log").read_text()[-2000:] for name, _, _ in hosts)
    one, two = (newest(tmp_path / name) for name in ("one_host", "two_hosts"))
    assert two["structure"] == one["structure"]
    assert all(torch.equal(value, two["state_dict"][key]) for key, value in one["state_dict"].items())


def newest(folder):
    return load_checkpoint(max((folder / "checkpoints").glob("step-*.ckpt"), key=lambda path: path.stat().st_mtime))
