"""`make test-long`: what takes minutes. A run of 500 steps, a change of the number of ranks, a host that
leaves the network.
"""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from helpers import ROOT, python, torchrun

pytestmark = pytest.mark.long

SMALL = "grpo --problems_per_step 4 --group_size 4 --max_tokens 40 --eval_problems 0 --name run"
LONG_STEPS = int(os.environ.get("LONG_STEPS", 500))


def test_memory_stays_flat_and_the_pool_whole(tmp_path):
    """The least resident memory of the second fifth of the steps and of the last: within 2 %.

    The least, because the page pool, which comes and goes with every rollout, is in some readings and not in
    others: what is lost for good is in all of them.
    """
    options = ["--steps", str(LONG_STEPS), "--report_every", "0", "--runs_dir", str(tmp_path)]
    done = python("tests/embedded_run.py", *SMALL.split(), *options)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    resident = [int(words[2]) for words in lines if words[0] == "RSS"]
    assert len(resident) == LONG_STEPS == sum(words[:2] == ["pool", "whole"] for words in lines)
    fifth = LONG_STEPS // 5
    early, late = min(resident[fifth : 2 * fifth]), min(resident[-fifth:])
    assert late <= 1.02 * early, f"{early} bytes in the second fifth of the steps, {late} in the last"


def completions(folder, step: int) -> list[tuple]:
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [(r["problem"], r["sample"], r["turns"][0]["completion"]) for r in rows if r["step"] == step]


def test_a_run_of_two_ranks_goes_on_with_one_and_with_four(tmp_path):
    """And samples in the next step what the run of two ranks, uninterrupted, samples."""
    options = [*SMALL.split()[:-1], "cut", "--runs_dir", str(tmp_path), "--steps", "3", "--save_every", "1"]
    place = ["tests/killed.py", "thinkrl.resume:point_latest", "2", "train.py"]
    assert torchrun(2, *place, *options).returncode != 0
    assert (tmp_path / "cut" / "latest").read_text() == "step_2\n"
    for ranks in (2, 1, 4):
        folder = shutil.copytree(tmp_path / "cut", tmp_path / f"on_{ranks}")
        options[options.index("--name") + 1] = folder.name
        done = torchrun(ranks, "train.py", *options, "--resume", "auto")
        assert done.returncode == 0 and "continues at step 2" in done.stdout, done.stderr[-3000:]
        assert (folder / "hf" / "model.safetensors").exists()
    expected = completions(tmp_path / "on_2", 3)
    assert len(expected) == 4
    assert completions(tmp_path / "on_1", 3) == expected and completions(tmp_path / "on_4", 3) == expected


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


@pytest.fixture
def two_hosts():
    """Two network namespaces with a cable between them, 10.77.0.1 and 10.77.0.2."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("needs root and iproute2: two hosts are two network namespaces")
    hosts = [f"thinkrl{os.getpid()}{x}" for x in "ab"]
    made = [ip("netns", "add", host) for host in hosts]
    try:
        ends = "netns", hosts[0], "type", "veth", "peer", "name", "cable1", "netns", hosts[1]
        made.append(ip("link", "add", "cable0", *ends))
        if wrong := [one.stderr.strip() for one in made if one.returncode]:
            pytest.skip(f"no network namespaces here: {wrong[0]}")
        for i, host in enumerate(hosts):
            ip("-n", host, "addr", "add", f"10.77.0.{i + 1}/24", "dev", f"cable{i}")
            ip("-n", host, "link", "set", f"cable{i}", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            ip("netns", "delete", host)


@pytest.mark.parametrize("how", ["killed", "unplugged"])
def test_one_of_two_hosts_is_gone_and_the_other_ends(two_hosts, tmp_path, how):
    """It is killed, which its sockets tell; or it leaves the network, which only silence tells."""
    command = [*SMALL.split(), "--steps", "100000", "--timeout", "0.5", "--runs_dir", str(tmp_path)]
    hosts = []
    for i, host in enumerate(two_hosts):
        launch = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={i}"]
        launch += ["--master_addr=10.77.0.1", "--master_port=29555", "train.py", *command]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": f"cable{i}", "PYTHONPATH": str(ROOT)}
        log = (tmp_path / f"host_{i}").open("w")
        run = ["ip", "netns", "exec", host, sys.executable, *launch]
        hosts.append(
            subprocess.Popen(run, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert all(host.poll() is None for host in hosts), (tmp_path / "host_0").read_text()[-3000:]
        time.sleep(0.5)
    if how == "killed":
        hosts[1].kill()  # torchrun, and the kernel its worker
    else:
        ip("-n", two_hosts[1], "link", "set", "cable1", "down")
    assert hosts[0].wait() != 0
    said = [
        line
        for line in (tmp_path / "host_0").read_text().splitlines()
        if line.startswith("train.py: rank 1 on ")
    ]
    assert len(said) == 1 and ("has ended" if how == "killed" else "has not been heard of") in said[0]
    assert hosts[1].wait() != 0, "the worker that lost the store has ended too"
