"""What an autoscaling policy sees: the load of one model, in tokens, and what tokens cost. Plain data.

Numbers reach Serve's controller as each replica's custom metrics, which are named numbers; :class:`ReplicaLoad` is
written to them and read back here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self

from cluster.messages import IngressLoad


@dataclasses.dataclass(frozen=True, slots=True)
class ReplicaLoad:
    """One replica. Filled by the replica.

    Attributes:
        num_requests: Running and waiting there.
        prompt_tokens: Queued there, not computed yet.
        output_tokens: Most tokens that its requests may still generate.
        prompt_token_s: Seconds per prompt token, measured; 0 until anything ran.
        output_token_s: Seconds per generated token in a full batch, measured; 0 until anything ran.
        efficiency: The part of its time that full steps had while it was full; 0 until it was. Less than 1 where it
            waits for something else, say for a processor that it shares, or has no KV blocks for a full batch.
        start_s: Seconds that it took to become ready.
        ingress: What the ingresses reported to it, added up: all tell all replicas the same.
    """

    num_requests: float
    prompt_tokens: float
    output_tokens: float
    prompt_token_s: float
    output_token_s: float
    efficiency: float
    start_s: float
    ingress: IngressLoad

    def to_metrics(self) -> dict[str, float]:
        """As named numbers."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "ingress"}
        return own | {f"ingress_{name}": value for name, value in dataclasses.asdict(self.ingress).items()}

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, float]) -> Self | None:
        """What :meth:`to_metrics` made; None if numbers are missing."""
        own = [field.name for field in dataclasses.fields(cls) if field.name != "ingress"]
        names = [field.name for field in dataclasses.fields(IngressLoad)]
        try:
            ingress = IngressLoad(**{name: metrics[f"ingress_{name}"] for name in names})
            return cls(**{name: metrics[name] for name in own}, ingress=ingress)
        except KeyError:
            return None


@dataclasses.dataclass(frozen=True, slots=True)
class ModelLoad:
    """One model at the moment of a decision.

    Attributes:
        num_replicas: Running now; some may not have reported yet.
        num_target: How many there should be by the last decision: those beyond ``num_replicas`` are starting.
        replicas: The reports.
        start_s: How long a start takes, as the last ones did.
        efficiency: Of a full replica, the best one's.
        growth_tokens_per_s: How fast :attr:`backlog_tokens` grows, negative if it shrinks; None unless requests have
            waited long enough, before the same replicas, to say.
    """

    num_replicas: int
    num_target: int
    replicas: Sequence[ReplicaLoad]
    start_s: float
    efficiency: float = 1.0
    growth_tokens_per_s: float | None = None

    @property
    def backlog_tokens(self) -> float:
        """Tokens to compute and to generate for the requests that wait or run."""
        ingress = self.ingress
        queued = sum(replica.prompt_tokens + replica.output_tokens * ingress.output_ratio for replica in self.replicas)
        return queued + ingress.held_prompt_tokens + ingress.held_output_tokens

    @property
    def ingress(self) -> IngressLoad:
        """What waits at the ingresses, and comes in: the newest word, which is the largest while load grows."""
        return max(
            (replica.ingress for replica in self.replicas),
            key=lambda load: (load.num_held, load.has_arrivals, load.prompt_tokens_per_s + load.output_tokens_per_s),
            default=IngressLoad(),
        )
