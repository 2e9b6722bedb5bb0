"""The critic listens to the policy's own forward pass, trains under every wrapper, and is saved beside the policy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head

from rlbal.errors import RunError
from rlbal.sections import TinySection
from rlbal.tiny import build_model, build_tokenizer
from rlbal.trainers.value import Critic, load_critic, save_critic, split_state

TINY = TinySection(hidden_size=32, layers=2, heads=2, max_positions=64)
B, L, T = 3, 9, 4


def tiny_model(seed: int = 0) -> Any:
    return build_model(TINY, build_tokenizer([]), seed)


def opinionated(backbone: torch.nn.Module | None = None) -> Critic:
    """A critic whose values differ from state to state; a new one says 0 to all."""
    critic = Critic(32, seed=1, backbone=backbone)
    torch.nn.init.normal_(critic.head[2].weight, generator=torch.Generator().manual_seed(2))
    return critic


def joined(lora: bool = False, checkpointing: dict[str, Any] | None = None, backbone: Any = None) -> tuple[Any, Critic]:
    """A policy as TRL prepares one, and the critic that has joined it."""
    model = tiny_model()
    if lora:
        torch.manual_seed(4)
        model = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False))
    add_fused_lm_head(model.get_base_model() if lora else model, outputs=("log_probs", "entropy"))
    critic = opinionated(backbone)
    critic.join(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        if lora:
            model.enable_input_require_grads()
    return model.train(), critic


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, 200, (B, L), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :2], mask[1, -2:] = 0, 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-T] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def forward(model: Any, critic: Critic) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (B, T) and values (B, T + 1), as the trainer gets them."""
    with critic.listening(T + 1) as heard:
        output = model(**batch(), fused_lm_head=True)
    (values,) = heard
    return output.log_probs[:, -T:], values


VARIANTS = [
    pytest.param(lora, checkpointing, id=f"{'lora' if lora else 'full'}-{name}")
    for lora in (False, True)
    for name, checkpointing in (
        ("plain", None),
        ("checkpointing", {"use_reentrant": False}),
        ("reentrant", {"use_reentrant": True}),
    )
]


@pytest.mark.parametrize(("lora", "checkpointing"), VARIANTS)
def test_the_hook_sees_exactly_the_policy_s_hidden_states(lora, checkpointing):
    model, critic = joined(lora, checkpointing)
    logps, values = forward(model, critic)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        states = plain.hidden_states[-1]
        assert torch.equal(values, critic(states[:, -T - 1 :]))
        # They are the states that the log-probabilities come from: the one before each token.
        logits = model.get_output_embeddings()(states[:, -T - 1 : -1]) if not lora else plain.logits[:, -T - 1 : -1]
        targets, mask = batch()["input_ids"][:, -T:], batch()["attention_mask"][:, -T:]
        expected = logits.log_softmax(-1).gather(2, targets[:, :, None])[:, :, 0] * mask
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
    assert values.std() > 0.01


@pytest.mark.parametrize(("lora", "checkpointing"), VARIANTS)
def test_values_teach_head_and_policy_or_the_head_alone(lora, checkpointing):
    gradients = {}
    for detached in (False, True):
        model, critic = joined(lora, checkpointing)
        critic.detached = detached
        logps, values = forward(model, critic)
        (values.square().sum() + 0.0 * logps.sum()).backward()
        gradients[detached] = {
            name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
        }
    for name, gradient in gradients[False].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        if name.startswith("critic."):
            assert torch.equal(gradient, gradients[True][name])
        else:
            assert gradients[True][name].abs().max() == 0, name
    assert any(name.startswith("critic.") for name in gradients[False])
    assert any("lora_" in name for name in gradients[False]) == lora


def test_checkpointed_layers_give_the_same_gradients():
    found = []
    for checkpointing in (None, {"use_reentrant": False}):
        model, critic = joined(False, checkpointing)
        logps, values = forward(model, critic)
        (values.square().sum() + logps.sum()).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


def test_it_listens_only_when_told_to_and_hears_every_forward_pass():
    model, critic = joined()
    model(**batch(), fused_lm_head=True)
    with critic.listening(T) as heard:
        model(**batch(), fused_lm_head=True)
        model(**batch(), fused_lm_head=True)
    assert [values.shape for values in heard] == [(B, T), (B, T)]
    inputs = {name: value[:1, 2:5] for name, value in batch().items() if name != "labels"}
    model.eval().generate(**inputs, max_new_tokens=2)
    assert len(heard) == 2


def test_a_new_critic_says_zero_and_draws_no_random_number():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    critic = Critic(32, seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(critic(torch.randn(2, 3, 32)), torch.zeros(2, 3))
    assert torch.equal(critic.head[0].weight, Critic(32, seed=1).head[0].weight)


def test_values_keep_full_precision_under_autocast():
    model, critic = joined()
    with torch.autocast("cpu", torch.bfloat16):
        _, values = forward(model, critic)
        states = critic(torch.full((1, 1, 32), 0.3))
    assert values.dtype == states.dtype == torch.float32
    assert torch.equal(states, critic(torch.full((1, 1, 32), 0.3)))


def test_a_separate_critic_has_hidden_states_of_its_own():
    backbone = tiny_model(seed=7).base_model
    model, critic = joined(backbone=backbone)
    _, values = forward(model, critic)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    with torch.no_grad():
        expected = critic(backbone(**inputs).last_hidden_state[:, -T - 1 :])
    assert torch.equal(values, expected)
    values.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("critic."), name


@pytest.fixture
def process_group(tmp_path: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_ddp_counts_the_critic_in(process_group, find_unused, lora):
    model, critic = joined(lora)
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    expected_model, expected_critic = joined(lora)
    for one, own in ((wrapped, critic), (expected_model, expected_critic)):
        for _ in range(2):  # DDP complains at the next forward pass
            logps, values = forward(one, own)
            (values.square().sum() + logps.sum()).backward()
    for (name, parameter), other in zip(model.named_parameters(), expected_model.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, other.grad, msg=name)


@pytest.mark.parametrize("separate", [False, True])
def test_the_policy_loads_alone_and_the_critic_from_beside_it(tmp_path: Path, separate):
    model, critic = joined(backbone=tiny_model(seed=7).base_model if separate else None)
    policy_state, critic_state = split_state(model.state_dict())
    model.save_pretrained(tmp_path, state_dict=policy_state)
    save_critic(critic_state, tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    other = Critic(32, seed=9, backbone=tiny_model(seed=8).base_model if separate else None)
    load_critic(other, tmp_path)
    add_fused_lm_head(loaded, outputs=("log_probs", "entropy"))
    other.join(loaded)
    for found, expected in zip(forward(loaded.train(), other), forward(model, critic), strict=True):
        assert torch.equal(found, expected)


def test_an_adapter_is_saved_without_the_critic(tmp_path: Path):
    model, critic = joined(lora=True)
    policy_state, critic_state = split_state(model.state_dict())
    model.save_pretrained(tmp_path, state_dict=policy_state)
    save_critic(critic_state, tmp_path)
    other = Critic(32, seed=9)
    load_critic(other, tmp_path)
    again = get_peft_model(tiny_model(), LoraConfig(r=4, task_type="CAUSAL_LM"))
    again.load_adapter(tmp_path, "default")
    add_fused_lm_head(again.get_base_model(), outputs=("log_probs", "entropy"))
    other.join(again)
    for found, expected in zip(forward(again.train(), other), forward(model, critic), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", ["missing", "broken", "other"])
def test_what_is_not_this_critic_is_refused(tmp_path: Path, kind):
    if kind == "broken":
        (tmp_path / "critic").mkdir()
        (tmp_path / "critic/model.safetensors").write_bytes(b"\xff" * 40)
    if kind == "other":
        save_critic(Critic(16, seed=0).state_dict(), tmp_path)
    with pytest.raises(RunError, match="does not hold the critic of this recipe"):
        load_critic(Critic(32, seed=0), tmp_path)


def test_a_padded_row_has_the_values_it_has_alone():
    model, critic = joined()
    inputs = {name: value[1:2, :-2] for name, value in batch().items() if name != "labels"}
    with critic.listening(T - 1) as heard:
        model(**inputs, labels=inputs["input_ids"], fused_lm_head=True)
    torch.testing.assert_close(heard[0][0], forward(model, critic)[1][1, : T - 1], rtol=1e-5, atol=1e-5)
