"""How a training went, in words."""

from typing import Any

import numpy as np

ENOUGH_STEPS = 1000


def verdict(losses: dict[str, list[float]], settings: dict[str, Any]) -> str:
    """Return a few lines on a training: how far it came, how it ended, and whether it may be believed to have converged.

    The training counts as converged where the last tenth of the epochs improved the followed loss by less than 0.5 % of what the
    whole training did, as over-fitted where the validation loss has risen by more than 5 % of that since its best, and as too short below
    1,000 steps: the widths of intervals settle last.
    """
    train = np.asarray(losses["train"])
    if len(train) < 5:
        return f"{len(train)} epochs: too few to judge.\nVerdict: NOT TRAINED; raise epochs."
    held = np.asarray(losses["validation"])
    followed = held if len(held) else train
    gain = followed[0] - followed.min()
    tail = max(1, len(followed) // 10)
    late = max(0.0, followed[: len(followed) - tail].min() - followed.min()) if len(followed) > tail else gain
    lines = [f"{len(train)} of at most {settings['epochs']} epochs; -ELBO per cell and gene {train[0]:.4f} -> {train[-1]:.4f} (training)."]
    if len(held):
        best = settings["best_epoch"]
        lines.append(f"Validation cells: {held[0]:.4f} -> {held[best]:.4f} at epoch {best + 1}, which was kept.")
    if settings.get("objective") == "kds":
        words = f"kernel deviation from stationarity, and penalty, {train[0]:.4g} -> {train[-1]:.4g}"
        return f"{len(train)} epochs, {words}.\nNo posterior was fitted: every draw is the same."
    if settings.get("objective") == "paths":
        words = f"{settings['distance']} {train[0]:.4g} -> {train[-1]:.4g}"
        return f"{len(train)} epochs of the deterministic F on eq 5, {words}.\nNo posterior was fitted: every draw is the same."
    steps = len(train) * settings["steps_per_epoch"]
    return "\n".join([*lines, f"Verdict: {_judgement(followed, gain, late, tail, steps)}"])


def _judgement(followed: np.ndarray, gain: float, late: float, tail: int, steps: int) -> str:
    """Say in one sentence whether the training is done."""
    if gain <= 0:
        return "NO PROGRESS: the loss never fell. Lower learning_rate, or check the screen's counts."
    if steps < ENOUGH_STEPS:
        return f"TOO SHORT: {steps} steps; intervals need about {ENOUGH_STEPS:,} to find their width. Raise epochs or lower minibatch."
    if followed[-1] - followed.min() > 0.05 * gain:
        return "OVER-FITTED at the end; the best epoch was kept. More cells or fewer latent dimensions would help."
    if late > 5e-3 * gain:
        return f"NOT CONVERGED: the last {tail} epochs still brought {100 * late / gain:.1f} % of all improvement. Raise epochs."
    return f"CONVERGED: the last {tail} epochs brought {100 * late / gain:.2f} % of all improvement."
