"""Triton kernels: every file is one kernel or two, with the calls that launch them.

Only `serve` may be imported where triton is not installed; the ops import the others when they are about to call them.
"""
