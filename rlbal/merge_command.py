"""`rlbal merge`: a LoRA run's adapter and the model below it, as one model."""

import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlbal.adapter import adapter_base, is_adapter
from rlbal.checkpoint import bring_to_disk
from rlbal.errors import RlbalError, RunError
from rlbal.eval_command import model_folder
from rlbal.quiet import quiet_libraries
from rlbal.recipe import ModelSection
from rlbal.run import MERGED, RunDirectory


def merge_adapter(target: Path, checkpoint: str | None = None, output: Path | None = None) -> Path:
    """Write the merged model with its tokenizer to a new folder, or nothing.

    A run with `model.quantization` is merged into the same model in `model.dtype`: quantizing the sum would round most
    of the adapter away.

    Args:
        target: a run directory.
        checkpoint: `final` (default), `best` or a step.
        output: the new folder; default `merged` in the run directory.

    Returns:
        The new folder.

    Raises:
        RlbalError: no LoRA run, no adapter there yet, the folder exists already, the model below is gone or quantized
            by itself, or nothing can be written there.
    """
    run = RunDirectory(target)
    recipe = run.recipe()
    if recipe.lora is None:
        raise RunError(
            f"{run.path} is no LoRA run, so there is no adapter to merge",
            why="its recipe has no `lora:` section, and all weights were trained",
            fix=f"use {run.model_path} as it is",
        )
    source, folder = model_folder(run, checkpoint), output or run.path / MERGED
    if folder.exists():
        raise RunError(f"{folder} is there already", fix="remove it, or choose another place with --output")
    if not is_adapter(source):
        raise RunError(f"{source} holds no adapter", fix="finish the run (`--resume`), or choose another --checkpoint")
    quiet_libraries()
    from rlbal.model import load_tokenizer

    parts = [_merged(source, recipe.model), load_tokenizer(source, recipe.model)]
    try:
        _write(parts, folder)
    except (OSError, SafetensorError) as error:
        raise RunError(f"the merged model could not be written to {folder}", why=str(error)) from None
    return folder


def _merged(source: Path, section: ModelSection) -> Any:
    """The model of an adapter's folder with the adapter in its weights, on the CPU."""
    from rlbal.model import load_trained

    section = section.model_copy(update={"quantization": None})
    _check_plain(adapter_base(source), section)
    try:
        return load_trained(source, section).merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError) as error:
        raise RlbalError(f"the adapter in {source} cannot be merged", why=str(error)) from None


def _check_plain(base: str, section: ModelSection) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            base, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError, KeyError):
        return  # loading the model says it better
    if getattr(config, "quantization_config", None) is not None:
        raise RlbalError(
            f"the model below the adapter, `{base}`, is quantized in its own files",
            why="adding to quantized weights rounds most of the adapter away",
            fix="use the adapter as it is; next time train on the plain model, with `model.quantization: 4bit`",
        )


def _write(parts: list[Any], folder: Path) -> None:
    """Save into a folder aside, bring it to disk, and only then give it its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
        aside = Path(place) / folder.name
        for part in parts:
            part.save_pretrained(aside)
        bring_to_disk(aside)
        aside.rename(folder)
