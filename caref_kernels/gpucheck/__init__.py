"""What only a GPU, or only its compiler, can show: ``python -m caref_kernels.gpucheck``."""
