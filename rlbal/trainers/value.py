"""The critic of PPO: what a state is worth, from the hidden states of the policy's own forward pass or its own.

The state before a token is what the policy has read and written so far, and the policy computes the token's
log-probability from the last hidden state there. A small head on the same hidden state gives its value, so that
training needs no forward pass of the critic's own. A separate critic is a second model with such a head.

The critic is a submodule of the model that is trained, under the name `CRITIC`, and works in a forward hook of it:
DDP, DeepSpeed and FSDP see its parameters like any others, and gather them, reduce their gradients and keep their
optimizer states. It is saved beside the policy, not in it, so that the policy stays an ordinary language model.

Shapes: B rows, L tokens with their prompt, H width of the hidden states.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rlbal.errors import RunError

CRITIC = "critic"
# In a folder of its own: vLLM reads every safetensors file beside a model's as a part of the model.
CRITIC_FILE = "critic/model.safetensors"

State = dict[str, torch.Tensor]


class Float32Linear(nn.Linear):
    """Computes in float32, whichever precision an engine keeps its weights in.

    In bfloat16, values less than 1/256 apart would be the same.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.float(), self.bias.float())


class Critic(nn.Module):
    """A value for every state.

    Args:
        width: H.
        seed: of the head's first layer; its last one is 0, so that every state is worth 0 at first.
        backbone: a model with hidden states of its own; None for those of the policy.
    """

    def __init__(self, width: int, seed: int, backbone: nn.Module | None = None) -> None:
        super().__init__()
        # The same on every process, and no random number less for the rollouts.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            first, last = Float32Linear(width, width), Float32Linear(width, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(first, nn.SiLU(), last)
        self.backbone = backbone
        self.detached = False  # the policy's hidden states learn nothing from values
        self._columns: int | None = None
        self._hidden_BLH: torch.Tensor | None = None
        self._heard: list[torch.Tensor] = []

    def forward(self, hidden_BLH: torch.Tensor) -> torch.Tensor:
        """Values of states, float32: (B, L, H) -> (B, L)."""
        with torch.autocast(hidden_BLH.device.type, enabled=False):
            return self.head(hidden_BLH.float()).squeeze(-1)

    def join(self, model: nn.Module) -> None:
        """Become a submodule of the model to train, a language model or a PEFT model around one, before it is wrapped
        by an engine."""
        policy: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        policy.base_model.register_forward_hook(self._keep)
        model.register_forward_hook(self._judge, with_kwargs=True)
        model.add_module(CRITIC, self)

    @contextmanager
    def listening(self, columns: int) -> Iterator[list[torch.Tensor]]:
        """Gives a list to which each forward pass in this context adds the values of the last `columns` states of its
        rows. With T completion tokens in the last columns, T + 1 are the states before each of them, and after the
        last: (B, columns)."""
        self._columns, self._heard = columns, []
        try:
            yield self._heard
        finally:
            self._columns, self._hidden_BLH = None, None

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._columns is not None and self.backbone is None:
            self._hidden_BLH = output.last_hidden_state

    def _judge(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if self._columns is None:
            return
        hidden_BLH = self._hidden_BLH
        if self.backbone is not None:
            inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask")}
            hidden_BLH = self.backbone(**inputs, use_cache=False).last_hidden_state
        assert hidden_BLH is not None
        values = self(hidden_BLH[:, -self._columns :].detach() if self.detached else hidden_BLH[:, -self._columns :])
        self._heard.append(values)
        self._hidden_BLH = None
        if values.requires_grad:
            # DDP takes parameters for unused that nothing returned depends on. Trainers here do not read this loss.
            output.loss = output.loss + values.sum()


def split_state(state: State) -> tuple[State, State]:
    """The policy's part of the state of a model that a critic has joined, and the critic's."""
    prefix = f"{CRITIC}."
    policy = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    return policy, {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}


def save_critic(state: State, folder: Path) -> None:
    """Write a critic's state beside the policy in `folder`."""
    (folder / CRITIC_FILE).parent.mkdir(exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, folder / CRITIC_FILE)


def load_critic(critic: Critic, folder: Path) -> None:
    """Read what `save_critic` wrote.

    Raises:
        RunError: it is not there, no such file, or of another critic.
    """
    path = folder / CRITIC_FILE
    try:
        critic.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise RunError(
            f"{path} does not hold the critic of this recipe",
            why=str(error).strip().splitlines()[0],
            fix="resume with the recipe in the run's directory, or start afresh with --overwrite",
        ) from None
