"""What a token costs a replica, fitted to the steps it has run: a fixed time per step and a time per token.

From the line follow the costs that scaling needs even if no batch was ever full: a generated token in a full batch
bears its part of the fixed time. Old steps are forgotten, so that the fit follows a changing load.
"""

from __future__ import annotations

#: Weight that all earlier steps keep when one more comes: the fit follows the last few hundred.
_KEEP = 0.995


class StepCost:
    """Least squares over (tokens, seconds) of steps."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, num_tokens: float, seconds: float, num_steps: int = 1) -> None:
        """Note ``num_steps`` steps that computed ``num_tokens`` in ``seconds``, all together."""
        x, y = num_tokens / num_steps, seconds / num_steps
        keep = _KEEP**num_steps
        self._weight = self._weight * keep + num_steps
        self._x = self._x * keep + x * num_steps
        self._y = self._y * keep + y * num_steps
        self._xx = self._xx * keep + x * x * num_steps
        self._xy = self._xy * keep + x * y * num_steps

    def line(self) -> tuple[float, float]:
        """Seconds per step, and per token more; both 0 before the first step, neither negative.

        Steps of one size cannot be told apart; then all of their time counts as fixed, as it mostly is.
        """
        if not self._weight:
            return 0.0, 0.0
        x, y = self._x / self._weight, self._y / self._weight
        variance = self._xx / self._weight - x * x
        slope = 0.0
        if variance > 1e-6 * max(x * x, 1.0):
            slope = min(max((self._xy / self._weight - x * y) / variance, 0.0), y / x)
        return y - slope * x, slope

    def token_s(self, max_num_seqs: int) -> tuple[float, float]:
        """Seconds per prompt token, and per generated token in a batch of ``max_num_seqs``."""
        fixed_s, per_token_s = self.line()
        output_token_s = per_token_s + fixed_s / max_num_seqs
        return per_token_s or output_token_s, output_token_s
