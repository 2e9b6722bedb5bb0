"""Adapters: what they may be, loading them back, and 4-bit models below them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rlbal.adapter import WARM_START, adapter_base, is_adapter
from rlbal.errors import RecipeError, RlbalError
from rlbal.model import adapter_parameters, load_model, load_tokenizer, load_trained, lora_config, train_in_float32
from rlbal.recipe import ModelSection, TinySection
from rlbal.tiny import build_model, build_tokenizer
from rlbal.trainer_args import bind_trainer
from tests.small_recipe import small

TINY = TinySection(hidden_size=32, layers=2, heads=2, max_positions=128)
IDS = torch.tensor([[7, 1, 250, 33], [90, 91, 92, 93]])
KINDS = {
    "lora": {"target_modules": "all-linear"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "norms too": {"modules_to_save": ["norm"]},
}


def tiny() -> Any:
    return build_model(TINY, build_tokenizer([]), seed=0)


def make_adapter(folder: Path, **lora: Any) -> torch.Tensor:
    """A tiny model in `folder/warm_start`, an adapter with random weights in `folder/model`; its logits for IDS."""
    base = folder / WARM_START
    tiny().save_pretrained(base)
    build_tokenizer([]).save_pretrained(base)
    model = get_peft_model(load_model(base), LoraConfig(r=4, task_type="CAUSAL_LM", **lora))
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in model.parameters():
            if one.requires_grad:
                one.add_(0.05 * torch.randn(one.shape, generator=noise))
    model.save_pretrained(folder / "model")
    return logits(model)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_loaded_as_it_was(kind: str, tmp_path: Path) -> None:
    expected = make_adapter(tmp_path, **KINDS[kind])
    loaded = logits(load_trained(tmp_path / "model"))
    assert torch.equal(loaded, expected)
    assert (loaded - logits(load_trained(tmp_path / WARM_START))).abs().max() > 0.1


def test_its_tokenizer_is_its_model_s_unless_it_has_one(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    assert load_tokenizer(tmp_path / "model").decode([72, 105]) == "Hi"
    own = build_tokenizer(["<think>"])
    own.save_pretrained(tmp_path / "model")
    assert len(load_tokenizer(tmp_path / "model")) == len(own)


def test_a_run_that_was_moved_has_its_model_beside_the_adapter(tmp_path: Path) -> None:
    expected = make_adapter(tmp_path / "here")
    assert Path(adapter_base(tmp_path / "here" / "model")) == tmp_path / "here" / WARM_START
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert torch.equal(logits(load_trained(tmp_path / "there" / "model")), expected)


def test_the_base_is_noted_so_that_it_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_adapter(Path("run"))
    noted = json.loads(Path("run/model/adapter_config.json").read_text())["base_model_name_or_path"]
    assert noted == str(tmp_path / "run" / WARM_START)


def test_a_missing_base_is_named(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    shutil.rmtree(tmp_path / WARM_START)
    with pytest.raises(RlbalError, match=rf"is gone: {tmp_path / WARM_START}[\s\S]*base_model_name_or_path"):
        load_trained(tmp_path / "model")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"base_model_name_or_path": null}', '{"base_model_name_or_path": 3}']
)
def test_an_adapter_must_say_what_it_belongs_to(content: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(RlbalError, match="does not say which model"):
        load_trained(tmp_path)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    shutil.rmtree(tmp_path / WARM_START)
    build_model(TINY.model_copy(update={"hidden_size": 64}), build_tokenizer([]), 0).save_pretrained(
        tmp_path / WARM_START
    )
    with pytest.raises(RlbalError, match=r"does not load onto[\s\S]*size mismatch"):
        load_trained(tmp_path / "model")


def test_an_adapter_with_weights_missing_is_refused(tmp_path: Path) -> None:
    """peft would warn, and go on with an adapter that does nothing there."""
    make_adapter(tmp_path)
    path = tmp_path / "model" / "adapter_model.safetensors"
    weights = load_file(path)
    weights.popitem()
    save_file(weights, path)
    with pytest.raises(RlbalError, match=r"does not load onto[\s\S]*missing adapter keys"):
        load_trained(tmp_path / "model")
    path.write_bytes(b"not weights")
    with pytest.raises(RlbalError, match="does not load onto"):
        load_trained(tmp_path / "model")


def test_a_run_does_not_start_from_an_adapter(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    assert is_adapter(tmp_path / "model") and not is_adapter(tmp_path / WARM_START)
    with pytest.raises(RecipeError, match=r"is an adapter[\s\S]*rlbal merge RUN"):
        load_model(tmp_path / "model")


@pytest.mark.parametrize("start", [True, "gaussian", "pissa", "olora", "orthogonal"])
def test_counting_adapters_leaves_the_model_as_it_is(start: Any) -> None:
    """`pissa` and `olora` take a part out of the weights that they are put on."""
    model, expected = tiny(), logits(tiny())
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=start, task_type="CAUSAL_LM")
    assert adapter_parameters(model, config) == 2 * 4 * (32 + 32)  # two layers, A and B
    assert torch.equal(logits(model), expected)
    assert config.init_lora_weights == start


BAD = [
    (["lora={init_lora_weights: pissa_niter_16}"], "makes adapters that cannot be loaded again"),
    (["lora={init_lora_weights: pissa}", "trainer.beta=0.1"], "leaves no reference model for the KL term"),
    (["lora={init_lora_weights: olora}", "algorithm.name=ppo", "ppo.kl_penalty=0.1"], "leaves no reference model"),
    (["model.quantization=4bit"], "`model.quantization` goes with `lora:`"),
    (["model.quantization=4bit", "lora={r: 4}", "trainer.use_vllm=true"], "`trainer.use_vllm` cannot generate"),
    (
        ["model.quantization=4bit", "lora={r: 4}", "trainer.use_transformers_continuous_batching=true"],
        "`trainer.use_transformers_continuous_batching` cannot generate",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), BAD)
def test_what_cannot_work_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        bind_trainer(small(*overrides))
    assert message in str(caught.value)


def test_starts_that_can_be_loaded_again_are_taken() -> None:
    for start in ("pissa", "olora", "gaussian"):
        taken = lora_config(small(f"lora={{init_lora_weights: {start}}}"))
        assert taken is not None and taken.init_lora_weights == start


def test_quantization_has_one_kind() -> None:
    with pytest.raises(RecipeError, match=r"model\.quantization"):
        small("model.quantization=8bit")


def quantized() -> ModelSection:
    """As in a recipe that binds on any machine, whether or not bitsandbytes is there."""
    recipe = small("model.quantization=4bit", "model.dtype=bfloat16", "lora={r: 4}")
    bind_trainer(recipe)
    return recipe.model


def test_bitsandbytes_is_asked_for_when_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("rlbal.model.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"needs bitsandbytes[\s\S]*pip install -e \.\[qlora\]") as caught:
        load_model(tmp_path, quantized())
    assert "model.quantization=null" in str(caught.value)


def test_weights_in_4_bits_are_those_of_qlora(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """bitsandbytes itself is not tried here, only what it is asked for."""
    asked: dict[str, Any] = {}

    def from_pretrained(name: str, **options: Any) -> Any:
        asked.update(options)
        raise RuntimeError("None of the available devices are supported by bitsandbytes")

    monkeypatch.setattr("rlbal.model.find_spec", lambda name: object())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(RlbalError, match="None of the available devices"):
        load_model(tmp_path, quantized())
    settings = asked["quantization_config"]
    assert (settings.load_in_4bit, settings.bnb_4bit_quant_type) == (True, "nf4")
    assert (settings.bnb_4bit_use_double_quant, settings.bnb_4bit_compute_dtype) == (True, torch.bfloat16)
    assert asked["dtype"] == "bfloat16"
    with pytest.raises(RlbalError):
        load_model(tmp_path, quantized().model_copy(update={"quantization": None}))
    assert set(asked) == {"dtype", "revision", "trust_remote_code", "quantization_config"}


def test_only_what_is_trained_becomes_float32() -> None:
    """As TRL leaves a quantized model's adapters, in bfloat16."""
    tiny = build_model(TinySection(hidden_size=32, layers=1, heads=2), build_tokenizer([]), seed=0)
    model = get_peft_model(tiny, LoraConfig(r=2, target_modules="all-linear")).to(torch.bfloat16)
    train_in_float32(model)
    dtypes = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
