"""Numerical kernels: the small operations around attention and the linear layer, on any device."""
