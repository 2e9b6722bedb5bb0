"""How many rollouts each prompt of a generation batch gets."""

import numpy as np
import numpy.typing as npt


def uniform_counts(num_prompts: int, rollouts: int) -> npt.NDArray[np.int64]:
    """The same number of rollouts for every prompt: (P,) summing to `rollouts`.

    Raises:
        ValueError: `rollouts` does not divide by `num_prompts`.
    """
    if rollouts % num_prompts:
        raise ValueError(f"{rollouts} rollouts do not divide over {num_prompts} prompts")
    return np.full(num_prompts, rollouts // num_prompts, dtype=np.int64)
