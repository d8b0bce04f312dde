"""Templates over a row and over a chat, in a sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, Undefined, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from batchinfer.data.tokenizer import PromptTokenizer, any_of
from batchinfer.errors import JobError, ModelError

Spell = Callable[[str], str]
Message = dict[str, Any]


class RowTemplate:
    """A job's own template over the columns of a row.

    What is not there is an error: an unknown variable, and a null that would end up in the text. A template that says
    what a null means (``{% if title %}``, ``{{ title or "untitled" }}``, ``{{ title | default("") }}``) gets its way.
    """

    def __init__(self, source: str, key: str, spell: Spell = str):
        """``key`` names the template in messages: ``prompt.template``."""
        self.key = key
        environment = _environment(StrictUndefined)
        environment.finalize = _refuse_null
        try:
            tree = environment.parse(source)
            self.columns = _columns(tree, environment)
            self._rendered = _compiled(environment, _respelled(tree, spell), {})
        except TemplateSyntaxError as error:
            why = f"{str(error.message).rstrip('.')} (its line {error.lineno})"
            raise JobError(f"{key} is not a valid jinja2 template: {why}") from None

    def render(self, row: Mapping[str, Any]) -> str:
        """Raises jinja2.TemplateError, or whatever the template's own operations raise."""
        if None in row.values():
            row = {name: Null(name=name) if value is None else value for name, value in row.items()}
        return self._rendered(row)


class ChatTemplate:
    """The model's own chat template, in the environment that transformers gives to it."""

    def __init__(self, tokenizer: PromptTokenizer):
        assert tokenizer.chat_template is not None
        environment = _environment(Undefined)
        # tools and documents: templates ask whether they are none
        known = {**tokenizer.variables, "tools": None, "documents": None, "add_generation_prompt": True}
        try:
            tree = _respelled(environment.parse(tokenizer.chat_template), tokenizer.spell)
            self._rendered = _compiled(environment, tree, known)
        except TemplateSyntaxError as error:
            where = f"line {error.lineno} of the model's chat template"
            raise ModelError(f"{where} is not valid jinja2: {error.message}") from None
        assembled = self._assembled(tokenizer.specials)
        self._guard = _Guard(assembled) if assembled else None

    def render(self, messages: Sequence[Message]) -> str:
        """The conversation as text, up to where the assistant speaks next. Raises what the template raises."""
        if self._guard is None:
            return self._render(messages)
        return self._guard.lift(self._render(self._guard.messages(messages)))

    def _render(self, messages: Sequence[Message]) -> str:
        return self._rendered({"messages": messages})

    def _assembled(self, specials: Mapping[str, str]) -> dict[str, str]:
        """Control tokens that the template makes of parts, ``'<|' + role + '|>'``, so that no literal holds them."""
        found: set[str] = set()
        pattern = any_of(list(specials))
        for roles in (["user"], ["system", "user"], ["user", "assistant", "user"], ["user", "assistant", "tool"]):
            try:
                found |= set(pattern.findall(self._render([{"role": role, "content": "x"} for role in roles])))
            except Exception:  # whatever the template stumbles over
                continue  # not a conversation that this model has
        return {token: specials[token] for token in found}


class _Guard:
    """Keeps data from completing a control token where the chat template makes them of parts (few models do).

    A character that no text holds is put into each string from a row wherever it could begin or continue such a token;
    after rendering, what is whole came from the template and is respelled, and the character is taken out again.
    """

    BREAK = "\U0010ffff"  # a noncharacter: Unicode keeps it out of interchange
    ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})

    def __init__(self, tokens: Mapping[str, str]):
        self._tokens = tokens
        self._pattern = any_of(list(tokens))
        self._firsts = {token[0] for token in tokens}
        self._tails = tuple(token[i:] for token in tokens for i in range(1, len(token)))

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        return [
            {k: v if k == "role" and v in self.ROLES else self._deep(v) for k, v in message.items()}
            for message in messages
        ]

    def lift(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._tokens[found[0]], text).replace(self.BREAK, "")

    def _deep(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._text(value)
        if isinstance(value, list):
            return [self._deep(item) for item in value]
        if isinstance(value, dict):
            return {k: self._deep(item) for k, item in value.items()}
        return value

    def _text(self, text: str) -> str:
        body = text.lstrip()
        if body and (body.startswith(self._tails) or any(tail.startswith(body.rstrip()) for tail in self._tails)):
            text = text[: len(text) - len(body)] + self.BREAK + body
        for first in self._firsts:
            text = text.replace(first, first + self.BREAK)
        return text


class Null(StrictUndefined):
    """A null cell: false, replaceable by ``default``, and an error wherever it would become text."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return False

    @property
    def _undefined_message(self) -> str:
        name = self._undefined_name
        return (
            f"column {name!r} is null; a template may say what that means: {{{{ {name} or '…' }}}}, {{% if {name} %}}"
        )


def _refuse_null(value: Any) -> Any:
    if value is None:
        raise TemplateError("a null inside a nested value would become text")
    return value


def _columns(tree: nodes.Template, environment: ImmutableSandboxedEnvironment) -> tuple[str, ...]:
    """What a template wants to be told. ``range(3)`` is jinja2's function; ``{{ range }}`` is a column of that name."""
    functions, environment.globals = environment.globals, {}  # else jinja2 passes their names over
    wanted = meta.find_undeclared_variables(tree)
    environment.globals = functions
    called = {id(call.node) for call in tree.find_all(nodes.Call)}
    read = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "load" and id(name) not in called}
    return tuple(sorted(name for name in wanted if name not in functions or name in read))


def _respelled(tree: nodes.Template, spell: Spell) -> nodes.Template:
    """Respell control tokens in a template's own text: between the braces and in its string literals."""
    for data in tree.find_all(nodes.TemplateData):
        data.data = spell(data.data)
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str):
            constant.value = spell(constant.value)
    return tree


def _compiled(
    environment: ImmutableSandboxedEnvironment, tree: nodes.Template, known: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], str]:
    """``Template.render`` without what it does for templates that are rendered once: most rows cost a microsecond."""
    template = environment.from_string(tree)
    write, blocks, make_context = template.root_render_func, template.blocks, environment.context_class
    known = {**environment.globals, **known}
    return lambda values: "".join(write(make_context(environment, {**known, **values}, None, blocks)))


def _environment(undefined: type[Undefined]) -> ImmutableSandboxedEnvironment:
    """What transformers sets up for chat templates; a job's own templates get the same words."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=undefined, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.tests["none"] = lambda value: value is None or isinstance(value, Null)
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=lambda *args, **kwargs: dict(*args, **kwargs),  # a function has no attributes to climb by
        namespace=_Names,
    )
    return environment


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's own words for training; here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Names(Namespace):
    """A namespace without the underscored names that lead out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        names = dict(*args, **kwargs)
        for name in names:
            _refuse_underscore(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template may not set {name!r} on a namespace")


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
