"""Models larger than memory: read, quantized and written block after block."""
