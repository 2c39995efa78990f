"""Admission with a clock of its own: keys, limits, fair shares, the waiting room, deadlines."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.admission.deadline import request_timeout_s
from cluster.admission.errors import AuthenticationError, RateLimitError
from cluster.admission.fair_queue import FairQueue
from cluster.admission.keys import ApiKey, KeyRing
from cluster.admission.limits import KeyLimits
from cluster.admission.rate import RateMeter
from cluster.admission.token_bucket import TokenBucket
from cluster.admission.waiting_room import WaitingRoom
from workers.errors import ConfigError, InvalidRequestError, QueueFullError

SECRET = "sk-0123456789"


class Time:
    """A clock that is wound by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


# --- keys ------------------------------------------------------------------------------------------------------------


def ring(*keys: ApiKey) -> KeyRing:
    return KeyRing(keys or [ApiKey(name="a", key=SECRET), ApiKey(name="b", key="sk-another-key")])


def test_a_known_key_is_let_in_under_its_name() -> None:
    assert ring().authenticate(f"Bearer {SECRET}").name == "a"
    assert ring().authenticate("bearer sk-another-key ").name == "b"


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", f"Basic {SECRET}", SECRET])
def test_without_a_key_the_answer_says_how_to_send_one(header: str | None) -> None:
    with pytest.raises(AuthenticationError, match="send the header Authorization: Bearer <key>"):
        ring().authenticate(header)


@pytest.mark.parametrize("key", ["x", SECRET[:-1], SECRET + "0", SECRET.upper(), "ключ"])
def test_a_wrong_key_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(AuthenticationError, match="not known here") as error:
        ring().authenticate(f"Bearer {key}")
    assert len(key) < 3 or key not in str(error.value)


def test_keys_come_from_a_file_and_may_be_given_as_digests(tmp_path: Path) -> None:
    digest = ApiKey(name="x", key=SECRET).digest.hex()
    path = tmp_path / "keys.yaml"
    path.write_text(
        "keys:\n- {name: plain, key: sk-plain-key, tokens_per_minute: 10}\n"
        f"- {{name: hashed, key_sha256: {digest}}}\n"
    )
    keys = KeyRing.from_file(path)
    assert keys.authenticate("Bearer sk-plain-key").tokens_per_minute == 10
    assert keys.authenticate(f"Bearer {SECRET}").name == "hashed"
    assert SECRET not in repr(ApiKey(name="x", key=SECRET))


def test_keys_come_from_a_variable() -> None:
    keys = KeyRing.from_text(f"team-a:{SECRET}, sk-without-name\nteam-b:sk-of-team-b")
    presented = (SECRET, "sk-without-name", "sk-of-team-b")
    assert [keys.authenticate(f"Bearer {key}").name for key in presented] == ["team-a", "key-2", "team-b"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("keys: []", "at least 1 item"),
        ("keys:\n- {name: a}", "give either key or key_sha256"),
        ("keys:\n- {name: a, key: short}", "at least 8 characters"),
        (f"keys:\n- {{name: a, key: {SECRET}}}\n- {{name: a, key: sk-another-key}}", "two entries have the same name"),
        (f"keys:\n- {{name: a, key: {SECRET}}}\n- {{name: b, key: {SECRET}}}", "two entries have the same key"),
        (f"keys:\n- {{name: a, key: {SECRET}, rpm: 3}}", "keys.0.rpm"),
        (f"keys:\n- {{name: a b, key: {SECRET}}}", "keys.0.name"),
        (f"keys: [{SECRET}", "not valid YAML"),
    ],
)
def test_a_wrong_key_file_is_explained_without_its_secrets(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=sentence) as error:
        KeyRing.from_file(path)
    assert SECRET not in str(error.value)
    with pytest.raises(ConfigError, match="Cannot read the API keys"):
        KeyRing.from_file(tmp_path / "none.yaml")


# --- limits ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(1, 600),
    st.lists(st.tuples(st.floats(0, 20), st.integers(1, 900)), min_size=1, max_size=60),
)
def test_a_bucket_never_grants_more_than_its_rate_and_one_burst(per_minute: int, asks: list[tuple[float, int]]) -> None:
    """Beyond the last grant, which may leave the bucket in debt."""
    time = Time()
    bucket = TokenBucket(per_minute, time)
    granted, last, started_s = 0, 0, time.now_s
    for pause_s, amount in asks:
        time.now_s += pause_s
        wait_s = bucket.wait_s(amount)
        if wait_s > 0:
            time.now_s += wait_s + 1e-6
            assert bucket.wait_s(amount) == 0, "the bucket keeps its word"
        bucket.spend(amount)
        granted, last = granted + amount, amount
        elapsed_s = time.now_s - started_s
        assert granted - last <= per_minute + per_minute * elapsed_s / 60 + 1e-3


def test_what_was_not_used_can_be_given_back() -> None:
    bucket = TokenBucket(60, Time())
    bucket.spend(50)
    assert bucket.wait_s(20) == pytest.approx(10)
    bucket.spend(-40)
    assert bucket.wait_s(20) == 0
    bucket.spend(-1000)
    assert bucket.wait_s(60) == 0
    bucket.spend(60)
    assert bucket.wait_s(1) > 0, "no more than a full bucket"


def test_limits_are_per_key_and_shared_among_ingresses() -> None:
    time = Time()
    limits = KeyLimits(time, num_ingresses=2)
    a = ApiKey(name="a", key=SECRET, requests_per_minute=4, tokens_per_minute=200)
    free = ApiKey(name="free", key="sk-no-limits")
    for _ in range(2):
        limits.take_request(a)
    with pytest.raises(RateLimitError, match="'a' may use 4 requests per minute") as error:
        limits.take_request(a)
    assert error.value.retry_after_s == pytest.approx(30)
    limits.take_tokens(a, 90)
    with pytest.raises(RateLimitError, match="200 tokens per minute"):
        limits.take_tokens(a, 20)
    limits.give_back(a, 80)
    limits.take_tokens(a, 20)
    for _ in range(100):
        limits.take_request(free)
        limits.take_tokens(free, 10**6)


# --- fair shares -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.5, 1.0, 2.0, 3.0]), st.lists(st.integers(1, 500), min_size=25, max_size=25)),
        min_size=2,
        max_size=4,
    )
)
def test_flows_that_wait_are_served_in_proportion_to_their_weights(flows: list[tuple[float, list[int]]]) -> None:
    quantum, queue = 100.0, FairQueue[tuple[int, int]](100.0)
    for number, (weight, costs) in enumerate(flows):
        for index, cost in enumerate(costs):
            queue.push(str(number), (number, index), cost, weight)
    served = [0.0] * len(flows)
    left = Counter({number: len(costs) for number, (_, costs) in enumerate(flows)})
    while all(left.values()):  # as long as everybody waits
        item = queue.pop()
        assert item is not None
        number, index = item
        served[number] += flows[number][1][index]
        left[number] -= 1
        shares = [amount / flows[n][0] for n, amount in enumerate(served)]
        bound = 2 * quantum + 2 * 500 / min(weight for weight, _ in flows)
        assert max(shares) - min(shares) <= bound


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 300), st.booleans()), max_size=60))
def test_nothing_is_lost_and_each_flow_keeps_its_order(steps: list[tuple[str, int, bool]]) -> None:
    queue = FairQueue[tuple[str, int]](50.0)
    waiting: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    costs = {}
    for number, (flow, cost, pops) in enumerate(steps):
        queue.push(flow, (flow, number), cost)
        waiting[flow].append(number)
        costs[number] = cost
        if pops:
            name, popped = queue.pop() or ("", -1)
            assert waiting[name].pop(0) == popped
        elif number % 5 == 4:
            queue.discard((flow, number))
            waiting[flow].remove(number)
        assert len(queue) == sum(map(len, waiting.values()))
        assert queue.cost == pytest.approx(sum(costs[n] for numbers in waiting.values() for n in numbers))
    for _ in range(len(queue)):
        name, popped = queue.pop() or ("", -1)
        assert waiting[name].pop(0) == popped
    assert queue.pop() is None


def test_a_flow_that_was_charged_too_much_gets_it_back() -> None:
    queue = FairQueue[int](10.0)
    for number in range(8):
        queue.push("ab"[number % 2], number, 10)
    assert [queue.pop(), queue.pop()] == [0, 1]
    queue.give_back("b", 20)
    queue.give_back("nobody", 20)
    order = [queue.pop() for _ in range(5)]
    assert [number % 2 for number in order if number is not None] == [1, 1, 0, 1, 0]


# --- the waiting room ------------------------------------------------------------------------------------------------


def test_beyond_the_bound_the_wait_is_told_by_the_rate() -> None:
    time = Time()
    room = WaitingRoom[int](time)
    for number in range(200):
        room.enter(number, "k", 1.0, 10, max_requests=1000)
    for _ in range(100):  # two leave per second
        time.now_s += 0.5
        assert room.call_next() is not None
    with pytest.raises(QueueFullError) as first:
        room.enter(1000, "k", 1.0, 10, max_requests=91)
    assert first.value.retry_after_s == pytest.approx(10 / 2, rel=0.1)
    with pytest.raises(QueueFullError) as second:
        room.enter(1001, "k", 1.0, 10, max_requests=91)
    assert second.value.retry_after_s == pytest.approx(first.value.retry_after_s + 0.5, rel=0.05)
    for number in range(1000):
        with pytest.raises(QueueFullError) as last:
            room.enter(2000 + number, "k", 1.0, 10, max_requests=91)
    assert last.value.retry_after_s == pytest.approx(60)


def test_tokens_are_bounded_too_but_an_empty_room_takes_anything() -> None:
    room = WaitingRoom[int](Time(), max_tokens=100)
    room.enter(0, "k", 1.0, 5000, max_requests=10)
    with pytest.raises(QueueFullError):
        room.enter(1, "k", 1.0, 1, max_requests=10)
    assert room.call_next() == 0
    room.enter(2, "k", 1.0, 60, max_requests=10)
    with pytest.raises(QueueFullError):
        room.enter(3, "k", 1.0, 60, max_requests=10)
    room.leave(2)
    room.leave(2)
    assert (len(room), room.num_tokens, room.call_next()) == (0, 0, None)


@settings(deadline=None)
@given(st.floats(0.5, 50), st.floats(0.05, 2.0))
def test_the_meter_finds_a_steady_rate_from_the_start(amount: float, pause_s: float) -> None:
    time = Time()
    meter = RateMeter(time)
    assert meter.per_s() == 0
    for _ in itertools.repeat(None, int(8 / pause_s) + 2):
        time.now_s += pause_s
        meter.add(amount)
    assert meter.per_s() == pytest.approx(amount / pause_s, rel=0.25)
    time.now_s += 100
    assert meter.per_s() < 0.001 * amount / pause_s


# --- deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "default_s", "max_s", "expected"),
    [
        (None, None, None, None),
        ("2.5", None, None, 2.5),
        ("2.5", 1.0, None, 2.5),
        (None, 1.0, None, 1.0),
        ("100", 1.0, 60.0, 60.0),
        (None, None, 60.0, 60.0),
    ],
)
def test_a_deadline_is_the_clients_within_the_operators(
    header: str | None, default_s: float | None, max_s: float | None, expected: float | None
) -> None:
    assert request_timeout_s(header, default_s, max_s) == expected


@pytest.mark.parametrize("header", ["", "soon", "-1", "0", "nan", "inf", "1e400"])
def test_a_wrong_deadline_is_named(header: str) -> None:
    with pytest.raises(InvalidRequestError, match="X-Request-Timeout must be a positive number of seconds"):
        request_timeout_s(header, None, None)
