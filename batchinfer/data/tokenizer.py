"""Text to token ids, where control tokens can be written by templates and never by data."""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from batchinfer.errors import ModelError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said aloud: otherwise a fork elsewhere switches it off


class PromptTokenizer:
    """The model's tokenizer with every special token renamed to a spelling that no data can know.

    ``<|im_end|>`` becomes ``<b3f1…:2>`` with a nonce drawn once a process. ``spell`` respells templates when they are
    compiled, before any row is seen, so a row that holds ``<|im_end|>`` holds ten ordinary characters: it encodes as
    text, whatever a template does with it, and text without special tokens encodes as it always did.

    Attributes:
        chat_template: the model's chat template, None if it has none.
        variables: ``bos_token``, ``eos_token``, … as a template sees them, already respelled.
        specials: text of a special token → its spelling.
        longest: characters of the longest entry in the vocabulary.
    """

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        tree = _read_json(path)
        if not tree:
            raise ModelError(f"no tokenizer.json in {folder}: a prompt cannot become tokens without it")
        config = _read_json(folder / "tokenizer_config.json")
        self.specials = _spellings(tree)
        self._pattern = any_of(self.specials)
        self.longest = _longest_piece(tree)
        try:
            self._tokenizer = Tokenizer.from_str(json.dumps(_renamed(tree, self.specials)))
        except Exception as error:  # the tokenizers package raises bare Exception
            raise ModelError(f"{path} is not a tokenizer that the tokenizers package can load: {error}") from None
        self.chat_template = _chat_template(folder, config)
        self.variables = _token_variables(_read_json(folder / "special_tokens_map.json") | config, self.spell)

    def spell(self, text: str) -> str:
        """Template text with its control tokens in the spelling that encodes to control ids. Never call it on data."""
        return self._pattern.sub(lambda found: self.specials[found[0]], text)

    def encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int] | None]:
        """Token ids of each text; None for a text that is not valid Unicode (a lone surrogate).

        ``add_special_tokens``: let the tokenizer put its own BOS or EOS around the text. A chat template writes them
        itself. The work is spread over cores and the GIL is released.
        """
        try:
            return [e.ids for e in self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]
        except (TypeError, UnicodeError):
            if len(texts) == 1:
                return [None]
            return [self.encode([text], add_special_tokens)[0] for text in texts]

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Where each token of a text begins and ends in it, in characters; none is added around it."""
        return self._tokenizer.encode(text, add_special_tokens=False).offsets


def any_of(texts: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds any of the texts, the longest first; one that never matches if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def _longest_piece(tree: dict[str, Any]) -> int:
    vocabulary = tree["model"].get("vocab") or {}
    pieces = vocabulary if isinstance(vocabulary, dict) else (piece for piece, _ in vocabulary)
    added = (token["content"] for token in tree.get("added_tokens") or [])
    return max(map(len, (*pieces, *added)), default=1)


def _spellings(tree: dict[str, Any]) -> dict[str, str]:
    nonce = secrets.token_hex(10)
    specials = [token["content"] for token in tree.get("added_tokens") or [] if token["special"] and token["content"]]
    return {content: f"<{nonce}:{i}>" for i, content in enumerate(specials)}


def _renamed(tree: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """tokenizer.json with the special tokens renamed wherever it refers to one by its text; ids stay."""
    model = dict(tree["model"])
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    elif vocabulary:  # Unigram: [piece, score] in the order of ids
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("merges"):  # no merge of ordinary text may end in a control token
        pairs = (tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"])
        model["merges"] = [[a, b] for a, b in pairs if not (a in names or b in names or a + b in names)]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in tree["added_tokens"]]
    return {
        **tree,
        "model": model,
        "added_tokens": added,
        "post_processor": _deep_renamed(tree.get("post_processor"), names),
        "truncation": None,  # a prompt is never cut in silence, nor padded
        "padding": None,
    }


def _deep_renamed(value: Any, names: dict[str, str]) -> Any:
    if isinstance(value, str):
        return names.get(value, value)
    if isinstance(value, list):
        return [_deep_renamed(item, names) for item in value]
    if isinstance(value, dict):
        return {names.get(key, key): _deep_renamed(item, names) for key, item in value.items()}
    return value


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text("utf-8")
    template = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _token_variables(config: dict[str, Any], spell: Any) -> dict[str, str]:
    """``bos_token`` and its like. A token is written as its text or as an object that holds it."""
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    named = {key: value for key, value in named.items() if key.endswith("_token")}
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in named.items()}
    return {key: spell(text) for key, text in texts.items() if isinstance(text, str)}


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty where there is no such file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from None
