"""C++ kernels for a CPU: csrc/ is the library (plain C functions), library.py loads it, the rest calls it.

A new kernel is a .cpp file in csrc/ (kernel.h says how), a `Kernel` with its signature beside the function that calls
it under the op's name, and its line in griffin/ops/device.py. Build with `python setup.py build_ext --inplace`.
"""
