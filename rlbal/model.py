"""The policy and its tokenizer: from the hub, from a folder, or tiny and built on the spot; LoRA on top."""

import dataclasses
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ConfigDict, Field, ValidationError, create_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlbal.budget_checks import has_budget_field
from rlbal.errors import RecipeError, RlbalError, nearest
from rlbal.recipe import ModelSection, Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig

WARM_START = "warm_start"
# What peft would take and ignore, or what would freeze the adapters.
LORA_FIXED = ("peft_type", "inference_mode", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
LORA_UNTYPED = ("task_type", "init_lora_weights")  # the second: `pissa_niter_16` is not among the hint's literals


def load_tokenizer(name_or_path: str | Path, model: ModelSection | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer with left padding and truncation, as generation needs.

    Raises:
        RlbalError: there is no tokenizer there.
    """
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code} if model else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left", truncation_side="left", **options)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load("tokenizer", name_or_path, error) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name_or_path: str | Path, model: ModelSection | None = None) -> PreTrainedModel:
    """Load a causal language model with the recipe's dtype, attention and revision (a LoRA folder with its base).

    Raises:
        RlbalError: there is no such model.
    """
    options: dict[str, Any] = {}
    if model is not None:
        options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code, "dtype": model.dtype}
        if model.attn_implementation is not None:
            options["attn_implementation"] = model.attn_implementation
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _cannot_load("model", name_or_path, error) from None


def _cannot_load(kind: str, name_or_path: str | Path, error: Exception) -> RlbalError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return RlbalError(
        f"cannot load the {kind} `{name_or_path}` (`model.name_or_path`)",
        why=reason if Path(name_or_path).exists() else f"no such folder here, and from the hub: {reason}",
        fix="give a folder made by save_pretrained, or a hub id that this machine can reach",
    )


def build_tiny(recipe: Recipe, train: "Dataset | None", folder: Path, completion_limit: int) -> None:
    """Build the recipe's tiny model, warm-start it if asked to, and save it with its tokenizer.

    Args:
        recipe: a recipe with `model.tiny`.
        train: training rows; the warm start makes its worked traces from their problems. None without one.
        folder: where to save. A complete one is left as it is, so that resuming repeats nothing.
        completion_limit: longest completion in tokens; prompts that tell a budget get random ones up to this.

    Raises:
        RlbalError: the warm start did not converge or the data do not suit it.
    """
    from rlbal.tiny import build_model, build_tokenizer
    from rlbal.warm_start import warm_start

    tiny = recipe.model.tiny
    assert tiny is not None
    if (folder / "config.json").is_file():
        return
    tokenizer = build_tokenizer(tiny.phrases)
    model = build_model(tiny, tokenizer, recipe.seed)
    if tiny.warm_start is not None:
        assert train is not None
        largest_budget = completion_limit if has_budget_field(recipe.data) else None
        warm_start(model, tokenizer, train, tiny.warm_start, recipe.seed, largest_budget)
    aside = folder.with_name(folder.name + ".tmp")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.replace(folder)


def lora_config(recipe: Recipe) -> "LoraConfig | None":
    """The recipe's `lora:` section as peft's LoraConfig, or None for full training.

    Raises:
        RecipeError: a key LoraConfig does not have or rlbal decides, or a value of the wrong type or size.
    """
    if recipe.lora is None:
        return None
    from peft import LoraConfig

    known = [field.name for field in dataclasses.fields(LoraConfig) if field.init and field.name not in LORA_FIXED]
    hints, fields = typing.get_type_hints(LoraConfig), {}
    for key in recipe.lora:
        if key not in known:
            raise RecipeError(f"`lora.{key}` is not a field of peft's LoraConfig. {nearest(key, known)}")
        if key not in LORA_UNTYPED:
            fields[key] = (hints[key], Field(gt=0) if key == "r" else Field())
    if recipe.lora.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        raise RecipeError("`lora.task_type` must be CAUSAL_LM, since a policy writes text", fix="leave it out")
    config = ConfigDict(extra="ignore", arbitrary_types_allowed=True, protected_namespaces=())
    checker: Any = create_model("LoraSection", __config__=config, **fields)  # type: ignore[call-overload]
    try:
        checker.model_validate(recipe.lora)
        return LoraConfig(**{"task_type": "CAUSAL_LM", **recipe.lora})
    except ValidationError as error:
        lines = [f"`lora.{item['loc'][0]}`: {item['msg']} (got {item['input']!r})" for item in error.errors()]
        raise RecipeError("\n".join(lines)) from None
    except (ValueError, TypeError) as error:
        raise RecipeError("peft refuses the `lora:` section", why=str(error)) from None


def adapter_parameters(model: PreTrainedModel, lora: "LoraConfig") -> int:
    """How many weights the adapters would have; they are put on and taken off again.

    Raises:
        RecipeError: they do not fit this model.
    """
    from peft import get_peft_model

    try:
        wrapped = get_peft_model(model, lora)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError("the `lora:` section does not fit the model", why=str(error)) from None
    size = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    wrapped.unload()
    return size


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens of prompt and completion the model has positions for, if its config says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def default_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")
