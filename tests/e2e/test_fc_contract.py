"""A function as on Function Compute, from its s.yaml to its log: every hook, marker and header, with real processes.

The single clauses (agent/docs/fc-contract.md) are tested in the packages that implement them.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import sys
import textwrap

from agent.v1 import types_pb2
from tests.e2e.bad_world import BadInputStack, running_world
from tests.e2e.raw_http import ask_raw
from tests.e2e.stack import until

FROZEN = types_pb2.Instance.STATE_FROZEN
ID = r"1-[0-9a-f]{8}-[0-9a-f]{8}-[0-9a-f]{12}"
# Like Function Compute's examples: a standard library server that prints the log markers itself.
SERVER = """\
import json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MARKED = {"/initialize": "Initialize", "/invoke": "Invoke", "/pre-freeze": "PreFreeze", "/pre-stop": "PreStop"}

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do(self):
        what, rid = MARKED.get(self.path), self.headers.get("x-fc-request-id")
        if what:
            print(f"FC {what} Start RequestId: {rid}", flush=True)
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        print(f"{self.command} {self.path} {self.headers.get('x-fc-control-path')} {len(body)} bytes", flush=True)
        status = 404 if body == b"fail" else 200
        seen = {key: value for key, value in os.environ.items() if key.startswith("FC_")}
        answer = json.dumps({"headers": dict(self.headers), "environment": seen}).encode()
        if what:
            print(f"FC {what} End RequestId: {rid}", flush=True)
        self.send_response(status)
        self.send_header("content-length", str(len(answer)))
        self.send_header("x-fc-status", str(status))
        self.send_header("x-fc-request-id", "forged")
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("0.0.0.0", int(os.environ["FC_CUSTOM_LISTEN_PORT"])), Handler).serve_forever()
"""
S_YAML = """\
edition: 3.0.0
name: contract
resources:
  contract:
    component: fc3
    props:
      functionName: contract
      runtime: custom-container
      region: cn-shanghai
      timeout: 10
      memorySize: 1024
      gpuConfig: {{gpuType: "{gpu_type}", gpuMemorySize: 1024}}
      customContainerConfig:
        image: host
        webServerMode: true
        entrypoint: [{python}, -c, {server}]
        healthCheckConfig: {{httpGetUrl: /healthz, periodSeconds: 1}}
      environmentVariables: {{FCGPU_RUNTIME_SHMSIZE: "8589934592"}}
      instanceLifecycleConfig:
        initializer: {{handler: index.initialize, timeout: 20}}
        preFreeze: {{handler: index.preFreeze, timeout: 10}}
        preStop: {{handler: index.preStop, timeout: 10}}
      provisionConfig: {{defaultTarget: 1, alwaysAllocateGPU: false}}
      triggers:
        - {{triggerName: http, triggerType: http, triggerConfig: {{authType: anonymous, methods: [GET, POST]}}}}
      hibernode: {{freezeAfter: 300ms}}
"""


async def invoke(world: BadInputStack, body: bytes = b"", *headers: str) -> tuple[int, dict[str, str], bytes]:
    """InvokeFunction."""
    lines = ["POST /2023-03-30/functions/contract/invocations HTTP/1.1", "host: g", "connection: close", *headers]
    head = "\r\n".join([*lines, f"content-length: {len(body)}"]).encode() + b"\r\n\r\n"
    answer = await ask_raw(world.stack.gateway, head + body)
    return answer.status, answer.headers, answer.body


def log_of(answer_headers: dict[str, str]) -> list[str]:
    return base64.b64decode(answer_headers["x-fc-log-result"]).decode().splitlines()


async def deploy(world: BadInputStack) -> None:
    text = S_YAML.format(
        gpu_type=(await world.stack.node()).gpus[0].model, python=json.dumps(sys.executable), server=json.dumps(SERVER)
    )
    path = world.stack.folder / "s.yaml"
    path.write_text(textwrap.dedent(text))
    done = await asyncio.to_thread(world.hibernode, "deploy", "-t", str(path), "--wait", "--timeout", "40s")
    assert done.returncode == 0, done.stderr


async def test_function_as_on_function_compute() -> None:
    async with running_world(1) as world:
        await deploy(world)
        status, headers, body = await invoke(world, b"hello", "x-fc-log-type: Tail")
        seen = json.loads(body)
        assert (status, headers["x-fc-status"]) == (200, "200")
        rid = headers["x-fc-request-id"]
        assert re.fullmatch(ID, rid)
        assert headers["date"].endswith(" GMT")
        assert "server" not in headers
        assert log_of(headers) == [
            f"FC Invoke Start RequestId: {rid}", "POST /invoke /invoke 5 bytes", f"FC Invoke End RequestId: {rid}",
        ]  # fmt: skip
        assert seen["headers"]["x-fc-request-id"] == rid
        assert seen["headers"]["content-type"] == "application/octet-stream"
        assert seen["headers"]["x-fc-region"] == seen["environment"]["FC_REGION"] == "cn-shanghai"
        uid = headers["x-fc-instance-id"]
        assert seen["environment"]["FC_INSTANCE_ID"] == uid
        assert seen["environment"]["FC_FUNCTION_MEMORY_SIZE"] == "1024"

        status, headers, _ = await invoke(world, b"fail")
        assert (status, headers["x-fc-status"]) == (404, "404"), "its own answer, not ours"
        assert "x-fc-log-result" not in headers

        await world.stack.wait_for_state(FROZEN, 1)
        status, headers, _ = await invoke(world, b"again", "x-fc-log-type: Tail")
        assert (status, headers["x-fc-instance-id"]) == (200, uid), "woken, not started anew"
        assert float(headers["x-hibernode-wake-ms"]) > 0
        assert log_of(headers)[1] == "POST /invoke /invoke 5 bytes"

        await world.stack.remove_functions(["contract"])

        async def ended() -> bool:
            return not await world.alive()

        await until("it has ended", ended, 20.0)
        log = (await asyncio.to_thread(world.hibernode, "logs", uid)).stdout
        assert re.match(rf"FC Initialize Start RequestId: {ID}\nPOST /initialize /initialize 0 bytes\nFC Init", log)
        assert log.index("/initialize") < log.index("GET /healthz None") < log.index("POST /invoke")
        assert re.search(rf"FC PreFreeze Start RequestId: {ID}\nGET /pre-freeze /pre-freeze 0 bytes\nFC PreFreeze", log)
