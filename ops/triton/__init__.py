"""The op set of GPUs: kernels in Triton, for NVIDIA and AMD alike.

One module per family of kernels. Next to each kernel is its launcher: a function with the signature of the op's
reference and ``out``, the memory for its results (None: allocate). No launcher reads a tensor on the host.
"""
