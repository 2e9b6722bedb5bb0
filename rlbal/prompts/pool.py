"""Which prompts are tried next: every prompt once per epoch, in a shuffled order, but for those that have retired.

Whether a prompt has retired is asked when its turn comes, so that nothing is decided on yesterday's knowledge. Epoch
and position are all that has to be remembered: epoch e is shuffled with `seed + e`, and the retired prompts that it
reviews are drawn with (seed, e).
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Retired = Callable[[Ints], Mask]  # of some prompts, which have retired


class PromptPool:
    """The prompts of the training data, 0..M-1.

    Args:
        num_prompts: M.
        shuffle: False keeps the data's own order in every epoch.
        seed: of the orders and of the reviews.
        review_fraction: share of the retired prompts that an epoch has all the same.
    """

    def __init__(self, num_prompts: int, shuffle: bool, seed: int, review_fraction: float = 0.0) -> None:
        self.num_prompts, self.shuffle, self.seed, self.review_fraction = num_prompts, shuffle, seed, review_fraction
        self.epoch, self.position = 0, 0
        self._order_of: tuple[int, Ints] | None = None
        self._reviewed_of: tuple[int, Mask] | None = None

    def draw(self, count: int, retired: Retired | None = None) -> Ints:
        """The next prompts, all different: (count,).

        Prompts that do not fill a last batch are left out of their epoch. Where too few have not retired, retired ones
        fill up; `empty` says so before.

        Args:
            count: how many, M at most.
            retired: which prompts have retired; None if none ever do.
        """
        found = self._walk(self.epoch, self.position, count, retired)
        if found is None:
            self.epoch, self.position = self.epoch + 1, 0
            found = self._walk(self.epoch, 0, count, retired) or self._walk(self.epoch, 0, count, None)
        assert found is not None, "a batch has more prompts than there are"
        prompts, self.position = found
        return prompts

    def empty(self, count: int, retired: Retired) -> bool:
        """Whether neither the rest of this epoch nor the next one has so many prompts that have not retired."""
        here = self._walk(self.epoch, self.position, count, retired)
        return here is None and self._walk(self.epoch + 1, 0, count, retired) is None

    def _walk(self, epoch: int, position: int, count: int, retired: Retired | None) -> tuple[Ints, int] | None:
        """The next prompts from a position of an epoch on, and the position after them; None if there are too few."""
        order = self._order(epoch)
        if retired is None:
            end = position + count
            return (order[position:end], end) if end <= len(order) else None
        found, missing, block = [], count, 4 * count
        for start in range(position, len(order), block):
            prompts = order[start : start + block]
            kept = np.flatnonzero(~retired(prompts) | self._reviewed(epoch, prompts))[:missing]
            found.append(prompts[kept])
            missing -= len(kept)
            if not missing:
                return np.concatenate(found), start + int(kept[-1]) + 1
        return None

    def _order(self, epoch: int) -> Ints:
        if not self.shuffle:
            return np.arange(self.num_prompts)
        if self._order_of is None or self._order_of[0] != epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._order_of = epoch, torch.randperm(self.num_prompts, generator=generator).numpy()
        return self._order_of[1]

    def _reviewed(self, epoch: int, prompts: Ints) -> Mask:
        """Which prompts this epoch has even if they have retired."""
        if self.review_fraction == 0.0:
            return np.zeros(len(prompts), dtype=bool)
        if self._reviewed_of is None or self._reviewed_of[0] != epoch:
            draws = np.random.default_rng((self.seed, epoch)).random(self.num_prompts)
            self._reviewed_of = epoch, draws < self.review_fraction
        return self._reviewed_of[1][prompts]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from `state_dict`."""
        self.epoch, self.position = state["epoch"], state["position"]
