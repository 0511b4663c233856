#!/usr/bin/env bash
# Function Compute's Python SDK repeats a refused invocation with an empty body, and reports its answer as a success.
#
# alibabacloud_fc20230330 4.8.3, alibabacloud_tea_openapi 0.4.6, darabonba-core 1.0.9, CPython 3.11.7, Linux 6.18,
# 2026-11-30. The service is a small HTTP server on loopback that notes what it receives; its first answer is 429 with
# the code ResourceThrottled, its second 200.
#
# InvokeFunctionRequest declares its body as BinaryIO, a stream. With retry options for that code, the client reads the
# stream for the first request; for the second one it reads on, at the end of the same stream, and sends an empty body.
# Expected: the same body again, or an error. Seen: the function is invoked without its input and the caller gets 200.
# A body of type bytes is sent again as it should be. The asyncio variant of the call is the other way round: it refuses
# the stream before anything is sent ("object bytes can't be used in 'await' expression"), and takes bytes.
#
# Why it matters: refusals that ask for another try are daily business where GPUs are shared. The function computes on
# nothing (and is billed for it), and a wrong answer looks like a right one. Pass bytes, never a stream.
#
# Seen:
#     stream: status 200, bodies received: [b'the input', b'']
#     bytes: status 200, bodies received: [b'the input', b'the input']
#     stream, asyncio: object bytes can't be used in 'await' expression, bodies received: []
#     bytes, asyncio: status 200, bodies received: [b'the input', b'the input']
#     as stated: the second try of a stream has an empty body
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
timeout 90 "$work/venv/bin/python" -m pip install -q alibabacloud_fc20230330==4.8.3 alibabacloud_tea_openapi==0.4.6 \
    darabonba-core==1.0.9 >"$work/pip.log" 2>&1 || {
    echo "not installed within 90 s: $(grep -v WARNING "$work/pip.log" | tail -n 1)"
    exit 77
}
export HOME="$work" NO_PROXY="127.0.0.1"
timeout 60 "$work/venv/bin/python" - <<'EOF'
import asyncio
import io
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from alibabacloud_fc20230330.client import Client
from alibabacloud_fc20230330.models import InvokeFunctionRequest
from alibabacloud_tea_openapi.models import Config
from darabonba.policy.retry import RetryOptions

INPUT = b"the input"
REFUSAL = b'{"Code": "ResourceThrottled", "Message": "no GPU is free"}'
RETRY = {"retryable": True, "retryCondition": [{"maxAttempts": 3, "errorCode": ["ResourceThrottled"]}]}
received = []


class Service(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        received.append(self.rfile.read(int(self.headers["Content-Length"])))
        status, answer = (429, REFUSAL) if len(received) == 1 else (200, b"answer")
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *arguments):
        pass


def invoke(body, by_asyncio=False):
    received.clear()
    options = RetryOptions(RETRY)
    endpoint = f"127.0.0.1:{service.server_port}"
    config = Config(
        access_key_id="id",
        access_key_secret="secret",
        protocol="http",
        region_id="cn-hangzhou",
        endpoint=endpoint,
        retry_options=options,
    )
    client = Client(config)
    request = InvokeFunctionRequest(body=body)
    try:
        if by_asyncio:
            answer = asyncio.run(client.invoke_function_async("echo", request))
        else:
            answer = client.invoke_function("echo", request)
    except Exception as error:
        result = str(error)
    else:
        result = f"status {answer.status_code}"
    kind = "bytes" if isinstance(body, bytes) else "stream"
    print(f"{kind}{', asyncio' if by_asyncio else ''}: {result}, bodies received: {received}")
    return list(received)


service = ThreadingHTTPServer(("127.0.0.1", 0), Service)
threading.Thread(target=service.serve_forever, daemon=True).start()
of_stream = invoke(io.BytesIO(INPUT))
of_bytes = invoke(INPUT)
invoke(io.BytesIO(INPUT), by_asyncio=True)
invoke(INPUT, by_asyncio=True)
if of_bytes != [INPUT, INPUT]:
    sys.exit("changed: a body of bytes is not sent twice either")
if of_stream != [INPUT, b""]:
    sys.exit("changed: the second try of a stream is not an empty body")
print("as stated: the second try of a stream has an empty body")
EOF
