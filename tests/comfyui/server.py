"""A real ComfyUI server in a process of its own, on the CPU and a free port, and a client for its HTTP interface."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkout import checkouts, on_cpu

START = 180.0  # seconds that a server may take to answer
Event = dict[str, Any]


@dataclass
class Server:
    """A running server. base: its base directory; log: where it writes what it prints."""

    process: subprocess.Popen[bytes]
    base: Path
    port: int
    log: Path

    @property
    def url(self) -> str:
        """Address without a slash at the end."""
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> Any:
        """Decoded JSON of GET `path`."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return json.load(answer)

    def fetch(self, path: str) -> bytes:
        """Body of GET `path`."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read()

    def post(self, path: str, body: Any) -> Any:
        """Decoded JSON of POST `path`, None where the answer is empty. Raises RuntimeError with the server's text."""
        request = urllib.request.Request(
            self.url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.code}: {error.read().decode()}") from error
        return json.loads(text) if text else None

    def run(self, prompt: dict[str, Any], on_event: Callable[[Event], None] | None = None) -> Event:
        """Queue an API prompt and wait for its end; returns its history entry. on_event: gets every message."""
        return asyncio.run(self._run(prompt, on_event or (lambda _event: None)))

    async def _run(self, prompt: dict[str, Any], on_event: Callable[[Event], None]) -> Event:
        import aiohttp  # one of ComfyUI's requirements, not of this project

        client = uuid.uuid4().hex
        loop = asyncio.get_running_loop()
        address = f"{self.url}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as messages:
            body = {"prompt": prompt, "client_id": client}
            queued = await loop.run_in_executor(None, self.post, "/prompt", body)
            async for message in messages:
                if message.type != aiohttp.WSMsgType.TEXT:
                    continue
                event = json.loads(message.data)
                await loop.run_in_executor(None, on_event, event)
                if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    break
        return await loop.run_in_executor(None, self._history, queued["prompt_id"])

    def _history(self, prompt_id: str) -> Event:
        for _ in range(100):
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return history[prompt_id]
            time.sleep(0.1)
        raise AssertionError(f"prompt {prompt_id} never came into the history")

    def peak_bytes(self) -> int:
        """The largest resident set the server has had so far (Linux)."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no VmHWM")

    def printed(self) -> str:
        """Everything the server has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(base: Path, **environment: str) -> Iterator[Server]:
    """A server on `base`, with more environment variables; it is gone when the block ends."""
    checkout, port, log = checkouts()[0], free_port(), base / "server.log"
    command = [
        sys.executable,
        "main.py",
        *(["--cpu"] if on_cpu() else []),
        "--disable-api-nodes",
        "--disable-auto-launch",
        "--port",
        str(port),
    ]
    command += ["--base-directory", str(base), "--database-url", f"sqlite:///{base}/user/comfyui.db"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "DO_NOT_TRACK": "1", **environment}
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=output, stderr=subprocess.STDOUT)
        server = Server(process, base, port, log)
        try:
            _wait(server)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(server: Server) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended while starting:\n{server.printed()[-4000:]}")
        try:
            server.get("/system_stats")
        except OSError:
            time.sleep(0.3)
        else:
            return
    raise RuntimeError(f"ComfyUI did not answer within {START:g} s:\n{server.printed()[-4000:]}")
