"""Conversations come out as transformers' ``apply_chat_template`` writes them."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from tests.tokenizer_cases import CHATML, byte_level_json, write_folder
from workers.errors import InvalidRequestError
from workers.tokenizer.chat_template import ChatTemplate
from workers.tokenizer.tokenizer import Tokenizer

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief.\n"},
    {"role": "user", "content": "Größe? <b> & 'x' \"y\" 😀"},
    {"role": "assistant", "content": "1.8 m"},
    {"role": "user", "content": " and then? "},
]
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "wetter", "description": "für <heute>", "parameters": {"type": "object"}}}
]
#: In the manner of Llama 3.1: dates, tools as JSON, namespaces, loop controls, trimming of blocks.
LLAMA_LIKE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- set ns = namespace(found=false) %}
{% if tools is not none %}
    {%- for t in tools %}
{{ t | tojson(indent=4) }}
    {% endfor %}
{% endif %}
{% for message in messages %}
    {% if message.role == 'system' %}{% set ns.found = true %}{% continue %}{% endif %}
    {%- if message['role'] not in ['user', 'assistant'] %}
        {{ raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
    {% generation %}
<|start|>{{ message['role'] }}<|end|>
{{ message['content'] | trim }}{{ eos_token }}
    {% endgeneration %}
{% endfor %}
{{ dict(a=1) | tojson }}{{ {'b': 'é<'} | tojson }} {{ ns.found }} {{ date_string }}
{%- if add_generation_prompt %}assistant:{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}{% endif %}
"""


def transformers_tokenizer(folder: Path) -> Any:
    import transformers

    auto: Any = transformers.AutoTokenizer
    return auto.from_pretrained(str(folder), local_files_only=True)


def both(folder: Path, messages: list[dict[str, Any]], **kwargs: Any) -> tuple[str, str]:
    """The text as we and as transformers render it."""
    theirs = transformers_tokenizer(folder).apply_chat_template(messages, tokenize=False, **kwargs)
    return Tokenizer.from_folder(folder).render_chat(messages, **kwargs), theirs


@pytest.mark.parametrize("kwargs", [{}, {"tools": TOOLS}, {"enable_thinking": False, "date_string": "today"}], ids=str)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("template", [CHATML, LLAMA_LIKE], ids=["chatml", "llama-like"])
def test_text_equals_transformers(
    tmp_path: Path, template: str, add_generation_prompt: bool, kwargs: dict[str, Any]
) -> None:
    folder = write_folder(
        tmp_path,
        byte_level_json(),
        bos_token="<|bos|>",
        eos_token={"content": "<|eos|>", "__type": "AddedToken"},
        chat_template=template,
    )
    ours, theirs = both(folder, CHAT, add_generation_prompt=add_generation_prompt, **kwargs)
    assert ours == theirs
    assert "Größe? <b> & 'x' \"y\" 😀" in ours


def test_template_files_win_over_the_config(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, byte_level_json(), chat_template="from config")
    assert Tokenizer.from_folder(folder).render_chat(CHAT) == "from config"
    (folder / "chat_template.jinja").write_text("from file, tools: {{ tools is not none }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("for {{ tools | length }} tools")
    assert both(folder, CHAT, add_generation_prompt=True) == ("from file, tools: False",) * 2
    assert both(folder, CHAT, add_generation_prompt=True, tools=TOOLS) == ("for 1 tools",) * 2


def test_templates_by_name_in_the_config(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    folder = write_folder(tmp_path, byte_level_json(), chat_template=templates)
    assert both(folder, CHAT, add_generation_prompt=True) == ("plain", "plain")
    assert both(folder, CHAT, add_generation_prompt=True, tools=TOOLS) == ("tools", "tools")


def test_empty_fields_count_as_absent() -> None:
    template = ChatTemplate({"default": "{{ messages[0] | tojson }}"}, {})
    message = {"role": "assistant", "content": None, "reasoning": "hm"}
    rendered = json.loads(template.render([message]))
    assert rendered == {"role": "assistant", "reasoning": "hm", "thinking": "hm", "reasoning_content": "hm"}
    assert message["content"] is None


def test_the_date_is_todays() -> None:
    template = ChatTemplate({"default": "{{ strftime_now('%Y') }}"}, {})
    assert template.render(CHAT) == str(datetime.datetime.now().year)


@pytest.mark.parametrize(
    ("template", "messages", "sentence"),
    [
        ("{{ raise_exception('roles must alternate') }}", CHAT, "roles must alternate"),
        ("{{ 'a' + messages[0]['content'] }}", [{"role": "user", "content": [{"type": "text"}]}], "cannot render"),
        ("{{ messages[0].content.text.more }}", CHAT, "cannot render"),
        ("{% if %}", CHAT, "chat template is broken"),
        ("{{ ''.__class__.__mro__ }}", CHAT, "cannot render"),
        ("{{ namespace(_x=1) }}", CHAT, "underscore"),
        (None, CHAT, "has no chat template; put one into chat_template.jinja"),
        ("x", [], "at least one message"),
        ("x", "hi", "must be a list"),
        ("x", ["hi"], "must be a list"),
    ],
)
def test_refusals_are_the_callers(template: str | None, messages: Any, sentence: str) -> None:
    templates = {} if template is None else {"default": template}
    with pytest.raises(InvalidRequestError, match=sentence) as error:
        ChatTemplate(templates, {}).render(messages)
    assert error.value.param == "messages"
    assert str(error.value).endswith(".")


def test_only_a_template_for_tools() -> None:
    template = ChatTemplate({"tool_use": "tools"}, {})
    assert template.render(CHAT, tools=TOOLS) == "tools"
    with pytest.raises(InvalidRequestError, match="it has only tool_use"):
        template.render(CHAT)


@pytest.mark.model
def test_the_default_models_template(default_model: Path) -> None:
    theirs, ours = transformers_tokenizer(default_model), Tokenizer.from_folder(default_model)
    for add_generation_prompt in (True, False):
        text = ours.render_chat(CHAT, add_generation_prompt=add_generation_prompt)
        assert text == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=add_generation_prompt)
        assert "<|im_start|>user\n" in text
