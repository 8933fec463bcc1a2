"""A stream of a recipe: where its rows come from, and what is done to them before they are drawn (a teacher's answers, filters,
selection, order)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    Field,
    JsonValue,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from crosstrain.cache import keep_rows
from crosstrain.config.fields import FOR_HASH, STRICT, Count, Flag, Number, Positive, Seed, Share, TaskConfig, Whole, named


def _changed(spec: BaseModel, *keys: str) -> list[str]:
    """Those of the keys that are not at their default."""
    return [key for key in keys if getattr(spec, key) != type(spec).model_fields[key].default]


class FilterSpec(BaseModel):
    """Rows that are left out, by quality, then by length, then as duplicates of a row that stays."""

    model_config = STRICT
    min_quality: Number | None = Field(None, description="Rows with less than this in `quality_column` are left out.")
    max_quality: Number | None = Field(None, description="Rows with more than this in `quality_column` are left out.")
    quality_column: str | None = Field(None, description="Column with a number in every row: a grade, a solve rate.")
    min_length: Count | None = Field(
        None, description="Fewest tokens of every answer a row brings, its end token included, before any cut at max_length."
    )
    max_length: Count | None = Field(None, description="Most tokens of every answer, counted alike.")
    deduplicate: Literal["exact", "near"] | None = Field(
        None,
        description="Leave out rows whose text (prompt and answers, letter case and white space aside) an earlier row has: exact, "
        "or near: the sets of their runs of three words overlap by `near_threshold` or more.",
    )
    near_threshold: Share = Field(
        0.8, description="Shared runs of three words over all runs of both (Jaccard) from which rows are near duplicates."
    )

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if not _changed(self, *(key for key in type(self).model_fields if key != "near_threshold")):
            raise ValueError("has no effect: give it min_length, max_length, min_quality, max_quality or deduplicate")
        limits = self.min_quality is not None or self.max_quality is not None
        if limits != (self.quality_column is not None):
            raise ValueError("'quality_column' goes with 'min_quality' or 'max_quality', and these with it; one is missing")
        for low, high in (("min_quality", "max_quality"), ("min_length", "max_length")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low!r} ({least:g}) is more than {high!r} ({most:g}), so no row could stay")
        if _changed(self, "near_threshold") and self.deduplicate != "near":
            raise ValueError(f"'near_threshold' has no effect with deduplicate={self.deduplicate!r}; it is for 'near'")
        return self


class SelectSpec(BaseModel):
    """Rows that are chosen, of those that the filter leaves, before step 1."""

    model_config = STRICT
    rule: Literal["fisher", "loss", "random"] = Field(
        description="fisher: rows whose tokens together tell most about the last layer (FisherSFT). loss: by mean loss of their "
        "answers under the untrained model. random: any, by the recipe's seed; the baseline."
    )
    size: Count = Field(description="How many rows are chosen; less than there are.")
    ridge: Positive = Field(
        1.0,
        description="fisher: what the design matrix starts from, times the identity; small against the embeddings' squares.",
    )
    direction: Literal["highest", "lowest"] = Field("highest", description="loss: which losses are chosen.")

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        for key, rule in (("ridge", "fisher"), ("direction", "loss")):
            if self.rule != rule and _changed(self, key):
                raise ValueError(f"{key!r} has no effect with rule={self.rule!r}; it is for {rule!r}")
        return self


class OrderSpec(BaseModel):
    """In which order rows come (a curriculum). A bare string is `by`."""

    model_config = STRICT
    by: Literal["column", "length", "loss"] = Field(
        description="What difficulty is: a number in a `column`, the tokens of the answer, or its mean loss under the untrained "
        "model. Higher is harder; where higher is easier (a solve rate), take `direction: hard_first`."
    )
    column: str | None = Field(None, description="The column with a number in every row.")
    direction: Literal["easy_first", "hard_first"] = Field("easy_first", description="Which end comes first.")
    pacing: Literal["linear", "sqrt", "sorted"] = Field(
        "linear",
        description="linear, sqrt: rows are drawn at random from a pool that begins with the first `start` of them and grows to "
        "all over `until` epochs, and are then shuffled anew each epoch. sorted: every epoch runs from one end to the other.",
    )
    start: Share = Field(0.1, description="Share of the rows that the pool begins with.")
    until: Positive = Field(1.0, description="Epochs (rows drawn over rows there are) after which every row is in the pool.")

    _short = model_validator(mode="before")(lambda value: named("by", value))

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if (self.by == "column") != (self.column is not None):
            raise ValueError(f"'by: column' and a 'column' go together; got by={self.by!r} and column={self.column!r}")
        if self.pacing == "sorted" and (useless := _changed(self, "start", "until")):
            raise ValueError(f"{useless[0]!r} has no effect with pacing='sorted', which has no pool")
        if self.start == 1:
            raise ValueError("'start' is 1, so every row is in the pool from the first, and the order has no effect")
        return self


def _rows(value: Any) -> Any:
    """A list of rows or a `datasets.Dataset` as the path of a file that holds them; any other value as it is."""
    rows = value.to_list() if hasattr(value, "to_list") else value
    if not isinstance(rows, list):
        return value
    if names := [row for row in rows if isinstance(row, str)]:
        raise ValueError(f"got the list {names!r:.80}; a stream is one file each: {{train: FILE, other: FILE}}")
    return str(keep_rows(rows))


class TextTeacherSpec(BaseModel):
    """A server that speaks OpenAI's protocol and answers the rows' prompts, once, before training (sequence-level distillation)."""

    model_config = STRICT
    base_url: str = Field(description="The server's address, to which `/chat/completions` is added: http://127.0.0.1:8000/v1.")
    model: str = Field(min_length=1, description="The model's name on that server.")
    api_key_env: str | None = Field(
        None, description="Name of the environment variable that holds the key; when not given, none is sent."
    )
    temperature: Number = Field(0.0, ge=0, description="0 asks for the most likely answer, above for samples.")
    top_p: Share = Field(1.0, description="Sample from the smallest set of tokens with this probability; 1 is all.")
    max_completion_length: Count = Field(
        256, description="Tokens of the teacher after which an answer is cut; cut answers are left out, with a counted warning."
    )
    n: Count = Field(1, description="Answers to every prompt, each a row of its own.")
    extra_body: dict[str, JsonValue] = Field(
        {},
        description="Further fields of every request, such as `stop` or `seed`; null takes `max_tokens` or `temperature` out.",
    )
    replace: Flag = Field(
        False, description="Rows that bring an answer get the teacher's in its place; they are errors when this is false."
    )
    concurrency: Count = Field(4, description="Requests under way at a time; changes the time, not the rows.")
    timeout_s: Positive = Field(120.0, description="Seconds without an answer after which a request has failed.")
    retries: Whole = Field(
        5,
        description="How often a request is tried again after 408, 429, 5xx, no answer or no connection, after growing waits.",
    )

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError(
                "must hold no user, password, `?` or `#`, since recipes are written to disk; `api_key_env` names where a key is"
            )
        bare = parts.scheme in ("http", "https") and parts.hostname and re.fullmatch(r"[!-~]+", value)
        if not bare:
            raise ValueError(f"must be an address such as http://127.0.0.1:8000/v1, got {value!r}")
        _ = parts.port  # a ValueError of its own for what is none
        try:
            str(parts.hostname).encode("idna")
        except UnicodeError:
            raise ValueError(
                f"got {value!r}; a host's name has 1 to 63 characters before, between and after its dots"
            ) from None
        if parts.path.rstrip("/").endswith("/completions"):
            raise ValueError(
                f"got {value!r}; leave out the end from `/chat/completions` or `/completions` on, which is added to it"
            )
        return value.rstrip("/")

    @field_validator("api_key_env")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", value):  # what was got may be a key: it is not said
            raise ValueError(
                "must be the name of an environment variable, in capitals, such as OPENAI_API_KEY, and not a key itself"
            )
        return value

    @model_validator(mode="after")
    def _has_an_effect(self) -> Self:
        if self.temperature == 0 and (useless := _changed(self, "n", "top_p")):
            raise ValueError(f"{useless[0]!r} has no effect at temperature 0, where all answers to a prompt are one; raise it")
        settings = {"temperature": "temperature", "top_p": "top_p", "max_tokens": "max_completion_length"}
        for key, value in self.extra_body.items():
            if key in ("model", "messages", "prompt", "n", "stream"):
                raise ValueError(f"extra_body.{key} is set by crosstrain; leave it out")
            if key in settings and value is not None:
                raise ValueError(f"extra_body.{key}: write it as {settings[key]!r}, beside 'model'")
        return self

    @model_serializer(mode="wrap")
    def _without_what_changes_no_row(self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        """In a hash, how a server is reached is left out: a run may go on with more patience."""
        content: dict[str, Any] = serialize(self)
        idle = ("api_key_env", "concurrency", "timeout_s", "retries") if info.context == FOR_HASH else ()
        return {key: value for key, value in content.items() if key not in idle}


class DataSpec(BaseModel):
    """One stream of examples: a file, a task that makes them, or a mixture of such. A bare string is a path; in Python, rows may be
    given."""

    model_config = STRICT
    path: str | None = Field(None, description="JSONL, JSON, CSV, Parquet file or `datasets` folder.")
    task: str | None = Field(None, description="Name of a task, instead of a path.")
    mixture: list[DataSpec] | None = Field(
        None, min_length=2, description="Sources that the stream draws from by `weight`, each with settings of its own."
    )
    weight: Positive | None = Field(
        None, description="In a mixture: the source's share, relative to the others; 1 if not given."
    )
    task_config: TaskConfig = {}
    split: str = Field("train", description="Split of the task.")
    size: Count | None = Field(
        None, description="How many rows of the source, from its first; all of them (or the task's default) when not given."
    )
    seed: Seed = 0
    system_prompt: str | None = Field(None, description="System message put before every prompt that has none.")
    teacher: TextTeacherSpec | None = Field(
        None, description="A server whose answers to the rows' prompts are the demonstrations; text is all it gives."
    )
    filter: FilterSpec | None = Field(None, description="Rows that are left out.")
    select: SelectSpec | None = Field(None, description="Rows that are chosen of the others, as the untrained model sees them.")
    order: OrderSpec | None = Field(None, description="A curriculum; rows are shuffled anew each epoch when not given.")

    _short = model_validator(mode="before")(lambda value: named("path", _rows(value)))

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        origins = [key for key in ("path", "task", "mixture") if getattr(self, key) is not None]
        if len(origins) != 1:
            got = " and ".join(f"{key}={getattr(self, key)!r:.60}" for key in origins) or "none"
            raise ValueError(f"needs exactly one of 'path', 'task' and 'mixture', got {got}")
        own = {"path": ("task_config", "split", "seed"), "task": (), "mixture": tuple(type(self).model_fields)}[origins[0]]
        useless = [key for key in own if key not in origins and getattr(self, key) != type(self).model_fields[key].default]
        if useless and self.mixture is not None:
            raise ValueError(f"{useless[0]!r} stands beside 'mixture'; write it inside the source it is for")
        if useless:
            raise ValueError(f"{useless[0]!r} has no effect beside 'path'; remove it or name a 'task'")
        if self.mixture is not None and any(part.mixture is not None for part in self.mixture):
            raise ValueError("a source of a mixture is a file or a task, not another mixture; list its sources here")
        return self

    @property
    def sources(self) -> tuple[DataSpec, ...]:
        """The files and tasks that it is made of."""
        return (self,) if self.mixture is None else tuple(self.mixture)


def streams(value: Any) -> Any:
    """A single data spec (or path, or rows) becomes the stream `train`."""
    value = _rows(value)
    single = isinstance(value, str | DataSpec) or (
        isinstance(value, Mapping) and bool({"path", "task", "mixture"} & set(value))
    )
    return {"train": value} if single else value
