"""One request's life across replicas: what its client already has, and how another replica goes on from there.

Every attempt is a request of its own to the engine: the same prompt and parameters, the tokens so far as
``resume_token_ids``, and an id of its own, so that late messages of an earlier attempt find nobody. A request without
a seed gets one here, before its first attempt, since another engine would draw its own. Knows requests and chunks;
knows nothing about Ray, nor how a replica is chosen.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import secrets

from cluster.messages import GenerateRequest
from workers.errors import EngineDeadError
from workers.outputs import TokenChunk
from workers.sampling_params import SamplingParams

#: Seeds drawn here are positive, and -1 (no seed) is not among them.
_SEED_BITS = 62


class ReplicaLostError(EngineDeadError):
    """A replica no longer serves what it was given: it died, its engine stopped or hangs, or it is silent.

    Attributes:
        death: Names the event: requests that were lost together have the same.
    """

    def __init__(self, message: str, death: str) -> None:
        super().__init__(message)
        self.death = death


class ResumableRequest:
    """A request, and the part of its output that was handed out.

    Attributes:
        is_finished: Its last chunk was handed out.
    """

    def __init__(self, request: GenerateRequest) -> None:
        self._request = dataclasses.replace(request, params=_with_seed(request.params))
        self._token_ids = [*request.resume_token_ids]
        self._num_attempts = 0
        self._has_begun = False
        self.is_finished = False

    @property
    def num_tokens(self) -> int:
        """Output tokens so far."""
        return len(self._token_ids)

    @functools.cached_property
    def digest(self) -> bytes:
        """Of what an engine computes for it, whoever asks; without the seed, which clients vary."""
        params = dataclasses.replace(self._request.params, seed=None)
        return hashlib.blake2b(repr((self._request.prompt_token_ids, params)).encode(), digest_size=16).digest()

    def next_attempt(self) -> GenerateRequest:
        """What to send to the next replica."""
        attempt, self._num_attempts = self._num_attempts, self._num_attempts + 1
        if not attempt:
            return self._request
        params = self._request.params
        if self._has_begun and params.prompt_logprobs is not None:
            params = dataclasses.replace(params, prompt_logprobs=None)
        return dataclasses.replace(
            self._request,
            request_id=f"{self._request.request_id}~{attempt}",
            params=params,
            resume_token_ids=tuple(self._token_ids),
            attempt=attempt,
        )

    def accept(self, chunk: TokenChunk) -> None:
        """Note a chunk of the current attempt, and make it what the client may see.

        What only a request's first chunk carries (cached tokens, prompt logprobs) is taken off a resumed one's.
        """
        self._token_ids.extend(chunk.token_ids)
        if self._num_attempts > 1:
            chunk.request_id = self._request.request_id
            if self._has_begun:
                chunk.num_cached_tokens = chunk.prompt_logprobs = None
        self._has_begun = True
        self.is_finished = chunk.finish_reason is not None


def _with_seed(params: SamplingParams) -> SamplingParams:
    if params.seed is not None or params.is_greedy:
        return params
    return dataclasses.replace(params, seed=secrets.randbits(_SEED_BITS))
