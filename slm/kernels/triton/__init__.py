"""Our own Triton kernels, for CUDA. What an exported model is made of does not import them."""
