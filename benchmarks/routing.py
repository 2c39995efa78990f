"""Routing policies on simulated replicas under a load of shared prefixes: hit rate, time to first token, padding.

Every replica is the engine's own scheduler with its own prefix cache; only the model is replaced, by the time that a
step takes: a fixed part and a part per computed row, both measured (``PROFILES``). The router sees what an ingress
sees: the state after each replica's last step, and what it has sent since. No Ray, no model, the same numbers on every
machine. Ends in one JSON line.

    python benchmarks/routing.py --replicas 4 --load 0.8
"""

from __future__ import annotations

import argparse
import bisect
import dataclasses
import heapq
import itertools
import json
import random
import statistics
from typing import Any

from cluster.messages import ReplicaState
from cluster.routing.prefix_index import PrefixIndex
from cluster.routing.registry import POLICIES, LoadedPolicy
from cluster.routing.snapshot import ReplicaSnapshot, RoutingRequest
from workers.request import Request, token_array
from workers.sampling_params import SamplingParams
from workers.scheduler.block_hash import hash_blocks
from workers.scheduler.output import SchedulerOutput
from workers.scheduler.prefix_journal import PrefixJournal, names_of
from workers.scheduler.scheduler import Scheduler, SchedulerConfig

BLOCK_SIZE = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Profile:
    """A replica's hardware and limits.

    Attributes:
        fixed_s: Seconds of a step whatever is in it.
        row_s: Seconds more for every decode row, padding included.
        prefill_s: Seconds more for every prompt token.
        sizes: Capture sizes; empty where batches are not padded.
    """

    fixed_s: float
    row_s: float
    prefill_s: float
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    sizes: tuple[int, ...]


#: Measured. The Llama-1B shape on one H200: 1.17 ms per decode step at batch 1 and 2.43 ms at 256, 117 ms for 256
#: prompts of 128 tokens (benchmarks/results/offline_h200_202611.md). SmolLM2-135M on two CPU cores: 43.2 ms at batch 1
#: and 49.0 ms at 8, 2.1 s for 8 prompts of 128 tokens (benchmarks/results/cpu_smollm2_202611.md).
PROFILES = {
    "h200-1b": Profile(1.165e-3, 4.94e-6, 3.5e-6, 64, 2048, 4096, (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)),
    "cpu-smollm2": Profile(42.4e-3, 0.83e-3, 2.05e-3, 16, 512, 1024, ()),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """Requests that come at random, each with one of several long prefixes and a tail of its own.

    Attributes:
        share: Of what the replicas could do without any cache hit.
    """

    num_requests: int = 2000
    share: float = 0.8
    num_prefixes: int = 48
    prefix_tokens: int = 1024
    tail_tokens: int = 64
    output_tokens: int = 64
    seed: int = 0


class SimulatedReplica:
    """A scheduler whose steps take time but compute nothing."""

    def __init__(self, name: str, profile: Profile) -> None:
        self.name = name
        self.profile = profile
        self.prefixes = PrefixIndex()
        self.unreported: dict[str, int] = {}
        self.rows = self.padded_rows = 0
        self._scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=profile.max_num_seqs,
                max_num_batched_tokens=profile.max_num_batched_tokens,
                block_size=BLOCK_SIZE,
                num_blocks=profile.num_blocks,
                max_model_len=8192,
            )
        )
        self._scheduler.block_pool.journal = PrefixJournal()
        self._running: SchedulerOutput | None = None
        self._num_steps = 0
        self.state = self._report()

    @property
    def is_idle(self) -> bool:
        return self._running is None

    @property
    def hit_rate(self) -> tuple[int, int]:
        pool = self._scheduler.block_pool
        return pool.num_hit_tokens, pool.num_query_tokens

    def add(self, request: Request, cached_tokens: int) -> None:
        self._scheduler.add(request)
        self.unreported[request.request_id] = request.num_prompt_tokens + 1 - cached_tokens

    def start_step(self) -> float | None:
        """Seconds that the next step takes, or None if there is nothing to do."""
        output = self._running = self._scheduler.schedule()
        if output is None:
            return None
        num_decodes = sum(item.num_tokens == 1 for item in output.scheduled)
        num_prefill = output.num_tokens - num_decodes
        padded, sizes = num_decodes, self.profile.sizes
        if not num_prefill and sizes:
            index = bisect.bisect_left(sizes, num_decodes)
            padded = sizes[index] if index < len(sizes) else num_decodes
        self.rows += num_decodes
        self.padded_rows += padded
        profile = self.profile
        return profile.fixed_s + profile.row_s * padded + profile.prefill_s * num_prefill

    def end_step(self) -> list[tuple[str, bool]]:
        """The requests that got a token, each with whether it was its last; the router hears of the step."""
        assert self._running is not None
        samples = sum(item.samples for item in self._running.scheduled)
        updates = self._scheduler.update(self._running, [1] * samples)
        self._running = None
        self._num_steps += 1
        changes = self._scheduler.block_pool.journal.take() if self._scheduler.block_pool.journal else None
        if changes is not None:
            self.prefixes.change(changes)
        self.state = self._report()
        self.unreported.clear()
        return [(update.request.request_id, update.finish_reason is not None) for update in updates]

    def snapshot(self, names: list[bytes]) -> ReplicaSnapshot:
        cached_tokens = self.prefixes.longest_prefix(names) * BLOCK_SIZE
        return ReplicaSnapshot(
            self.name, self.state, len(self.unreported), sum(self.unreported.values()), cached_tokens
        )

    def _report(self) -> ReplicaState:
        stats = self._scheduler.stats()
        return ReplicaState(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            free_blocks=stats.num_free_blocks,
            total_blocks=stats.num_total_blocks,
            outstanding_tokens=stats.num_outstanding_tokens,
            tokens_to_generate=stats.num_tokens_to_generate,
            token_budget_left=stats.token_budget_left,
            cached_blocks=stats.num_cached_blocks,
            max_num_seqs=self.profile.max_num_seqs,
            decode_sizes=self.profile.sizes,
            artifact_warm=True,
            step=self._num_steps,
        )


def make_requests(load: Load, profile: Profile, num_replicas: int) -> list[tuple[float, Request]]:
    """Requests and the seconds at which they come."""
    rng = random.Random(load.seed)
    prefixes = [[rng.randrange(50_000) for _ in range(load.prefix_tokens)] for _ in range(load.num_prefixes)]
    prompt_tokens = load.prefix_tokens + load.tail_tokens
    batch = profile.max_num_seqs
    decode_s = load.output_tokens * (profile.fixed_s / batch + profile.row_s)
    requests_per_s = load.share * num_replicas / (prompt_tokens * profile.prefill_s + decode_s)
    now_s, arrivals = 0.0, []
    for index in range(load.num_requests):
        now_s += rng.expovariate(requests_per_s)
        tokens = [*rng.choice(prefixes), *(rng.randrange(50_000) for _ in range(load.tail_tokens))]
        max_tokens = max(1, round(load.output_tokens * rng.uniform(0.5, 1.5)))
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        arrivals.append((now_s, Request(str(index), token_array(tokens), len(tokens), params, max_tokens)))
    return arrivals


def simulate(policy: LoadedPolicy, load: Load, profile: Profile, num_replicas: int) -> dict[str, Any]:
    """Route every request of the load and let the replicas run dry."""
    replicas = {f"r{index}": SimulatedReplica(f"r{index}", profile) for index in range(num_replicas)}
    arrivals = make_requests(load, profile, num_replicas)
    arrived = {request.request_id: at_s for at_s, request in arrivals}
    first: dict[str, float] = {}
    last: dict[str, float] = {}
    order = itertools.count()
    events: list[tuple[float, int, Request | SimulatedReplica]] = [
        (at_s, next(order), request) for at_s, request in arrivals
    ]
    heapq.heapify(events)
    while events:
        now_s, number, event = heapq.heappop(events)
        if isinstance(event, Request):
            names = names_of(hash_blocks(event.token_ids, BLOCK_SIZE)) if policy.reads_prefix else []
            routing = RoutingRequest(event.num_prompt_tokens, number, event.max_tokens)
            replica = replicas[policy.choose(routing, [r.snapshot(names) for r in replicas.values()])]
            replica.add(event, replica.prefixes.longest_prefix(names) * BLOCK_SIZE)
            if not replica.is_idle:
                continue
        else:
            replica = event
            for request_id, is_last in replica.end_step():
                first.setdefault(request_id, now_s)
                if is_last:
                    last[request_id] = now_s
        seconds = replica.start_step()
        if seconds is not None:
            heapq.heappush(events, (now_s + seconds, next(order), replica))
    assert len(last) == load.num_requests, "a request got lost"
    return _figures(arrived, first, last, list(replicas.values()), {r.request_id: r for _, r in arrivals})


def _figures(
    arrived: dict[str, float],
    first: dict[str, float],
    last: dict[str, float],
    replicas: list[SimulatedReplica],
    requests: dict[str, Request],
) -> dict[str, Any]:
    ttft_ms = sorted((first[key] - arrived[key]) * 1e3 for key in arrived)
    num_steps = {key: request.max_tokens - 1 for key, request in requests.items() if request.max_tokens > 1}
    step_ms = [(last[key] - first[key]) * 1e3 / steps for key, steps in num_steps.items()]
    hits, queries = (sum(values) for values in zip(*(r.hit_rate for r in replicas), strict=True))
    return {
        "hit_rate": round(hits / queries, 4),
        "ttft_ms_p50": round(statistics.median(ttft_ms), 2),
        "ttft_ms_p99": round(ttft_ms[int(len(ttft_ms) * 0.99)], 2),
        "inter_token_ms": round(statistics.fmean(step_ms), 3),
        "seconds": round(max(last.values()), 2),
        "padding": round(1 - sum(r.rows for r in replicas) / sum(r.padded_rows for r in replicas), 4),
    }


def main() -> None:
    """Parse the arguments, run every policy, print a table and one JSON line."""
    defaults = Load()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=PROFILES, default="h200-1b")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--requests", type=int, default=defaults.num_requests)
    parser.add_argument("--load", type=float, default=defaults.share, help="share of what they could do uncached")
    parser.add_argument("--prefixes", type=int, default=defaults.num_prefixes)
    parser.add_argument("--prefix-tokens", type=int, default=defaults.prefix_tokens)
    parser.add_argument("--tail-tokens", type=int, default=defaults.tail_tokens)
    parser.add_argument("--output-tokens", type=int, default=defaults.output_tokens)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    args = parser.parse_args()
    load = Load(
        args.requests, args.load, args.prefixes, args.prefix_tokens, args.tail_tokens, args.output_tokens, args.seed
    )
    results = {}
    for name, policy in POLICIES.items():
        results[name] = simulate(policy, load, PROFILES[args.profile], args.replicas)
        print(f"{name:16}", results[name], flush=True)
    print(
        json.dumps(
            {
                "benchmark": "routing",
                "profile": args.profile,
                "replicas": args.replicas,
                "load": dataclasses.asdict(load),
                "policies": results,
            }
        )
    )


if __name__ == "__main__":
    main()
