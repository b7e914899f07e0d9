"""C++ kernels for a CPU: csrc/ is the library (plain C functions), library.py loads it, the rest calls it.

A new kernel is a .cpp file in csrc/ (kernel.h says how), a `Kernel` with its signature beside the function that calls
it, and one `if library.serves(x)` in the file of the op. Build with `python setup.py build_ext --inplace`.
"""
