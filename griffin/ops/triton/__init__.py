"""Triton kernels: every file is one kernel or two, with the calls that launch them.

None may be imported where triton is not installed; griffin/ops/device.py does when one is about to be called.
"""
