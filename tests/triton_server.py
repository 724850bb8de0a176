"""The real tritonserver on loopback, without a GPU; nothing here is a test.

`make test-triton` installs it into TRITON_ENV (.triton): the server inside the wheel nvidia-pytriton, this project
beside it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENV = Path(os.environ.get("TRITON_ENV", ROOT / ".triton"))
READY_S = 60.0


def site_packages() -> Path | None:
    """Of the server's environment, or None where that was not made."""
    return next(iter(ENV.glob("lib/python3.*/site-packages/pytriton/tritonserver/bin/tritonserver")), None)


def missing() -> str:
    """Why the server cannot run here, or ""."""
    return "" if site_packages() else "needs the server of `make test-triton`"


def python_path() -> tuple[str, ...]:
    """Where the server's Python models find this project."""
    found = site_packages()
    assert found is not None
    return (str(found.parents[3]),)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [entry.getsockname()[1] for entry in sockets]


class Server:
    """A server of one repository, which may be killed and started again on the same ports."""

    def __init__(self, repository: Path, *, control: str = "explicit", load: tuple[str, ...] = ()) -> None:
        self.repository, self.control, self.load = repository, control, load
        self.http_port, self.grpc_port, self.metrics_port = free_ports(3)
        self.process: subprocess.Popen[bytes] | None = None
        self.log = Path(tempfile.mkstemp(prefix="tritonserver-", suffix=".log")[1])

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc(self) -> str:
        return f"grpc://127.0.0.1:{self.grpc_port}"

    def start(self) -> None:
        binary = site_packages()
        assert binary is not None
        home = binary.parents[1]
        version = binary.parents[4].name.removeprefix("python")
        stub = home / "backends/python/triton_python_backend_stub"
        if not stub.exists():
            shutil.copy2(home / "python_backend_stubs" / version / stub.name, stub)
        interpreter = (ENV / "bin/python").resolve()
        library = sysconfig.get_config_var("LIBDIR") if interpreter.exists() else ""
        command = [
            str(binary), f"--model-repository={self.repository}", f"--backend-directory={home / 'backends'}",
            "--http-address=127.0.0.1", f"--http-port={self.http_port}", "--grpc-address=127.0.0.1",
            f"--grpc-port={self.grpc_port}", "--metrics-address=127.0.0.1", f"--metrics-port={self.metrics_port}",
            "--allow-gpu-metrics=false", f"--model-control-mode={self.control}", "--exit-timeout-secs=5",
            *(f"--load-model={name}" for name in self.load),
        ]  # fmt: skip
        environment = {**os.environ, "LD_LIBRARY_PATH": f"{library}:{home / 'external_libs'}"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{self.http}/v2/health/ready", timeout=2) as answer,
            ):
                if answer.status == 200:
                    return
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        text = self.log.read_text()[-3000:]
        self.stop()
        raise AssertionError(f"the server is not ready: {text}")

    def kill(self) -> None:
        """SIGKILL the server and its Python processes."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
        self.log.unlink(missing_ok=True)

    def post(self, path: str) -> int:
        """POST to the server's HTTP address; the status."""
        request = urllib.request.Request(f"{self.http}{path}", data=b"", method="POST")
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(error.read().decode()) from error


@contextlib.contextmanager
def serving(repository: Path, *names: str) -> Iterator[Server]:
    server = Server(repository, load=names)
    server.start()
    try:
        yield server
    finally:
        server.stop()
