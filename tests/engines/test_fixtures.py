"""The engines and images on which the other tests here rely."""

from __future__ import annotations

import pytest

from tests.engines import images
from tests.engines.engines import Engine


@pytest.mark.parametrize("image", [images.BUSYBOX, images.BAD, images.ECHO])
def test_images_run(engine: Engine, image: str) -> None:
    images.load(engine, image)
    assert "PATH=/bin" in engine.must("GET", f"/images/{image}/json")["Config"]["Env"] or image == images.ECHO
    command = {images.ECHO: ["python3", "-c", "import agent.examples.echo; print('fine')"]}
    body = {
        "Image": image,
        "Entrypoint": command.get(image, ["/bin/sh", "-c", "echo fine"]),  # for Podman, [] means the image's own
        "HostConfig": {"NetworkMode": "none"},
    }
    made = engine.must("POST", "/containers/create", body=body, query={"name": "fixture"})
    engine.must("POST", "/containers/fixture/start")
    assert engine.must("POST", "/containers/fixture/wait")["StatusCode"] == 0
    said = engine.must("GET", "/containers/fixture/logs", query={"stdout": "1"})
    assert said.endswith(b"fine\n")
    assert [entry["Id"] for entry in engine.ps()] == [made["Id"]]
    engine.remove("fixture")
    assert engine.ps() == []


def test_container_outlives_its_engine(engine: Engine) -> None:
    body = {"Image": images.BUSYBOX, "Cmd": ["sleep", "86399"], "HostConfig": {"NetworkMode": "none"}}
    engine.must("POST", "/containers/create", body=body, query={"name": "fixture"})
    engine.must("POST", "/containers/fixture/start")
    before = engine.must("GET", "/containers/fixture/json")["State"]
    for end in (engine.kill, engine.stop):
        end()
        assert not engine.answers()
        engine.start()
        after = engine.must("GET", "/containers/fixture/json")["State"]
        assert (after["Pid"], after["Running"]) == (before["Pid"], True)
    engine.remove("fixture")
