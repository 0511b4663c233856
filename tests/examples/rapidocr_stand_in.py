"""A minimal package `rapidocr_onnxruntime` in a folder, with readable models, for the example `ocr`.

Its "text" is derived from its three models and the picture, so the answer shows which bytes were used. The real
package, a third of a gigabyte with dependencies, runs in tests/engines.
"""

from __future__ import annotations

from pathlib import Path

PACKAGE = """
import pathlib, sys
print("rapidocr is loaded", file=sys.stderr, flush=True)

class RapidOCR:
    def __init__(self, *, det_model_path, cls_model_path, rec_model_path, intra_op_num_threads, inter_op_num_threads,
                 det_limit_type):
        assert (intra_op_num_threads, inter_op_num_threads) == (1, 1)
        paths = [pathlib.Path(path) for path in (det_model_path, cls_model_path, rec_model_path)]
        assert all(path.is_file() for path in paths)
        self.models = [path.read_bytes() for path in paths]
        if not all(model.startswith(b"onnx") for model in self.models):
            raise RuntimeError("INVALID_PROTOBUF")
        print("sessions are built", file=sys.stderr, flush=True)

    def load_img(self, picture):
        if not picture.startswith(b"picture "):
            raise OSError("cannot identify image file")
        return picture.removeprefix(b"picture ").decode()

    def __call__(self, pixels):
        if not pixels:
            return None, None
        words = [model.decode("latin-1").split(" ")[1] for model in self.models]
        return [[[[0, 0]], f"{word} {pixels}", 0.98765] for word in words], [0.1, 0.0, 0.1]
"""
UTILS = """
import yaml

def read_yaml(path):
    return yaml.safe_load(path.read_text())
"""
CONFIG = """
Det: {model_path: models/where.onnx}
Cls: {model_path: models/upright.onnx}
Rec: {model_path: models/what.onnx}
"""
MODELS = {
    "where": b"onnx found " + bytes(300),
    "upright": b"onnx turned " + bytes(200),
    "what": b"onnx read " + bytes(400),
}


def write_package(folder: Path) -> Path:
    """Write the package into `folder`, for use in PYTHONPATH; returns the folder."""
    package = folder / "rapidocr_onnxruntime"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text(PACKAGE)
    (package / "utils.py").write_text(UTILS)
    (package / "config.yaml").write_text(CONFIG)
    for name, content in MODELS.items():
        (package / "models" / f"{name}.onnx").write_bytes(content)
    return folder
