"""Rows to requests: template or messages, chat template, token ids, sampling parameters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as pat
from jinja2 import TemplateError

from batchinfer.data.columns import RowError, Unreadable, find_column, is_text, to_values
from batchinfer.data.overlong import Asked, Overlong, Truncation
from batchinfer.data.row_sampling import RowSampling, with_room
from batchinfer.data.template import ChatTemplate, Message, RowTemplate
from batchinfer.data.tokenizer import PromptTokenizer
from batchinfer.data.units import Unit
from batchinfer.errors import InputError, JobError
from batchinfer.job import PromptSection, SamplingSection
from batchinfer.request import Completion, Request, SamplingParams


class PromptRenderer:
    """Turns rows into requests. A row that cannot become one turns into a completion that says why.

    Args:
        tokenizer_dir: folder with tokenizer.json, tokenizer_config.json and, for chat models, a chat template.
        max_seq_len: prompt plus completion tokens that the engine can hold. A prompt must leave room for one token, or
            it is dealt with as ``prompt.on_overlong`` says; ``max_tokens`` is lowered to the room there is.

    Attributes:
        columns: the input columns that prompts and sampling parameters are made of.
        chat: whether prompts go through the model's chat template.

    Raises:
        JobError: a template is not valid, or the job needs a chat template and the model has none.
        ModelError: the tokenizer cannot be used.
    """

    def __init__(self, prompt: PromptSection, sampling: SamplingSection, tokenizer_dir: Path, max_seq_len: int):
        tokenizer_dir = Path(tokenizer_dir)
        self._tokenizer = PromptTokenizer(tokenizer_dir)
        self.chat = _wants_chat(prompt, self._tokenizer, tokenizer_dir)
        self._chat = ChatTemplate(self._tokenizer) if self.chat else None
        self._source = RowPrompt(prompt, self._tokenizer.spell)
        self._sampling = RowSampling(sampling)
        self._max_seq_len = max_seq_len
        self._max_characters = max(1 << 20, max_seq_len * self._tokenizer.longest)
        how = prompt.on_overlong
        self._skips_overlong = how == "skip"
        self._truncation = Truncation(how, self._tokenizer, max_seq_len) if how.startswith("truncate") else None
        self.columns = tuple(dict.fromkeys((*self._source.columns, *self._sampling.columns)))

    def check(self, schema: pa.Schema) -> None:
        """Raises InputError if a column is missing or has a type that cannot serve; the message says which."""
        self._source.check(schema)
        self._sampling.check(schema)

    def render(self, rows: pa.Table, keys: Sequence[Hashable], seeds: Sequence[int]) -> list[Request | Completion]:
        """One request or failed completion a row, in order.

        ``rows`` needs the ``columns``, others are not looked at. ``seeds`` count where no seed column says otherwise.
        Several threads may render at once.
        """
        cells = {name: to_values(name, rows.column(name)) for name in self.columns}
        results: list[Any] = [None] * len(keys)  # a table without columns may have lost count
        asked: dict[int, Asked] = {}
        texts: dict[int, str] = {}
        for i, row in enumerate(_by_row(cells, self._source.columns, len(keys))):
            try:
                asked[i] = self._asked(row)
                texts[i] = self._bounded(self._text(asked[i]))
            except RowError as error:
                results[i] = self._refused(keys[i], None, error)
        encoded = self._encode(list(texts.values()))
        params = self._sampling.of_rows(cells, seeds)
        for i, ids in zip(texts, encoded):
            results[i] = self._request(keys[i], asked[i], ids, params[i])
        return results

    def _asked(self, row: dict[str, Any]) -> Asked:
        asked = self._source.text(row) if self._chat is None else self._source.messages(row)
        return asked if self._truncation is None else self._truncation.shorten(asked, self._max_characters // 2)

    def _text(self, asked: Asked) -> str:
        if isinstance(asked, str):
            return asked
        assert self._chat is not None
        try:
            return self._chat.render(asked)
        except Exception as error:
            raise RowError(f"the model's chat template refuses the messages: {_reason(error)}") from None

    def _bounded(self, text: str) -> str:
        """A cell of a gigabyte must not cost the run its memory, only to be found too long in tokens."""
        if len(text) > self._max_characters:
            raise Overlong(f"the prompt has {len(text):,} characters, more than {self._max_seq_len} tokens can hold")
        return text

    def _encode(self, texts: list[str]) -> list[list[int] | None]:
        return self._tokenizer.encode(texts, add_special_tokens=not self.chat)

    def _request(
        self, key: Hashable, asked: Asked, ids: list[int] | None, params: SamplingParams | RowError
    ) -> Request | Completion:
        if not ids:
            reason = "is not valid Unicode: it holds a lone surrogate" if ids is None else "makes no token"
            return Completion(key, error=f"the prompt {reason}")
        try:
            if isinstance(params, RowError):
                raise params
            ids = self._fitting(asked, ids, params.max_tokens)
        except RowError as error:
            return self._refused(key, len(ids), error)
        return Request(key, ids, with_room(params, self._max_seq_len - len(ids)))

    def _fitting(self, asked: Asked, ids: list[int], max_tokens: int) -> list[int]:
        """Prompt ids that leave room for a completion. Raises: RowError if there is no way."""
        cut = self._truncation
        most = cut.most_tokens(max_tokens) if cut else self._max_seq_len - 1
        if len(ids) <= most:
            return ids
        if cut:
            return cut.fit(asked, len(ids), most, lambda asked: self._encode([self._text(asked)])[0] or [])
        raise Overlong(
            f"the prompt has {len(ids)} tokens, and at most {most} fit beside a completion "
            "(engine.profile.seq_len and the model's own context decide)"
        )

    def _refused(self, key: Hashable, tokens: int | None, error: RowError) -> Completion:
        skipped = self._skips_overlong and isinstance(error, Overlong)
        return Completion(key, prompt_tokens=tokens, error=str(error), skipped=skipped)


def row_seeds(job_seed: int, file: str, rows: Sequence[int]) -> list[int]:
    """Seeds of rows of a file, 63 bits: the same for the same job seed and address, everywhere and always."""
    of_file = int.from_bytes(hashlib.blake2b(file.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")
    begin = _splitmix64(np.array([of_file ^ (job_seed & (2**64 - 1))], np.uint64))
    return (_splitmix64(begin + np.asarray(rows, np.uint64)) >> np.uint64(1)).tolist()


def unit_seeds(job_seed: int, unit: Unit, rows: Sequence[int]) -> list[int]:
    """``row_seeds`` of some rows of a unit, ascending."""
    return [seed for file, own in unit.addresses(rows) for seed in row_seeds(job_seed, file, own)]


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """The mixer of Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014), modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def check_columns(prompt: PromptSection, sampling: SamplingSection, schema: pa.Schema) -> tuple[str, ...]:
    """``PromptRenderer.check`` without a tokenizer: templates and columns only. Returns the columns used."""
    source, params = RowPrompt(prompt), RowSampling(sampling)
    source.check(schema)
    params.check(schema)
    return tuple(dict.fromkeys((*source.columns, *params.columns)))


def prompt_columns(prompt: PromptSection) -> tuple[str, ...]:
    """The columns that the prompts are made of."""
    return RowPrompt(prompt).columns


def _wants_chat(prompt: PromptSection, tokenizer: PromptTokenizer, folder: Path) -> bool:
    if prompt.chat == "off":
        return False
    needs = [f"prompt.{k}" for k, v in (("messages", prompt.messages), ("system", prompt.system)) if v is not None]
    needs += ['prompt.chat = "on"'] if prompt.chat == "on" else []
    if needs and tokenizer.chat_template is None:
        raise JobError(f"{needs[0]} needs a model with a chat template, and {folder} has none; use a plain template")
    return tokenizer.chat_template is not None


class RowPrompt:
    """What a row says: one text, or the messages of a conversation."""

    def __init__(self, prompt: PromptSection, spell: Callable[[str], str] = str):
        self._column = prompt.messages
        self._template = RowTemplate(prompt.template, "prompt.template", spell) if prompt.template is not None else None
        self._system = RowTemplate(prompt.system, "prompt.system", spell) if prompt.system is not None else None
        columns = [self._column] if self._column is not None else []
        for template in (self._system, self._template):
            columns += template.columns if template else ()
        self.columns = tuple(dict.fromkeys(columns))

    def check(self, schema: pa.Schema) -> None:
        for name in self.columns:
            where = "prompt.messages" if name == self._column else "the prompt's template"
            kind = find_column(schema, name, where)
            if name == self._column and not (is_text(kind) or _is_messages(kind)):
                raise InputError(
                    f"prompt.messages: column {name!r} must hold list<struct<role, content>> or JSON text, found {kind}"
                )
            if pat.is_binary(kind) or pat.is_large_binary(kind) or pat.is_fixed_size_binary(kind):
                raise InputError(f"{where}: column {name!r} is {kind}; a prompt is made of text, so store it as string")

    def text(self, row: dict[str, Any]) -> str:
        """The rendered template, never blank."""
        assert self._template is not None
        text = _run(self._template, row)
        if not text or text.isspace():
            raise RowError("the prompt is empty: the template made nothing but white space of this row")
        return text

    def messages(self, row: dict[str, Any]) -> list[Message]:
        """The conversation, the last message never blank; as in transformers, null fields are left out."""
        if self._column is None:
            messages = [{"role": "user", "content": self.text(row)}]
        else:
            messages = _conversation(row[self._column], self._column)
        if self._system is None:
            return messages
        if messages[0]["role"] == "system":
            raise RowError(f"column {self._column!r} brings a system message, and the job has prompt.system: keep one")
        return [{"role": "system", "content": _run(self._system, row)}, *messages]


def _run(template: RowTemplate, row: dict[str, Any]) -> str:
    try:
        return template.render(row)
    except Exception as error:
        raise RowError(f"{template.key}: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What a template stumbled over. Other exceptions may quote the row, so only their kind is told."""
    told = str(error) if isinstance(error, (TemplateError, TypeError, RowError)) else type(error).__name__
    return told if len(told) <= 200 else told[:200] + "…"


def _conversation(value: Any, column: str) -> list[Message]:
    if isinstance(value, Unreadable):
        raise value.error
    if value is None:
        raise RowError(f"column {column!r} is null; expected the messages of a conversation")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
            raise RowError(f"column {column!r} does not hold JSON: {reason}") from None
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else _kind(value)
        raise RowError(f"column {column!r} must hold a list of messages, found {found}")
    messages = [_message(item, f"message {i} of column {column!r}") for i, item in enumerate(value)]
    if _is_blank(messages[-1]):
        raise RowError(f"the last message of column {column!r} ({messages[-1]['role'][:20]}) is empty")
    return messages


def _message(item: Any, where: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(f'{where} must be {{"role": …, "content": …}}, found {_kind(item)}')
    message = {key: value for key, value in item.items() if value is not None}
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise RowError(f"{where} has no role; expected system, user or assistant")
    if not isinstance(message.get("content", ""), (str, list)):
        raise RowError(f"{where} must have text as content, found {_kind(message['content'])}")
    return message


def _is_blank(message: Message) -> bool:
    content = message.get("content", "")
    if isinstance(content, str):
        return not content.strip() and not message.get("tool_calls")
    return not content


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _is_messages(kind: pa.DataType) -> bool:
    if not (pat.is_list(kind) or pat.is_large_list(kind) or pat.is_fixed_size_list(kind)):
        return False
    return pat.is_struct(kind.value_type) and {"role", "content"} <= {field.name for field in kind.value_type}


def _by_row(cells: dict[str, list[Any]], names: Sequence[str], count: int) -> Iterator[dict[str, Any]]:
    if not names:  # a template without variables says the same for each row
        return ({} for _ in range(count))
    return (dict(zip(names, values)) for values in zip(*(cells[name] for name in names)))
