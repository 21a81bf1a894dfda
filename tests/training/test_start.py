"""How several processes find each other: by hand, or by what started them."""

import os
import random
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import pytest

from qtjax.errors import QtjaxError
from qtjax.parallel import join_processes

ROOT = Path(__file__).resolve().parents[2]

JOINED = """
import os, sys
from pathlib import Path
import jax
import numpy as np
from qtjax.parallel import all_rows, join_processes
if "GCE_METADATA_IP" in os.environ:
    del os.environ["TPU_SKIP_MDS_QUERY"]  # do not ask the metadata server: JAX sets it where it sees no TPU
join_processes("auto", 0, -1)
rows = all_rows(np.full(1, jax.process_index())).tolist()
Path(sys.argv[1]).write_text(f"{jax.process_index()} of {jax.process_count()}, {jax.device_count()} devices, {rows}")
"""


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("localhost", 0))
        return own.getsockname()[1]


def is_free(port: int) -> bool:
    with socket.socket() as own:
        return own.connect_ex(("localhost", port)) != 0


def join_two(tmp_path: Path, *own: dict[str, object]) -> None:
    """Starts two processes of two devices with these variables; they meet, count four devices and exchange what they hold."""
    started = []
    for i, variables in enumerate(own):
        clusters = ("SLURM_", "OMPI_", "TPU_", "GCE_", "MEGASCALE_", "JAX_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(clusters)}
        env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "NO_PROXY": "127.0.0.1"}
        env |= {name: str(value) for name, value in variables.items()}
        started.append(subprocess.Popen([sys.executable, "-c", JOINED, str(tmp_path / str(i))], env=env))
    try:
        assert [process.wait(timeout=200) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    assert [(tmp_path / str(i)).read_text() for i in range(2)] == [f"{i} of 2, 4 devices, [0, 1]" for i in range(2)]


@pytest.mark.parametrize("launcher", ["SLURM", "Open MPI"])
def test_auto_finds_what_started_it(tmp_path, launcher):
    """`--coordinator auto` reads number, place and first address of the processes from the launcher's variables."""
    first = 65535 - 2**12 + 1  # of the ports among which JAX picks one by the job's number
    port = next(port for port in random.sample(range(first, 65536), 100) if is_free(port))
    job = port - first
    own = {
        "SLURM": {"SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": 2},
        "Open MPI": {"OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": 2},
    }[launcher]
    numbers = {"SLURM": ("SLURM_PROCID", "SLURM_LOCALID"), "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK")}
    join_two(tmp_path, *(own | dict.fromkeys(numbers[launcher], i) for i in range(2)))


@contextmanager
def metadata_server(values: dict[str, str]) -> Iterator[str]:
    """The address of a server that answers as a TPU VM's does: its attributes by name."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            found = name in values and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(values[name].encode() if found else b"")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@pytest.mark.parametrize("endpoints", ["127.0.0.1,nowhere.invalid", "unknown:unknown:127.0.0.1,unknown:unknown:nowhere.invalid"])
def test_auto_asks_a_tpu_vm_for_its_place_in_the_pod(tmp_path, endpoints):
    """Each VM's metadata says how many VMs the pod has, which this one is, and where the first one is; in its older form too."""
    port = free_port()
    with ExitStack() as stack:
        own = []
        for i in range(2):
            values = {"agent-worker-number": str(i), "worker-network-endpoints": endpoints, "tpu-env": "TYPE: 'V5LITE_POD'"}
            address = stack.enter_context(metadata_server(values))
            own.append({"JAX_FORCE_TPU_INIT": 1, "JAX_COORDINATOR_PORT": port, "GCE_METADATA_IP": address})
        join_two(tmp_path, *own)


def test_auto_finds_its_place_in_a_tpu_pod_on_kubernetes(tmp_path):
    """There variables say it."""
    own = {
        "JAX_FORCE_TPU_INIT": 1, "JAX_COORDINATOR_PORT": free_port(), "TPU_WORKER_HOSTNAMES": "127.0.0.1,nowhere.invalid",
        "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1", "MEGASCALE_NUM_SLICES": 1, "MEGASCALE_SLICE_ID": 0,
    }  # fmt: skip
    join_two(tmp_path, *(own | {"TPU_WORKER_ID": i} for i in range(2)))


@pytest.mark.parametrize(("given", "message"), [
    (("", 2, -1), "need --coordinator"),
    (("auto", 2, 0), "finds --processes and --process by itself"),
    (("localhost", 2, 0), "must be HOST:PORT"),
    (("localhost:x", 2, 0), "must be HOST:PORT"),
    (("localhost:9000", 2, 2), "0 <= process < processes"),
    (("localhost:9000", 0, 0), "0 <= process < processes"),
    (("auto", 0, -1), "--coordinator auto: .*give HOST:PORT"),
])  # fmt: skip
def test_what_does_not_fit_is_one_line(given, message):
    """Contradictions, an address without a port, a process that does not exist, no cluster to ask."""
    with pytest.raises(QtjaxError, match=message):
        join_processes(*given)


@pytest.mark.parametrize("given", [("auto", 0, -1), ("localhost:9000", 2, 0)])
@pytest.mark.parametrize(("error", "remedy"), [
    (ConnectionError("no answer"), "ConnectionError: no answer; JAX asks a TPU VM's metadata server"),
    (ModuleNotFoundError("No module named 'requests'"), "ModuleNotFoundError: No module named 'requests'; .*pip install"),
    (KeyError("OMPI_COMM_WORLD_SIZE"), "KeyError: 'OMPI_COMM_WORLD_SIZE'; "),
])  # fmt: skip
def test_a_pod_that_does_not_answer_is_one_line(monkeypatch, given, error, remedy):
    """JAX, which asks with HOST:PORT too, passes on errors of the network and of what it asks with."""

    def initialize(**_):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(QtjaxError, match=f"--coordinator {given[0]}: {remedy}"):
        join_processes(*given)
