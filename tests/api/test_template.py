"""Chat templates: what they render is what they render in transformers, and what is wrong with one is said at once."""

import json

import pytest

from cmjax.api.errors import ApiError
from cmjax.api.template import ChatTemplate
from cmjax.checkpoint import Tokenizer
from cmjax.cli.options import BUNDLED_MODEL
from cmjax.errors import UserError

TOKENIZER = Tokenizer.from_folder(BUNDLED_MODEL)
USER = {"role": "user", "content": "é <b>"}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}

# Template, messages, arguments -> what transformers 5.24 renders (`apply_chat_template`).
RENDERED = {
    "json as it is": ("{{ messages | tojson }}", [USER], {}, '[{"role": "user", "content": "é <b>"}]'),
    "json with all arguments": (
        "{{ messages[0] | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}",
        [USER],
        {},
        '{"content":"\\u00e9 <b>","role":"user"}',
    ),
    "json, indented": ("{{ [1] | tojson(indent=2) }}", [USER], {}, "[\n  1\n]"),
    "generation": (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
        [USER, USER],
        {},
        "é <b>|é <b>|",
    ),
    "loop controls": (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
        [USER, USER],
        {},
        "user",
    ),
    "blocks are trimmed": ("{% if true %}\n  {% if true %}\nx\n  {% endif %}\n{% endif %}\ny", [USER], {}, "x\ny"),
    "special tokens": ("{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}", [USER], {}, "<|begin|><|end|>False"),
    "an argument before a special token": ("{{ bos_token }}", [USER], {"bos_token": "B"}, "B"),
    "no tools": (
        "{{ tools is none }} {{ documents is none }} {{ thinking is defined }}",
        [USER],
        {},
        "True True False",
    ),
    "calls as they were sent": ("{{ messages[0].tool_calls[0].function.arguments }}", [CALL], {}, '{"x": 1}'),
    "parts that it looks for": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
        "[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}",
        [{"role": "user", "content": PARTS}],
        {},
        "[a][b]",
    ),
}


@pytest.mark.parametrize("name", RENDERED)
def test_it_is_what_transformers_render(name):
    source, messages, arguments, expected = RENDERED[name]
    assert (
        ChatTemplate(source, TOKENIZER).render(messages, add_generation_prompt=False, variables=arguments) == expected
    )


def test_null_content_is_none_as_it_was_sent():
    template = ChatTemplate("{{ messages[0].content is none }} {{ messages[0].name is defined }}", TOKENIZER)
    assert template.render([CALL], add_generation_prompt=False) == "True False"


def test_of_parts_a_template_for_texts_gets_the_text():
    template = ChatTemplate("{{ messages[0]['content'] + '.' }}", TOKENIZER)
    assert template.render([{"role": "user", "content": PARTS}], add_generation_prompt=False) == "ab."


@pytest.mark.parametrize(
    ("source", "content", "expected"),
    [
        ("{{ messages[0].content }}<e>", "def f( ", "def f( "),
        ("{{ messages[0].content | trim }}<e>", "def f( ", "def f("),
        ("{{ messages[0].content }}<e>{{ messages[0].content }}", "x", "x<e>x"),
        ("{% for p in messages[0].content %}{{ p.text }};{% endfor %}", PARTS, "a;b"),
    ],
)
def test_the_last_message_is_continued(source, content, expected):
    template, messages = ChatTemplate(source, TOKENIZER), [{"role": "assistant", "content": content}]
    given = json.dumps(messages)
    found = template.render(messages, add_generation_prompt=False, continue_final_message=True)
    assert found == expected
    assert json.dumps(messages) == given


def test_what_cannot_be_continued():
    for source, content in (("{{ messages[0].role }}", "x"), ("{{ messages[0].content | upper }}", "x"), ("x", None)):
        with pytest.raises(ApiError, match="continue_final_message: "):
            ChatTemplate(source, TOKENIZER).render(
                [{"role": "assistant", "content": content}], add_generation_prompt=False, continue_final_message=True
            )
    with pytest.raises(ApiError, match="add_generation_prompt is true"):
        ChatTemplate("x", TOKENIZER).render([USER], add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.at_all }}",
        "{{ messages | tojson(nonsense=1) }}",
        "{{ [1, 2].append(3) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 3 + 4 }}",
    ],
)
def test_a_template_that_fails_is_the_client_s_error(source):
    with pytest.raises(ApiError, match="the chat template refuses them: ") as caught:
        ChatTemplate(source, TOKENIZER).render([USER], add_generation_prompt=False)
    assert caught.value.status == 400


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "continue_final_message"])
def test_arguments_cannot_replace_the_request(name):
    with pytest.raises(ApiError, match=f"chat_template_kwargs: '{name}' is no argument of a template"):
        ChatTemplate("x", TOKENIZER).render([USER], add_generation_prompt=False, variables={name: 1})


def make(tmp_path, config, **files):
    for name, text in files.items():
        path = tmp_path / name.replace("__", "/").replace("_jinja", ".jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (tmp_path / "tokenizer.json").write_bytes((BUNDLED_MODEL / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(tmp_path)


def found(tmp_path, tokenizer, override=None, **options):
    template = ChatTemplate.find(tmp_path, tokenizer, override)
    return None if template is None else template.render([USER], add_generation_prompt=False, **options)


def test_where_templates_lie(tmp_path):
    named = [
        {"name": "tool_use", "template": "T"},
        {"name": "default", "template": "D"},
        {"name": "x", "template": "X"},
    ]
    several = make(tmp_path, {"chat_template": named})
    assert found(tmp_path, several) == "D"
    assert found(tmp_path, several, tools=[{}]) == "T"
    assert found(tmp_path, several, "x") == "X"
    assert found(tmp_path, make(tmp_path, {"chat_template": named[2:]})) == "X"
    assert found(tmp_path, make(tmp_path, {})) is None
    assert found(tmp_path, make(tmp_path, {"chat_template": "text"})) == "text"
    assert found(tmp_path, make(tmp_path, {"chat_template": "text"}, chat_template_jinja="file")) == "file"
    more = make(tmp_path, {}, additional_chat_templates__tool_use_jinja="more")
    assert found(tmp_path, more, tools=[]) == "more"
    (tmp_path / "mine.txt").write_text("mine")
    assert found(tmp_path, more, str(tmp_path / "mine.txt")) == "mine"
    assert found(tmp_path, more, "{{ 'inline' }}") == "inline"


def test_broken_templates_are_one_line_at_start_up(tmp_path):
    plain = make(tmp_path, {})
    with pytest.raises(UserError, match="--chat-template /nowhere: No such file or directory"):
        ChatTemplate.find(tmp_path, plain, "/nowhere")
    with pytest.raises(UserError, match=r"--chat-template: line 2: unexpected '}'"):
        ChatTemplate.find(tmp_path, plain, "x\n{{ } }}")
    with pytest.raises(UserError, match=r"chat template: line 1: .*No filter named 'nothing'"):
        ChatTemplate.find(tmp_path, make(tmp_path, {"chat_template": "{{ 1 | nothing }}"}))
    with pytest.raises(UserError, match=r"tokenizer_config.json: chat_template is neither a text nor a list"):
        make(tmp_path, {"chat_template": 7})
    several = make(tmp_path, {"chat_template": [{"name": name, "template": "x"} for name in "ba"]})
    with pytest.raises(UserError, match="none of its chat templates is the default; --chat-template takes a, b"):
        ChatTemplate.find(tmp_path, several)
