"""Token efficiency: the tokens that a curve of accuracy needs for a given accuracy (arXiv 2503.07572)."""

import numpy as np


def tokens_to_reach(accuracy: np.ndarray, tokens: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Tokens at which the curve first has an accuracy; infinite where it never has.

    The curve is linear between its points, and its first crossing is that of its running maximum. What lies before the
    first point was not measured: a target which that point has takes at most its tokens, and they are returned.

    Args:
      accuracy: f64[..., S]. tokens: f64[..., S], not decreasing. target: f64[..., K].

    Returns:
      f64[..., K] tokens; host arithmetic. Raises ValueError for shapes that do not agree, or tokens that decrease.
    """
    accuracy, tokens, target = (np.asarray(x, np.float64) for x in (accuracy, tokens, target))
    if accuracy.shape != tokens.shape or accuracy.shape[:-1] != target.shape[:-1] or not accuracy.shape[-1]:
        raise ValueError(
            f"accuracy{list(accuracy.shape)}, tokens{list(tokens.shape)}, target{list(target.shape)}: the rule is "
            "[..., S], [..., S] and [..., K], S at least 1"
        )
    if np.any(np.diff(tokens, axis=-1) < 0):
        raise ValueError("tokens decrease: a curve's points stand in the order of their tokens; take a running maximum")
    left, right = accuracy[..., None, :-1], accuracy[..., None, 1:]
    wanted = target[..., None]
    crosses = (left < wanted) & (wanted <= right)
    share = (wanted - left) / np.where(crosses, right - left, 1.0)
    place = tokens[..., None, :-1] + share * np.diff(tokens, axis=-1)[..., None, :]
    first = np.min(np.where(crosses, place, np.inf), axis=-1, initial=np.inf)
    return np.where(target <= accuracy[..., :1], tokens[..., :1], first)
