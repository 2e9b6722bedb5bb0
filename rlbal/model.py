"""The policy and its tokenizer: from the hub, from a folder, or tiny and built on the spot; LoRA on top."""

import dataclasses
import typing
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ConfigDict, Field, ValidationError, create_model
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlbal.adapter import WARM_START as WARM_START
from rlbal.adapter import adapter_base, is_adapter
from rlbal.budget_checks import has_budget_field
from rlbal.errors import RecipeError, RlbalError, nearest
from rlbal.recipe import ModelSection, Recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig

# What peft would take and ignore, or what would freeze the adapters.
LORA_FIXED = ("peft_type", "inference_mode", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
LORA_UNTYPED = ("task_type", "init_lora_weights")  # the hint of the second leaves out some that peft takes


def load_tokenizer(name_or_path: str | Path, model: ModelSection | None = None) -> PreTrainedTokenizerBase:
    """Load a tokenizer with left padding and truncation, as generation needs; for an adapter without one, its model's.

    Raises:
        RlbalError: there is no tokenizer there.
    """
    if is_adapter(name_or_path) and not (Path(name_or_path) / "tokenizer_config.json").is_file():
        name_or_path = adapter_base(Path(name_or_path))
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code} if model else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left", truncation_side="left", **options)
    except (OSError, ValueError, KeyError) as error:
        raise _cannot_load("tokenizer", name_or_path, error) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name_or_path: str | Path, model: ModelSection | None = None) -> PreTrainedModel:
    """Load a causal language model to train, with the recipe's dtype, attention, revision and quantization.

    Raises:
        RlbalError: there is no such model, it is an adapter, or what quantizes it is missing.
    """
    if is_adapter(name_or_path):
        raise RecipeError(
            f"`{name_or_path}` (`model.name_or_path`) is an adapter, and a run starts from a whole model",
            fix="merge it into its model first: `rlbal merge RUN`",
        )
    return _load(name_or_path, model)


def load_trained(name_or_path: str | Path, model: ModelSection | None = None) -> Any:
    """Load what training left: a causal language model, or a PEFT model from a folder that holds its adapter alone.

    Raises:
        RlbalError: as `load_model`; or the model below the adapter is gone, or is another one.
    """
    if not is_adapter(name_or_path):
        return _load(name_or_path, model)
    from peft import PeftModel

    folder = Path(name_or_path)
    base = adapter_base(folder)
    whole = _load(base, model)
    try:
        with warnings.catch_warnings():
            # peft would go on with fresh weights, which do nothing.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(whole, str(folder))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError, UserWarning) as error:
        reason = " ".join(str(error).split())[:300]
        raise RlbalError(f"the adapter in {folder} does not load onto `{base}`", why=reason) from None


def _load(name_or_path: str | Path, model: ModelSection | None) -> PreTrainedModel:
    options: dict[str, Any] = {}
    if model is not None:
        options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code, "dtype": model.dtype}
        if model.attn_implementation is not None:
            options["attn_implementation"] = model.attn_implementation
        if model.quantization is not None:
            options["quantization_config"] = _in_4_bits()
    if Path(name_or_path).is_dir():
        name_or_path = Path(name_or_path).resolve()  # an adapter notes it, and may be loaded from elsewhere
    try:
        return AutoModelForCausalLM.from_pretrained(str(name_or_path), **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise _cannot_load("model", name_or_path, error) from None


def _in_4_bits() -> BitsAndBytesConfig:
    """The settings of QLoRA (arXiv 2305.14314).

    Raises:
        RecipeError: bitsandbytes is not installed; whether it supports the device, it says when it loads a model.
    """
    if find_spec("bitsandbytes") is None:
        raise RecipeError(
            "`model.quantization: 4bit` needs bitsandbytes, which is not installed",
            fix="install the extra `qlora`, as in `pip install -e .[qlora]`, on a machine with a GPU; or add "
            "`model.quantization=null` (about four times the memory for the model's weights)",
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def check_quantization(recipe: Recipe) -> None:
    """Refuse quantized weights where they could not be trained or not be generated from.

    Raises:
        RecipeError: no adapters to train, or an engine that needs whole weights.
    """
    if recipe.model.quantization is None:
        return
    if recipe.lora is None:
        raise RecipeError(
            "`model.quantization` goes with `lora:`",
            why="weights in 4 bits cannot be trained, only adapters on top of them",
            fix="add a `lora:` section, or leave `model.quantization` out",
        )
    for engine in ("use_vllm", "use_transformers_continuous_batching"):
        if recipe.trainer.get(engine):
            raise RecipeError(
                f"`trainer.{engine}` cannot generate from `model.quantization: {recipe.model.quantization}`",
                why="TRL 1.16 hands the engine whole weights, or converts them, and these are packed",
                fix="leave it out: rlbal generates from quantized weights itself",
            )


def _cannot_load(kind: str, name_or_path: str | Path, error: Exception) -> RlbalError:
    reason = _first_line(error)
    return RlbalError(
        f"cannot load the {kind} `{name_or_path}` (`model.name_or_path`)",
        why=reason if Path(name_or_path).exists() else f"no such folder here, and from the hub: {reason}",
        fix="give a folder made by save_pretrained, or a hub id that this machine can reach",
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


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
        RecipeError: a key LoraConfig does not have or rlbal decides, a value of the wrong type or size, an adapter that
            could not be loaded again; or as `check_quantization`.
    """
    check_quantization(recipe)
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
        taken = LoraConfig(**{"task_type": "CAUSAL_LM", **recipe.lora})
    except ValidationError as error:
        lines = [f"`lora.{item['loc'][0]}`: {item['msg']} (got {item['input']!r})" for item in error.errors()]
        raise RecipeError("\n".join(lines)) from None
    except (ValueError, TypeError) as error:
        raise RecipeError("peft refuses the `lora:` section", why=str(error)) from None
    _check_start(recipe)
    return taken


def _check_start(recipe: Recipe) -> None:
    """Refuse adapters that start by taking a part out of the model's own weights, where that goes wrong."""
    assert recipe.lora is not None
    start = str(recipe.lora.get("init_lora_weights", True))
    if start.startswith("pissa_niter"):
        raise RecipeError(
            f"`lora.init_lora_weights: {start}` makes adapters that cannot be loaded again",
            why="a random part of the model's weights moves into them, and another one when they are loaded",
            fix="use `pissa`, which is exact",
        )
    with_reference = recipe.trainer.get("beta") or (recipe.ppo is not None and recipe.ppo.kl_penalty)
    if start in ("pissa", "olora") and with_reference:
        raise RecipeError(
            f"`lora.init_lora_weights: {start}` leaves no reference model for the KL term",
            why="the reference is the model without its adapters, and these start with a part of its weights",
            fix="leave `lora.init_lora_weights` out, or set the KL term to 0",
        )


def adapter_parameters(model: PreTrainedModel, lora: "LoraConfig") -> int:
    """How many weights the adapters would have; they are put on and taken off again.

    Raises:
        RecipeError: they do not fit this model.
    """
    from peft import get_peft_model

    try:
        # Other ways to start would change the model's own weights for good.
        wrapped = get_peft_model(model, dataclasses.replace(lora, init_lora_weights=True))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError("the `lora:` section does not fit the model", why=str(error)) from None
    size = sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)
    wrapped.unload()
    return size


def train_in_float32(model: torch.nn.Module) -> None:
    """Turn the weights that are trained into float32.

    TRL makes the adapters of a quantized model bfloat16, in which most updates of usual size round to nothing.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def context_length(model: PreTrainedModel) -> int | None:
    """Tokens of prompt and completion the model has positions for, if its config says."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def default_device() -> torch.device:
    """The accelerator, or the CPU where there is none."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")
