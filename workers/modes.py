"""The modes of the compile and graph layers, as enumerations that import nothing.

They live apart from the code that implements them so that the config and the command line can name them
without importing torch. Semantics: docs/architecture.md and the docstrings below (terms as in vLLM).
"""

from __future__ import annotations

import enum


class AttentionCGSupport(enum.IntEnum):
    """What an attention backend can do inside a captured graph; higher values include lower ones."""

    NEVER = 0
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    UNIFORM_BATCH = 2
    ALWAYS = 3
