"""`alignment export`: what comes out is the trained model, plain, whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from typer.testing import CliRunner

from alignment.cli import app
from alignment.errors import UserError
from alignment.files import write_json
from alignment.models import export as module
from alignment.models.export import export, find_source, model_card

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
LORA = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}


def adapter(base: Path | str, folder: Path, seed: int = 0, model=None, dtype=torch.float32) -> Path:
    """A random adapter, large enough that nobody could take it for its base."""
    torch.manual_seed(seed)
    model = model or AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    peft_model = get_peft_model(model, LoraConfig(**LORA))
    peft_model.peft_config["default"].base_model_name_or_path = str(base)
    peft_model.save_pretrained(folder)
    return folder


def run_of(final: Path, folder: Path, **recipe) -> Path:
    """A run directory around a trained model, its recipe as given."""
    shutil.copytree(final, folder / "final")
    write_json(folder / "manifest.json", {"recipe": recipe})
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def plain(folder: Path, dtype=torch.float32):
    assert not (folder / "adapter_config.json").exists()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def added_by_hand(base: Path, adapter_folder: Path) -> dict[str, torch.Tensor]:
    """W + (alpha / r) B A, from the files."""
    weights = load_file(base / "model.safetensors")
    parts = load_file(adapter_folder / "adapter_model.safetensors")
    for name in [n for n in parts if n.endswith("lora_A.weight")]:
        inner = name.removeprefix("base_model.model.").replace(".lora_A", "")
        delta = parts[name.replace("lora_A", "lora_B")].float() @ parts[name].float()
        weights[inner] = weights[inner] + LORA["lora_alpha"] / LORA["r"] * delta
    return weights


def test_an_adapter_is_merged_and_nothing_of_it_is_left(tiny, tmp_path):
    run = run_of(
        adapter(tiny, tmp_path / "a"), tmp_path / "run", model={"name_or_path": str(tiny), "dtype": "float32"}
    )
    said = export(run, tmp_path / "out")
    expected = added_by_hand(tiny, run / "final")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6)
    trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(run / "final"))
    difference = (logits(plain(tmp_path / "out")) - logits(trained)).abs().max()
    assert difference < 1e-4 < (logits(plain(tmp_path / "out")) - logits(plain(tiny))).abs().max()
    assert "largest difference from the trained model's logits" in said[-1]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(tiny).chat_template


def test_a_full_model_comes_out_bit_for_bit_without_what_training_left_beside_it(tiny, tmp_path):
    run = run_of(tiny, tmp_path / "run", model={"name_or_path": "org/base", "dtype": "float32"})
    for name in ("degree_head.safetensors", "training_args.bin", "optimizer.pt"):
        (run / "final" / name).write_bytes(b"x")
    export(run, tmp_path / "out")
    found, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", tiny))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert not {"degree_head.safetensors", "training_args.bin"} & {p.name for p in (tmp_path / "out").iterdir()}


def test_loads_without_peft_and_without_a_warning(tiny, tmp_path):
    export(adapter(tiny, tmp_path / "a"), tmp_path / "out")
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "import warnings; warnings.simplefilter('error')\n"
        "import transformers\n"
        f"m = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"transformers.AutoTokenizer.from_pretrained({str(tmp_path / 'out')!r})\n"
        "assert type(m) is transformers.LlamaForCausalLM\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not [line for line in (done.stdout + done.stderr).splitlines() if "Loading weights" not in line]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_merged_in_float32_and_rounded_once(tiny, tmp_path, dtype):
    kind = getattr(torch, dtype)
    run = run_of(
        adapter(tiny, tmp_path / "a", dtype=kind), tmp_path / "run", model={"name_or_path": str(tiny), "dtype": dtype}
    )
    export(run, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(tiny, dtype=kind).save_pretrained(tmp_path / "rounded")
    expected = added_by_hand_in(tmp_path / "rounded", run / "final", kind)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    export(run, tmp_path / "exact", dtype="float32")  # asked for: not rounded again
    exact = load_file(tmp_path / "exact" / "model.safetensors")
    assert {w.dtype for w in exact.values()} == {torch.float32}
    assert all(torch.equal(exact[name].to(kind), found[name]) for name in found)


def added_by_hand_in(base: Path, adapter_folder: Path, kind: torch.dtype) -> dict[str, torch.Tensor]:
    weights = {name: w.float() for name, w in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return {name: w.to(kind) for name, w in added_by_hand(base, adapter_folder).items()}


def test_an_adapter_on_an_adapter(tiny, tmp_path):
    first = adapter(tiny, tmp_path / "first")
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(first)).merge_and_unload()
    second = adapter(first, tmp_path / "second", seed=1, model=merged)
    export(second, tmp_path / "out")
    below = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(first)).merge_and_unload()
    trained = PeftModel.from_pretrained(below, str(second))
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(trained), atol=1e-4, rtol=1e-4)


def test_an_adapter_trained_on_goes_into_the_base_below_it(tiny, tmp_path):
    """`model.name_or_path` an adapter folder: final/ holds the adapter trained further, not a second one on top."""
    before, after = adapter(tiny, tmp_path / "before"), adapter(tiny, tmp_path / "after", seed=1)
    run = run_of(after, tmp_path / "run", model={"name_or_path": str(before), "dtype": "float32"})
    export(run, tmp_path / "out")
    expected = added_by_hand(tiny, after)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_the_recipe_names_the_base_where_the_folder_that_was_loaded_is_gone(tiny, tmp_path):
    """As with a GGUF file, whose conversion lies in a cache."""
    gone = adapter(tmp_path / "cache" / "gone", tmp_path / "a", model=AutoModelForCausalLM.from_pretrained(tiny))
    run = run_of(gone, tmp_path / "run", model={"name_or_path": str(tiny), "dtype": "float32"})
    export(run, tmp_path / "out")
    with pytest.raises(UserError, match="cannot load its base .*gone"):
        export(gone, tmp_path / "other")  # the same adapter without its run


def test_checkpoints_and_final_know_their_run(tiny, tmp_path):
    run = run_of(adapter(tiny, tmp_path / "a"), tmp_path / "run", model={"name_or_path": "org/base"})
    (run / "final").rename(run / "checkpoint-4")
    assert find_source(run / "checkpoint-4").base == "org/base"
    with pytest.raises(UserError, match=r"run: has no final/: training has not ended; go on with --resume"):
        export(run, tmp_path / "out")


@pytest.mark.parametrize("damage", ["unmerged", "written wrongly"])
def test_a_folder_that_is_not_the_trained_model_is_refused(tiny, tmp_path, monkeypatch, damage):
    if damage == "unmerged":
        monkeypatch.setattr(PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
        monkeypatch.setattr(
            "peft.tuners.lora.LoraModel.merge_and_unload", lambda self, *a, **k: self.unload(), raising=True
        )
    else:
        save = module._save

        def wrongly(model, tokenizer, folder):
            save(model, tokenizer, folder)
            weights = load_file(folder / "model.safetensors")
            weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

        monkeypatch.setattr(module, "_save", wrongly)
    with pytest.raises(UserError, match=r"changes the logits by .* nothing was written"):
        export(adapter(tiny, tmp_path / "a"), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_overflow_in_half_precision_is_refused(tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.model.layers[0].mlp.down_proj.weight.data *= 1e7
    model.save_pretrained(tmp_path / "big")
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "big")
    with pytest.raises(UserError, match="rounding to float16"):
        export(tmp_path / "big", tmp_path / "out", dtype="float16")


def test_the_target_is_new_or_empty(tiny, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "taken", tmp_path / "taken" / "mine.txt"):
        with pytest.raises(UserError, match="exists and is not an empty folder"):
            export(tiny, target)
    export(tiny, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").is_file()
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["mine.txt"]


def test_the_card_says_what_it_is_and_shows_no_folder_of_this_machine(tiny, tmp_path):
    recipe = {
        "objective": {"name": "rpo", "eta": 0.005},
        "model": {"name_or_path": str(tiny), "dtype": "float32", "adapter": None},
        "data": {"train": [{"name": str(tmp_path / "secret" / "pairs.jsonl")}], "eval": None},
        "training": {"output_dir": str(tmp_path / "run"), "learning_rate": 5e-7},
    }
    run = run_of(adapter(tiny, tmp_path / "a"), tmp_path / "run", **recipe)
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "objective `rpo`" in card and "eta: 0.005" in card and f"merged into {tiny.name}" in card
    assert "name: pairs.jsonl" in card
    files = [p for p in (tmp_path / "out").iterdir() if p.suffix in (".md", ".json", ".jinja")]
    assert not [p.name for p in files if str(tmp_path.parent) in p.read_text() or str(tiny.parent) in p.read_text()]
    on_hub = model_card(find_source(run_of(tiny, tmp_path / "b", model={"name_or_path": "org/base"})), "x", "float32")
    assert "base_model: org/base" in on_hub and "training started from org/base" in on_hub


def test_a_quantised_base_is_written_out_as_it_was_rounded(tiny, tmp_path):
    """What was trained is the adapter beside four-bit weights: those, not the file's, are what it is merged into."""
    section = {"name_or_path": str(tiny), "dtype": "float32", "quantization": "nf4"}
    run = run_of(adapter(tiny, tmp_path / "a"), tmp_path / "run", model=section)
    said = export(run, tmp_path / "out")
    assert "written out in full" in said[0]
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="float32"
    )
    quantised = AutoModelForCausalLM.from_pretrained(tiny, quantization_config=four_bits)
    for layer in quantised.modules():  # where the CPU could, bitsandbytes would compute in bfloat16 all the same
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    trained = logits(PeftModel.from_pretrained(quantised, run / "final"))
    torch.testing.assert_close(logits(plain(tmp_path / "out")), trained, atol=1e-4, rtol=1e-4)
    unquantised = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), run / "final"))
    assert float((unquantised - trained).abs().max()) > 0.01
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_command(tiny, tmp_path):
    done = CliRunner().invoke(app, ["export", str(tiny), str(tmp_path / "out")])
    assert done.exit_code == 0 and done.stdout.splitlines()[-1] == f"exported: {tmp_path / 'out'}"
    for words, message in (
        ([str(tmp_path / "none"), "x"], "no such folder"),
        ([str(tmp_path), "x"], "neither a run"),
        ([str(tiny), str(tmp_path / "y"), "--dtype", "int8"], "--dtype: 'int8' is not one of"),
    ):
        failed = CliRunner().invoke(app, ["export", *words])
        assert isinstance(failed.exception, UserError) and message in str(failed.exception)
