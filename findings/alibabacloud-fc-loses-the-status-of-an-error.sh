#!/usr/bin/env bash
# Function Compute's Python SDK hides the status of an answer like 502 or 504 behind a complaint about JSON.
#
# alibabacloud_fc20230330 4.8.3, alibabacloud_tea_openapi 0.4.6, darabonba-core 1.0.9, CPython 3.11.7, Linux 6.18,
# 2026-11-30. The service is a small HTTP server on loopback with the answers below.
#
# invoke_function() raises for a status of 400 and more. If the body is a JSON object, the exception has status_code.
# Expected of other bodies (the error page of a proxy, text of the function's own server, nothing at all): an exception
# with the status. Seen: "UnretryableException" with a text about parsing the body; it has no status_code, and its code
# is None, so 404, 502 and 504 cannot be told apart. Nor does its inner exception know more.
#
# Why it matters: behind a proxy or gateway, "come again later" (503, 504) and "no such function" (404) want opposite
# reactions, and code that goes by status_code fails with AttributeError. Whoever serves these clients should answer
# every error with a JSON object that has Code and Message.
#
# Seen:
#     404 {"Code": "FunctionNotFound", "Message": "no"}: ClientException, status_code 404
#     502 <html>Bad Gateway</html>: UnretryableException, status_code none, Failed to parse the value as json format, Value: "<html>Bad Gateway</html>".
#     504 (nothing): UnretryableException, status_code none, Failed to parse the value as json format, Value: "".
#     500 ["out of memory"]: UnretryableException, status_code none, 'list' object has no attribute 'get'
#     as stated: the status is lost unless the body is a JSON object
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
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from alibabacloud_fc20230330.client import Client
from alibabacloud_fc20230330.models import InvokeFunctionRequest
from alibabacloud_tea_openapi.models import Config

OBJECT = (404, b'{"Code": "FunctionNotFound", "Message": "no"}')
OTHERS = [(502, b"<html>Bad Gateway</html>"), (504, b""), (500, b'["out of memory"]')]


class Service(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    answer = OBJECT

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        status, body = Service.answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def found_status(answer):
    """The status that the exception tells, None if it tells none."""
    Service.answer = answer
    try:
        client.invoke_function("echo", InvokeFunctionRequest(body=b"input"))
    except Exception as error:
        status = getattr(error, "status_code", None)
        code, body = answer
        text = "" if status else ", " + str(error)
        print(f"{code} {body.decode() or '(nothing)'}: {type(error).__name__}, status_code {status or 'none'}{text}")
        return status
    sys.exit("changed: no exception for a status of 400 and more")


service = ThreadingHTTPServer(("127.0.0.1", 0), Service)
threading.Thread(target=service.serve_forever, daemon=True).start()
endpoint = f"127.0.0.1:{service.server_port}"
config = Config(
    access_key_id="id",
    access_key_secret="secret",
    protocol="http",
    region_id="cn-hangzhou",
    endpoint=endpoint,
)
client = Client(config)
of_object = found_status(OBJECT)
of_others = [found_status(answer) for answer in OTHERS]
if of_object != OBJECT[0]:
    sys.exit("changed: the status is lost even if the body is a JSON object")
if any(of_others):
    sys.exit("changed: the status is told for other bodies too")
print("as stated: the status is lost unless the body is a JSON object")
EOF
