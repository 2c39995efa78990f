"""What an operator may set about the HTTP layer itself. Knows nothing about models."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class ApiSettings:
    """Limits of the HTTP layer.

    Attributes:
        max_body_bytes: Largest request body; beyond it the answer is 413. Counted while reading.
        max_choices: Most completions in one request: prompts times ``n``.
        inline_tokenization_chars: Prompts of up to this many characters are rendered and tokenised on the event
            loop (about 0.2 ms per 1,000 characters); longer ones on a thread.
        tokenizer_threads: Threads for those.
        stalled_client_s: A client that takes nothing for this long, while something waits to be sent, is given up.
        system_fingerprint: Value of the field of that name in responses.
    """

    max_body_bytes: int = 8 * 2**20
    max_choices: int = 1024
    inline_tokenization_chars: int = 2048
    tokenizer_threads: int = 2
    stalled_client_s: float = 60.0
    system_fingerprint: str | None = None
