"""These tests launch kernels themselves: they are collected where Triton runs, on a GPU or in place of one."""

from fastdistill.backend import obstacle_to_triton
from fastdistill.testing import DEVICE

if obstacle_to_triton(DEVICE, None) is not None:
    collect_ignore_glob = ["test_*.py"]
