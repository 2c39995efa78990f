"""Routing policies by name, and a user's own by import path."""

from __future__ import annotations

import dataclasses
import importlib

from cluster.routing.policies import (
    RoutingPolicy,
    balanced,
    capture_aware,
    least_loaded,
    prefix_affinity,
    round_robin,
)
from workers.errors import ConfigError

DEFAULT_POLICY = "balanced"


@dataclasses.dataclass(frozen=True, slots=True)
class LoadedPolicy:
    """A policy and what it wants to know.

    Attributes:
        choose: The policy.
        reads_prefix: Whether ``cached_tokens`` is to be filled in, which costs about a microsecond per block.
    """

    choose: RoutingPolicy
    reads_prefix: bool


POLICIES: dict[str, LoadedPolicy] = {
    "balanced": LoadedPolicy(balanced, reads_prefix=True),
    "least_loaded": LoadedPolicy(least_loaded, reads_prefix=False),
    "prefix_affinity": LoadedPolicy(prefix_affinity, reads_prefix=True),
    "capture_aware": LoadedPolicy(capture_aware, reads_prefix=False),
    "round_robin": LoadedPolicy(round_robin, reads_prefix=False),
}


def load_policy(name: str) -> LoadedPolicy:
    """The policy of that name, or the function at ``package.module:function``.

    Raises:
        ConfigError: There is none; says which names there are.
    """
    if name in POLICIES:
        return POLICIES[name]
    module_name, separator, attribute = name.partition(":")
    if not separator:
        known = ", ".join(POLICIES)
        raise ConfigError(
            f"routing.policy: {name!r} is not one of {known}, nor an import path like package.module:function.",
            param="routing.policy",
        )
    try:
        choose = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"routing.policy: cannot import {name!r}: {error}.", param="routing.policy") from None
    if not callable(choose):
        raise ConfigError(f"routing.policy: {name!r} is not a function.", param="routing.policy")
    return LoadedPolicy(choose, reads_prefix=True)
