"""`rlbal merge`: the adapter of a run in the weights of an ordinary model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from rlbal.adapter import WARM_START
from rlbal.cli import app
from rlbal.errors import RlbalError, RunError
from rlbal.merge_command import merge_adapter
from rlbal.model import load_model, lora_config
from rlbal.run import RunDirectory
from rlbal.tiny import build_model, build_tokenizer
from tests.small_recipe import small

IDS = torch.tensor([[7, 1, 250, 33]])


def make_run(folder: Path, *overrides: str, steps: tuple[int | None, ...] = (None,)) -> dict[int | None, torch.Tensor]:
    """A run with adapters of random weights: final (None) and of steps. Their logits for IDS."""
    recipe = small("lora={r: 4, target_modules: all-linear}", "model.tiny={hidden_size: 32, layers: 2}", *overrides)
    run, tokenizer = RunDirectory(folder), build_tokenizer([])
    run.start(recipe)
    assert recipe.model.tiny is not None
    build_model(recipe.model.tiny, tokenizer, seed=0).save_pretrained(folder / WARM_START)
    results = {}
    for step in steps:
        lora = lora_config(
            small(*[one for one in ("lora={r: 4, target_modules: all-linear}", *overrides) if "lora" in one])
        )
        assert isinstance(lora, LoraConfig)
        model = get_peft_model(load_model(folder / WARM_START), lora)
        noise = torch.Generator().manual_seed(step or 0)
        with torch.no_grad():
            for one in model.parameters():
                if one.requires_grad:
                    one.add_(0.05 * torch.randn(one.shape, generator=noise))
        place = run.model_path if step is None else folder / f"checkpoint-{step}"
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
        results[step] = logits(model)
    return results


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def whole(folder: Path) -> torch.Tensor:
    """Logits of the model there, as anyone would load it."""
    assert not (folder / "adapter_config.json").exists()
    return logits(AutoModelForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize(
    "kind", ["r: 4", "r: 4, use_dora: true", "r: 4, use_rslora: true", "r: 4, init_lora_weights: pissa"]
)
def test_the_merged_model_says_what_the_adapter_said(kind: str, tmp_path: Path) -> None:
    expected = make_run(tmp_path / "run", f"lora={{{kind}}}")[None]
    assert merge_adapter(tmp_path / "run") == tmp_path / "run" / "merged"
    torch.testing.assert_close(whole(tmp_path / "run" / "merged"), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(load_model(tmp_path / "run" / WARM_START))).abs().max() > 0.1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "merged")
    assert tokenizer.decode(tokenizer("Hi")["input_ids"]) == "Hi" and tokenizer.chat_template


def test_a_checkpoint_and_another_place(tmp_path: Path) -> None:
    expected = make_run(tmp_path / "run", steps=(None, 5))
    place = tmp_path / "new" / "place"
    merge_adapter(tmp_path / "run", "5", place)
    torch.testing.assert_close(whole(place), expected[5], atol=1e-5, rtol=1e-5)
    assert (expected[5] - expected[None]).abs().max() > 0.1


def test_from_the_command_line(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    found = CliRunner().invoke(app, ["merge", str(tmp_path / "run"), "--output", str(tmp_path / "whole")])
    assert (found.exit_code, found.output.strip()) == (0, f"merged model: {tmp_path / 'whole'}")
    assert whole(tmp_path / "whole").isfinite().all()


def test_only_lora_runs_are_merged(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a run of rlbal"):
        merge_adapter(tmp_path)
    run = RunDirectory(tmp_path / "run")
    run.start(small())
    with pytest.raises(RunError, match=r"no LoRA run[\s\S]*run/model as it is"):
        merge_adapter(run.path)


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    make_run(tmp_path, steps=(5,))
    with pytest.raises(RunError, match=r"no final model yet[\s\S]*--checkpoint best"):
        merge_adapter(tmp_path)
    with pytest.raises(RunError, match="no checkpoint"):
        merge_adapter(tmp_path, "6")
    (tmp_path / "checkpoint-7").mkdir()
    with pytest.raises(RunError, match="holds no adapter"):
        merge_adapter(tmp_path, "7")


def test_nothing_is_written_over(tmp_path: Path) -> None:
    make_run(tmp_path)
    (tmp_path / "merged").mkdir()
    with pytest.raises(RunError, match=r"is there already[\s\S]*--output"):
        merge_adapter(tmp_path)
    assert not list((tmp_path / "merged").iterdir())


def test_the_model_below_is_needed(tmp_path: Path) -> None:
    make_run(tmp_path)
    shutil.rmtree(tmp_path / WARM_START)
    with pytest.raises(RlbalError, match="is gone"):
        merge_adapter(tmp_path)
    assert not (tmp_path / "merged").exists()


def test_a_broken_adapter_is_not_merged(tmp_path: Path) -> None:
    make_run(tmp_path)
    path = tmp_path / "model" / "adapter_model.safetensors"
    save_file({name: torch.full_like(one, torch.nan) for name, one in load_file(path).items()}, path)
    with pytest.raises(RlbalError, match=r"cannot be merged[\s\S]*NaN"):
        merge_adapter(tmp_path)
    assert not (tmp_path / "merged").exists()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "run")

    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(RunError, match=r"could not be written[\s\S]*No space left"):
        merge_adapter(tmp_path / "run", output=tmp_path / "out" / "whole")
    assert not list((tmp_path / "out").iterdir())


def test_a_run_on_4_bits_is_merged_into_the_plain_model(tmp_path: Path) -> None:
    """Without bitsandbytes: nothing is quantized on the way."""
    expected = make_run(tmp_path, "model.quantization=4bit")[None]
    merge_adapter(tmp_path)
    torch.testing.assert_close(whole(tmp_path / "merged"), expected, atol=1e-5, rtol=1e-5)
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_model_that_comes_quantized_is_not_merged_into(tmp_path: Path) -> None:
    make_run(tmp_path)
    path = tmp_path / WARM_START / "config.json"
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": settings}))
    with pytest.raises(RlbalError, match=r"is quantized in its own files[\s\S]*model\.quantization: 4bit"):
        merge_adapter(tmp_path)
