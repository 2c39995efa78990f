"""A conversation as the model wants to read it: Jinja chat templates, as transformers renders them.

Templates come with checkpoints, so they run in a sandbox and see plain data only. The environment (block trimming,
filters, functions, the ``generation`` tag) is that of ``transformers.utils.chat_template_utils``: the same template
gives the same text. Knows nothing about token ids.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from workers.errors import InvalidRequestError

#: What a template can fail with on messages of a shape that it did not expect.
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
#: Names under which messages carry reasoning; templates read the first.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """The chat templates of one tokenizer.

    Args:
        templates: Source by name; ``default`` is used, or ``tool_use`` when there are tools. Empty if the
            tokenizer has none.
        special_tokens: Variables such as ``bos_token`` that templates may use.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as one text, special tokens included.

        Args:
            messages: OpenAI-style messages; fields that are None count as absent.
            add_generation_prompt: End with the beginning of an answer.
            tools: JSON schemas of functions, for templates that know tools.
            kwargs: Further variables of the template, such as ``enable_thinking``.

        Raises:
            InvalidRequestError: There is no template, or it refuses these messages.
        """
        source = self._select(bool(tools))
        variables = {**self._special_tokens, "documents": None, **kwargs}
        variables["messages"] = _clean(messages)
        variables["tools"] = None if tools is None else [dict(tool) for tool in tools]
        variables["add_generation_prompt"] = add_generation_prompt
        try:
            return _compile(source).render(variables)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidRequestError(
                f"This model's chat template is broken (line {error.lineno}: {error.message}); repair its "
                "chat_template.jinja, or send a prompt that is already rendered.",
                param="messages",
            ) from error
        except _RENDER_ERRORS as error:
            raise InvalidRequestError(
                f"This model's chat template cannot render these messages: {str(error).rstrip('.')}.", param="messages"
            ) from error

    def _select(self, has_tools: bool) -> str:
        if has_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if "default" in self._templates:
            return self._templates["default"]
        found = f" (it has only {', '.join(sorted(self._templates))})" if self._templates else ""
        raise InvalidRequestError(
            f"This model has no chat template{found}; put one into chat_template.jinja beside its tokenizer, or send "
            "a prompt that is already rendered.",
            param="messages",
        )


def _clean(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies without empty fields, with reasoning under every name that templates know."""
    if isinstance(messages, (str, Mapping)) or not all(isinstance(message, Mapping) for message in messages):
        raise InvalidRequestError("messages must be a list of objects with role and content.", param="messages")
    if not messages:
        raise InvalidRequestError("messages must hold at least one message.", param="messages")
    cleaned = []
    for message in messages:
        fields = {name: value for name, value in message.items() if value is not None}
        reasoning = next((fields[name] for name in _REASONING_FIELDS if name in fields), None)
        if reasoning is not None:
            fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
        cleaned.append(fields)
    return cleaned


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's text for training; here its body is rendered as it stands."""

    tags = {"generation"}  # noqa: RUF012  # jinja2 declares it as a plain set

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(lineno)

    @staticmethod
    def _render(caller: Callable[[], str]) -> str:
        return caller()


class _DictFunction:
    """``dict`` for templates: the two uses they have, without the type's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """``namespace()`` that refuses underscore names, a way out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # Like jinja2's own, so that ``namespace(self=...)`` works.
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_private(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a namespace attribute must not begin with an underscore, as {name!r} does"
        )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own escapes characters that matter in HTML only.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_DictFunction(), namespace=_Namespace
    )
    return environment


@functools.lru_cache(maxsize=64)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)
