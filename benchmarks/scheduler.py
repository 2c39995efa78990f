"""Host cost of scheduling, without a model: microseconds per step of schedule() plus update().

Measures a full batch of running decodes, in plain and in overlapped order, the admission of a full batch of
prompts, with the prefix cache cold and hot, and the integrity check of a large idle pool. Ends in one JSON
line.

    python benchmarks/scheduler.py --num-seqs 256
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import time
from collections.abc import Callable

from workers.request import Request, token_array
from workers.sampling_params import SamplingParams
from workers.scheduler.block_pool import BlockPool
from workers.scheduler.output import SchedulerOutput
from workers.scheduler.scheduler import Scheduler, SchedulerConfig

BLOCK_SIZE = 16


def make_scheduler(num_seqs: int, prompt_len: int, num_steps: int) -> Scheduler:
    """A scheduler with room for the whole run, and one step's budget for every prompt."""
    blocks_each = (prompt_len + num_steps + 8) // BLOCK_SIZE + 2
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=num_seqs,
            max_num_batched_tokens=num_seqs * prompt_len,
            block_size=BLOCK_SIZE,
            num_blocks=num_seqs * blocks_each + 1,
            max_model_len=prompt_len + num_steps + 8,
        )
    )


def make_request(index: int, prompt_len: int, num_steps: int) -> Request:
    """A greedy request with a prompt of its own, of a length that spreads block boundaries over the steps."""
    prompt_len -= index % BLOCK_SIZE
    prompt = token_array([index, *range(1, prompt_len)])
    params = SamplingParams(temperature=0.0, max_tokens=num_steps + 4, ignore_eos=True)
    return Request(str(index), prompt, prompt_len, params, num_steps + 4)


def run_decode(num_seqs: int, prompt_len: int, num_steps: int, depth: int) -> list[float]:
    """Microseconds per steady decode step with ``depth`` steps in flight at most."""
    scheduler = make_scheduler(num_seqs, prompt_len, num_steps)
    for index in range(num_seqs):
        scheduler.add(make_request(index, prompt_len, num_steps))
    in_flight = collections.deque([scheduler.schedule()])
    sampled = [7] * num_seqs
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        if len(in_flight) == depth:
            scheduler.update(_some(in_flight.popleft()), sampled)
        in_flight.append(scheduler.schedule())
        times.append((time.perf_counter() - start) * 1e6)
        assert _some(in_flight[-1]).num_tokens == num_seqs
    return times


def run_admission(num_seqs: int, prompt_len: int) -> tuple[float, float]:
    """Microseconds to schedule a step that admits ``num_seqs`` prompts: cold, then all of them cached."""
    scheduler = make_scheduler(num_seqs, prompt_len, 8)
    times = []
    for _ in range(2):
        for index in range(num_seqs):
            scheduler.add(make_request(index, prompt_len, 1))
        start = time.perf_counter()
        output = _some(scheduler.schedule())
        times.append((time.perf_counter() - start) * 1e6)
        scheduler.update(output, [7] * num_seqs)
        scheduler.abort([item.request.request_id for item in output.scheduled])
    assert scheduler.stats().num_prefix_hit_tokens > 0
    return times[0], times[1]


def time_integrity_check(num_blocks: int) -> float:
    """Microseconds to account for every block of an idle pool, half of it cached."""
    pool = BlockPool(num_blocks, BLOCK_SIZE)
    request = Request("r", token_array(range((num_blocks // 2) * BLOCK_SIZE)), 1, SamplingParams(), 1)
    pool.allocate_known(request, [])
    pool.register(request, 0, len(request.block_ids))
    pool.free(request)
    return min(_timed(lambda: pool.check_integrity([])) for _ in range(10))


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def _some(value: SchedulerOutput | None) -> SchedulerOutput:
    assert value is not None
    return value


def main() -> None:
    """Run everything and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-seqs", type=int, default=256)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--num-steps", type=int, default=1000)
    args = parser.parse_args()
    result: dict[str, object] = {"benchmark": "scheduler", **vars(args), "unit": "us"}
    for name, depth in (("decode", 1), ("decode_overlapped", 2)):
        times = sorted(run_decode(args.num_seqs, args.prompt_len, args.num_steps, depth))
        result[f"{name}_min"], result[f"{name}_median"] = round(times[0], 1), round(statistics.median(times), 1)
        result[f"{name}_p99"] = round(times[int(len(times) * 0.99)], 1)
    cold, hot = run_admission(args.num_seqs, args.prompt_len)
    result["admission_cold"], result["admission_hot"] = round(cold, 1), round(hot, 1)
    result["integrity_check_200k_blocks"] = round(time_integrity_check(200_000), 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
