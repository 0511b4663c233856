"""What is written in this picture? A real OCR server (rapidocr, three ONNX models) whose models live in GPU memory."""
