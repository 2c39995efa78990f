"""The OpenAI-compatible HTTP layer: validation, rendering, streaming, errors. Knows nothing about Ray or tensors.

What lies below is behind the two protocols of :mod:`cluster.api.client`; the entry is
:func:`cluster.api.app.create_app`.
"""
