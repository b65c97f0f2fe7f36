"""Triton kernels. Importing this package does not import triton; its modules do."""
