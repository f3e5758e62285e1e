"""Two nodes on one machine: train on both, kill one, see the other end, and resume.

    python tests/two_nodes.py [--ds_config ds_configs/zero3.json] [--keep]

Each node is a network namespace with a host name of its own, joined to the other by a virtual
cable, and runs launch/torchrun_node.sh with two ranks. Needs root and iproute2; where namespaces
are refused, the nodes are two loopback addresses (and share a host name).
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ADDRESSES = ("10.77.0.1", "10.77.0.2")
HEARTBEAT = 10
DEADLINE = 60 + HEARTBEAT


def main() -> None:
    """Run the three acts and say what was seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ds_config", default="ds_configs/zero3.json", help="[zero3.json]")
    parser.add_argument("--keep", action="store_true", help="do not remove logs and runs")
    parser.add_argument("flags", nargs="*", help="more flags of launch/train.py, after --")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="two_nodes."))
    flags = ["--ds_config", options.ds_config, *options.flags]
    with network() as prefixes:
        train_to_the_end(work, prefixes, flags)
        kill_one_and_resume(work, prefixes, flags)
    if not options.keep:
        shutil.rmtree(work)
    print("two nodes: all is well")


def train_to_the_end(work: Path, prefixes: list[list[str]], flags: list[str]) -> None:
    """Train without trouble."""
    nodes = start(work / "whole", prefixes, flags)
    statuses = [node.wait(timeout=300) for node in nodes]
    assert statuses == [0, 0], f"statuses {statuses}\n{logs(work / 'whole')}"
    print(f"trained on two nodes: {last_step(work / 'whole')} steps")


def kill_one_and_resume(work: Path, prefixes: list[list[str]], flags: list[str]) -> None:
    """Kill node 1 with all of its processes mid-run; node 0 must end by itself; resume."""
    folder = work / "killed"
    flags = [*flags, "--save_every", "10", "--heartbeat_timeout", str(HEARTBEAT)]
    nodes = start(folder, prefixes, flags)
    wait_for(folder / "run/step_000010/COMPLETE", nodes, folder)
    os.killpg(nodes[1].pid, signal.SIGKILL)
    for pid in ranks_of(folder, 1):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    status = nodes[0].wait(timeout=DEADLINE)
    text = (folder / "node0.log").read_text(errors="replace")
    assert status != 0, "node 0 ended well although node 1 was killed"
    assert "error: rank" in text, f"no rank is named\n{text[-3000:]}"
    error = next(line for line in text.splitlines() if "error: rank" in line)
    print(f"node 1 killed at step {last_step(folder)}; node 0 ended after")
    print(f"  {time.monotonic() - killed:.0f} s with: {error}")
    again = start(folder, prefixes, [*flags, "--resume", "auto"])
    statuses = [node.wait(timeout=300) for node in again]
    assert statuses == [0, 0], f"statuses {statuses}\n{logs(folder)}"
    whole, resumed = losses(work / "whole"), losses(folder)
    assert whole == resumed, "the resumed run's losses differ from the uninterrupted run's"
    print(f"resumed: {len(resumed)} steps, losses as in the uninterrupted run")


def start(folder: Path, prefixes: list[list[str]], flags: list[str]) -> list[subprocess.Popen]:
    """Start launch/torchrun_node.sh on both nodes."""
    folder.mkdir(parents=True, exist_ok=True)
    run = ["--output_dir", str(folder / "run"), "--max_steps", "40", "--no-progress"]
    run += ["--micro_batch_size", "1", "--held_out", "8", "--calibration_rows", "0"]
    nodes = []
    for number, prefix in enumerate(prefixes):
        environment = {
            **os.environ,
            "HEAD": ADDRESSES[0] if prefix else "127.0.0.1",
            "NNODES": "2",
            "NODE": str(number),
            "NPROC": "2",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            **({"GLOO_SOCKET_IFNAME": f"cable{number}"} if prefix else {}),
        }
        with open(folder / f"node{number}.log", "ab") as log:
            nodes.append(
                subprocess.Popen(
                    [*prefix, "bash", "launch/torchrun_node.sh", *run, *flags],
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
    return nodes


def ranks_of(folder: Path, node: int) -> list[int]:
    """Return the processes of a node's ranks, which outlive their agent."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (entry / "environ").read_bytes().split(b"\0")
            command = (entry / "cmdline").read_bytes()
            if str(folder).encode() in command and f"NODE={node}".encode() in environment:
                found.append(int(entry.name))
    return found


def wait_for(path: Path, nodes: list[subprocess.Popen], folder: Path) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came\n{logs(folder)}"
        assert nodes[0].poll() is None, f"node 0 ended too early\n{logs(folder)}"
        time.sleep(0.05)


def losses(folder: Path) -> list[float]:
    """Return the task loss of every step."""
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss_task"] for line in lines]


def last_step(folder: Path) -> int:
    """Return the last step in the metrics."""
    return len(losses(folder))


def logs(folder: Path) -> str:
    """Return the ends of both nodes' logs."""
    files = sorted(folder.glob("node*.log"))
    return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-3000:]}" for f in files)


@contextlib.contextmanager
def network() -> Iterator[list[list[str]]]:
    """Yield the command prefixes that run something on each node."""
    if os.geteuid() or not shutil.which("ip") or ip("netns", "add", "node0"):
        print("no network namespaces here; the nodes are two loopback addresses")
        yield [[], []]
        return
    try:
        ip("netns", "add", "node1")
        ip(
            "link",
            "add",
            "cable0",
            "netns",
            "node0",
            "type",
            "veth",
            "peer",
            "cable1",
            "netns",
            "node1",
        )
        for number, address in enumerate(ADDRESSES):
            inside = ("-n", f"node{number}")
            ip(*inside, "address", "add", f"{address}/24", "dev", f"cable{number}")
            ip(*inside, "link", "set", f"cable{number}", "up")
            ip(*inside, "link", "set", "lo", "up")
        with tempfile.NamedTemporaryFile("w") as hosts:
            names = [f"{address} node{n}\n" for n, address in enumerate(ADDRESSES)]
            hosts.write("127.0.0.1 localhost\n" + "".join(names))
            hosts.flush()
            yield [
                ["ip", "netns", "exec", f"node{n}", "unshare", "--uts", "--mount", "sh", "-c"]
                + [f'mount --bind {hosts.name} /etc/hosts; hostname node{n}; exec "$@"', "sh"]
                for n in range(2)
            ]
    finally:
        for number in range(2):
            ip("netns", "delete", f"node{number}")


def ip(*arguments: str) -> int:
    """Run ip and return its status."""
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
