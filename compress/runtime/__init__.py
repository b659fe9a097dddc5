"""An artifact as PyTorch runs it: where, on which kernels, and why on those."""
