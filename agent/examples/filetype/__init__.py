"""What is in this file? A real model (magika: file type detection, ONNX) whose bytes live in GPU memory."""
