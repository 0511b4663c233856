"""Detects file types with a real model (magika, ONNX) whose bytes live in GPU memory."""
