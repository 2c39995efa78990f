"""Triton kernels of paged attention: cache write, split-KV decode, varlen prefill, and how they are sized and launched.

``tuning`` is plain arithmetic and imports anywhere; the other modules import triton, so only
``workers.attention.triton_paged`` imports them, once a backend is made.
"""
