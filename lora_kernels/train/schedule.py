"""`jagged_cosine`: the learning rate of ReLoRA, a cosine that falls to zero at every restart and warms up again."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from numbers import Integral


def jagged_cosine(
    steps: int, every: int, *, warmup: int, restart_warmup: int, minimum: float = 0.1, adjust: int = 0
) -> Callable[[int], float]:
    """Return the factor of the learning rate as a function of the step, for ``torch.optim.lr_scheduler.LambdaLR``.

        c(t) = minimum + (1 - minimum) · ½ (1 + cos π (t - warmup) / (steps - warmup))

        f(t) = t / warmup                                          t < warmup
        f(t) = ρ / restart_warmup · c(n·every + restart_warmup)    ρ < restart_warmup and t ≥ every
        f(t) = c(t′)                                               otherwise

    with t′ = t + adjust, ρ = t′ mod every and n = t′ div every. So f is 0 at every restart, which is due when the
    number of finished steps is a multiple of `every`, and is back on the cosine after `restart_warmup` steps. c stays
    at `minimum` from step `steps` on.

    Args:
        steps: the steps of the whole training.
        every: the steps between two restarts.
        warmup: the steps of the first warm-up.
        restart_warmup: the steps of the warm-up after a restart. With 0 there is none: f is the plain cosine.
        minimum: the factor at the end, above 0.
        adjust: steps that the cycles are ahead of t, for a training that goes on from one whose restarts should fall in
            the same places.

    Raises:
        ValueError: `steps` that `every` does not divide; a first warm-up that ends after the first cycle; a
            restart_warmup that is no shorter than a cycle; a minimum outside (0, 1].
        TypeError: steps that are no integers.

    Lialin, Shivagunde, Muckatira and Rumshisky, "ReLoRA: High-Rank Training Through Low-Rank Updates", 2023
    (arXiv:2307.05695). The formula is that of the authors' code.
    """
    for name, value in (
        ("steps", steps), ("every", every), ("warmup", warmup), ("restart_warmup", restart_warmup), ("adjust", adjust)
    ):  # fmt: skip
        if not isinstance(value, Integral):
            raise TypeError(f"{name} must be a number of steps, an int, got {value!r}")
    if every < 1 or steps < every or steps % every:
        raise ValueError(
            f"steps={steps} is no multiple of every={every}, and the last cycle would be cut short: take "
            f"steps={max(every, round(steps / every) * every) if every > 0 else steps}, or another `every`"
        )
    if not 0 <= warmup + adjust <= every or warmup < 0 or adjust < 0:
        raise ValueError(f"warmup + adjust = {warmup} + {adjust} must lie in 0 to every={every}: the first cycle")
    if not 0 <= restart_warmup < every:
        raise ValueError(f"restart_warmup={restart_warmup} must lie in 0 to every - 1 = {every - 1}")
    if not 0 < minimum <= 1:
        raise ValueError(f"minimum must lie in (0, 1], got {minimum}")
    return functools.partial(_factor, steps, every, warmup, restart_warmup, minimum, adjust)


def _factor(steps: int, every: int, warmup: int, restart_warmup: int, minimum: float, adjust: int, step: int) -> float:
    if step < warmup:
        return step / warmup

    def cosine(t: int) -> float:
        progress = min(1.0, (t - warmup) / max(1, steps - warmup))
        return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * progress))

    n, since = divmod(step + adjust, every)
    if since < restart_warmup and step >= every:
        return since / restart_warmup * cosine(n * every + restart_warmup)
    return cosine(step + adjust)
