"""A graph as an ONNX file that ONNX Runtime runs fast."""
