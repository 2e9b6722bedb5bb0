"""A cache layer that does not copy itself for every token."""

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer


class GrowingLayer(DynamicLayer):
    """Keys and values of a layer in buffers with room to grow, of which `keys` and `values` are views."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [key_states[:, :, :0], value_states[:, :, :0]]
            self._show(0)
        assert self.keys is not None and self.values is not None
        old = self.keys.shape[-2]
        new = old + key_states.shape[-2]
        if new > self._buffers[0].shape[-2]:
            self._buffers = [_larger(part, new + max(32, new // 8)) for part in (self.keys, self.values)]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, old:new] = states
        self._show(new)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized and self.keys is not None:
            self._buffers = [buffer.index_select(0, indices) for buffer in self._buffers]
            self._show(self.keys.shape[-2])

    def _show(self, length: int) -> None:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)


def _larger(part: torch.Tensor, capacity: int) -> torch.Tensor:
    rows, heads, used, size = part.shape
    buffer = part.new_empty(rows, heads, capacity, size)
    buffer[:, :, :used] = part
    return buffer
