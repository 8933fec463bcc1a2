"""A trained reward model as a reward: a sequence classifier with one label, in this process, loaded when it is first asked."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosstrain.errors import UserError

ROWS = 16
"""Texts that go through the model together."""


def is_model(spec: str) -> bool:
    """Whether a reward's spec names a model: a folder, or a hub id of the form owner/name."""
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return "/" in spec or (folder / "config.json").is_file()
    return bool(re.fullmatch(r"\w[\w.-]*/[\w.-]+", spec)) and not spec.endswith(".py")


def files_hash(folder: str) -> str:
    """sha256 of a folder's weights, as they lie there."""
    digest = hashlib.sha256()
    place = Path(folder).expanduser()
    for file in sorted([*place.glob("*.safetensors"), *place.glob("*.bin")]):
        with file.open("rb") as content:
            digest.update(f"{file.name} {hashlib.file_digest(content, 'sha256').hexdigest()}".encode())
    return digest.hexdigest()


class ModelReward:
    """A reward model by its folder or hub id; called as reward functions are.

    A text is the prompt and the completion in the chat template of the reward model's own tokenizer, or one after the other where
    they are plain text, ended by its end token. The score is the model's one logit. A text that is longer than the model can read,
    or that its template refuses, has no score.

    Raises UserError for a folder that holds no such model.
    """

    def __init__(self, spec: str, device: str = "cpu") -> None:
        self.spec, self.device = spec, device
        self._loaded: tuple[Any, Any] | None = None
        config = Path(spec).expanduser() / "config.json"
        if Path(spec).expanduser().is_dir():
            if not config.is_file():
                raise UserError(f"reward {spec}: the folder has no config.json; a reward model's Hugging Face folder is needed")
            self._check(json.loads(config.read_text(encoding="utf-8")))

    @property
    def name(self) -> str:
        """What metrics call it: the last part of the folder or id."""
        return Path(self.spec).name

    def on(self, device: str) -> ModelReward:
        """The same reward on another device."""
        return ModelReward(self.spec, device)

    def __call__(self, *, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """One score per completion, None where there is none."""
        import torch

        model, tokenizer = self._load()
        texts = [
            self._ids(model, tokenizer, p, c, columns, i) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))
        ]
        scores: list[float | None] = [None] * len(texts)
        known = [i for i, ids in enumerate(texts) if ids is not None]
        rows = ROWS if model.config.get_text_config().pad_token_id is not None else 1
        for start in range(0, len(known), rows):
            some = known[start : start + rows]
            with torch.no_grad():
                found = _scores(model, [ids for i in some if (ids := texts[i]) is not None])
            for i, score in zip(some, found, strict=True):
                scores[i] = score
        return scores

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is not None:
            return self._loaded
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, logging

        logging.disable_progress_bar()
        place = str(Path(self.spec).expanduser()) if Path(self.spec).expanduser().is_dir() else self.spec
        try:
            self._check(AutoConfig.from_pretrained(place).to_dict())
            with torch.random.fork_rng(devices=[]):  # a run's random numbers do not depend on when this happens
                model = AutoModelForSequenceClassification.from_pretrained(place, dtype="auto")
            tokenizer = AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError, ImportError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"reward {self.spec}: the reward model cannot be loaded: {first}") from error
        self._loaded = model.to(self.device).eval().requires_grad_(False), tokenizer
        return self._loaded

    def _check(self, config: dict[str, Any]) -> None:
        """UserError unless the config is that of a sequence classifier with one label."""
        kinds = config.get("architectures") or []
        labels = config.get("num_labels", len(config.get("id2label") or {0: "", 1: ""}))
        if not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
            raise UserError(
                f"reward {self.spec}: it is {', '.join(map(str, kinds)) or 'a model of no architecture'}; a reward model is a "
                "sequence classifier (AutoModelForSequenceClassification) with one label"
            )
        if labels != 1:
            raise UserError(f"reward {self.spec}: the classifier has {labels} labels; a reward model has one")

    def _ids(
        self, model: Any, tokenizer: Any, prompt: Any, completion: Any, columns: dict[str, Any], index: int
    ) -> list[int] | None:
        """What the model reads of one completion; None for what it cannot read."""
        from crosstrain.reward_models import OURS

        if getattr(model.config, OURS, False):
            ids = _as_trained(tokenizer, prompt, completion, columns, index)
        else:
            ids = _as_usual(tokenizer, prompt, completion)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return None if not ids or (longest is not None and len(ids) > longest) else ids


def _as_trained(tokenizer: Any, prompt: Any, completion: Any, columns: dict[str, Any], index: int) -> list[int] | None:
    """The tokens that a preference row with this prompt and answer has in training."""
    from crosstrain.data.chat import encode
    from crosstrain.data.rows import Row

    tools = {"tools": columns["tools"][index]} if "tools" in columns else {}
    chat = not isinstance(prompt, str)
    said = completion[-1]["content"] if chat else completion
    answer = tuple(completion) if chat else completion
    empty = not said.strip()
    kind: Any = "prompt" if empty else "prompt_completion"
    row = Row(
        kind=kind,
        prompt=tuple(prompt) if chat else prompt,
        completion=None if empty else answer,
        columns=tools,
        where=f"completion {index}",
    )
    try:
        example = encode(row, tokenizer, id="reward")
    except UserError:
        return None
    if empty:  # no template has to know a turn without words
        return [*example.prompt_tokens, *tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return list(example.expert[0].tokens)


def _as_usual(tokenizer: Any, prompt: Any, completion: Any) -> list[int] | None:
    """The tokens that transformers' own conventions give a conversation, or a text."""
    if isinstance(prompt, str):
        return list(tokenizer(prompt + completion + (tokenizer.eos_token or ""))["input_ids"])
    if tokenizer.chat_template is None:
        raise UserError("the prompt is a chat, and the reward model's tokenizer has no chat template")
    try:
        text = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    except Exception:  # templates raise what they like; the row has no score
        return None
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _scores(model: Any, texts: Sequence[Sequence[int]]) -> list[float]:
    """The model's logit of each text, padded on the right."""
    import torch

    width = max(map(len, texts))
    pad = model.config.get_text_config().pad_token_id
    ids = [[*text, *[0 if pad is None else pad] * (width - len(text))] for text in texts]
    mask = [[1] * len(text) + [0] * (width - len(text)) for text in texts]
    device = model.device
    logits = model(input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device)).logits
    return [float(x) for x in logits[:, 0].float().cpu()]


def unusable(scores: Sequence[float | None]) -> str:
    """What is wrong with a model's scores, in words; nothing where all are numbers."""
    bad = next((s for s in scores if s is not None and not math.isfinite(s)), None)
    return "" if bad is None else f"gave {bad}; a score is a finite number or None"
