"""A conversation is rendered as transformers renders it; a template that refuses is the request's error."""

import inspect

import pytest
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from core.chat_template import RESERVED, ChatTemplate
from core.errors import CheckpointError, InvalidParameter

USER = [{"role": "user", "content": "<b>&'é\n"}]
TALK = [{"role": "system", "content": "S"}, *USER, {"role": "assistant", "content": "a", "reasoning": "r"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
TEMPLATES = [
    "{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\nend\n",
    "{{ messages | tojson }}{{ tools | tojson(indent=2) }}{{ messages[0] | tojson(ensure_ascii=True) }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}",
    "{{ bos_token }}{% if add_generation_prompt %}G{% endif %}{% if enable_thinking %}T{% endif %}{{ documents }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ tools }}",
    "{{ messages[-1].reasoning_content }}|{{ messages[-1].thinking }}|{{ messages[-1].reasoning }}",
    "{{ unknown_variable }}{{ messages[0]['none'] is defined }}{{ messages[0].get('content') | trim }}",
]


@pytest.mark.parametrize("source", TEMPLATES)
@pytest.mark.parametrize("messages", [USER, TALK], ids=["user", "talk"])
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_is_the_one_that_transformers_gives(source, messages, tools, prompt):
    variables = {"bos_token": "<s>", "enable_thinking": True}
    expected, _ = render_jinja_template(
        [messages], tools, chat_template=source, add_generation_prompt=prompt, **variables
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    assert template.render(messages, tools, prompt, enable_thinking=True) == expected[0]


def test_today_is_local_time():
    year = ChatTemplate("{{ strftime_now('%Y') }}").render(USER)
    assert len(year) == 4
    assert year.isdigit()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ messages[0].parts.first }}", "no attribute 'parts'"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_refuses_is_the_request_s_error(source, message):
    with pytest.raises(InvalidParameter, match=message) as caught:
        ChatTemplate(source).render(USER)
    assert caught.value.param == "messages"


def test_a_template_sees_no_objects_of_the_caller():
    class Secret:
        def reveal(self):
            return "secret"

    template = ChatTemplate("{{ messages[0].content }}{{ thing }}")
    assert template.render([{"role": "user", "content": Secret()}], thing=Secret()) == "<Secret><Secret>"


def test_messages_are_not_changed():
    message = {"role": "user", "content": "x", "thinking": "t"}
    ChatTemplate("{{ messages }}").render([message])
    assert message == {"role": "user", "content": "x", "thinking": "t"}


def test_options_cannot_replace_the_messages_themselves():
    with pytest.raises(TypeError, match="messages"):
        ChatTemplate("{{ messages }}").render(USER, messages=[])


@pytest.mark.parametrize("messages", [[], ["hi"], None])
def test_messages_that_are_no_objects_are_refused(messages):
    with pytest.raises(InvalidParameter, match="at least one object with role and content"):
        ChatTemplate("x").render(messages)


def test_an_argument_of_the_host_is_refused_as_a_template_option():
    with pytest.raises(InvalidParameter, match="must not set chat_template, tokenize") as caught:
        ChatTemplate("x").render(USER, tokenize=True, chat_template="y")
    assert caught.value.param == "chat_template_kwargs"


def test_no_argument_of_transformers_is_taken_for_a_variable():
    known = set(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters)
    ours = set(inspect.signature(ChatTemplate.render).parameters)
    assert known - ours - RESERVED == {"documents", "kwargs"}


PARTS = [{"type": "text", "text": "one "}, {"type": "image"}, {"type": "text", "text": " two "}]


@pytest.mark.parametrize("source", ["{{ messages[-1].content }}<end>", "[{{ messages[-1].content | trim }}]\n"])
@pytest.mark.parametrize("content", ["so far", " so far ", ""])
def test_the_last_message_can_be_continued(source, content):
    messages = [*USER, {"role": "assistant", "content": content}]
    expected, _ = render_jinja_template([messages], chat_template=source, continue_final_message=True)
    rendered = ChatTemplate(source).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert rendered == expected[0]
    assert messages[-1]["content"] == content


def test_the_last_text_part_can_be_continued():
    source = "{% for part in messages[-1].content %}{{ part.text }}|{% endfor %}"
    messages = [{"role": "assistant", "content": PARTS}]
    expected, _ = render_jinja_template([messages], chat_template=source, continue_final_message=True)
    assert ChatTemplate(source).render(messages, None, False, continue_final_message=True) == expected[0]


@pytest.mark.parametrize(
    ("source", "message", "prompt", "wish", "problem"),
    [
        ("{{ messages[-1].content }}", {"content": "x"}, True, True, "set add_generation_prompt to false"),
        ("{{ messages[-1].content }}", {"content": None}, False, True, "with text to go on with"),
        ("nothing", {"content": "x"}, False, True, "leaves the last message out"),
        ("{{ messages[-1].content }}", {"content": "x"}, False, "content", "must be true or false"),
    ],
)
def test_what_cannot_be_continued_is_refused(source, message, prompt, wish, problem):
    with pytest.raises(InvalidParameter, match=problem):
        ChatTemplate(source).render([message], None, prompt, continue_final_message=wish)


def test_a_template_that_is_not_jinja_is_the_checkpoint_s_error():
    with pytest.raises(CheckpointError, match="not valid Jinja: line 2"):
        ChatTemplate("a\n{% for %}").render(USER)
