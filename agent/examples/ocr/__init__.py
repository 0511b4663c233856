"""Reads text in pictures with a real OCR server (rapidocr, three ONNX models) whose models live in GPU memory."""
