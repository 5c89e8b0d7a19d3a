"""Text as it comes: the pieces are the whole text's, whatever the tokens and stop strings are."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmjax.api.errors import ApiError
from cmjax.api.template import ChatTemplate
from cmjax.checkpoint import Tokenizer
from cmjax.cli.options import BUNDLED_MODEL
from cmjax.serve.http.stops import StopStrings

TOKENIZER = Tokenizer.from_folder(BUNDLED_MODEL)
LETTERS = st.text("ab\n", max_size=30)


@given(
    text=LETTERS, cuts=st.lists(st.integers(0, 30)), stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)
)
def test_stop_strings_end_a_text_where_they_end_the_whole_one(text, cuts, stops):
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    checker, shown, found = StopStrings(stops), "", None
    for begin, end in itertools.pairwise(edges):
        piece, found = checker.feed(text[begin:end])
        shown += piece
        # What has been shown is never taken back.
        assert text.startswith(shown)
        if found is not None:
            break
        # All of it but what could become a stop string.
        so_far = text[:end]
        begun = (stop[:size] for stop in stops for size in range(len(stop)))
        assert len(shown) == end - max((len(one) for one in begun if so_far.endswith(one)), default=0)
    else:
        shown += checker.flush()
    places = [text.find(stop) for stop in stops if stop in text]
    if not places:
        assert (shown, found) == (text, None)
    else:
        # The first to be complete ends it; of those in one piece, the first to begin.
        assert found in stops
        assert text.startswith(shown + found)
        assert not any(stop in shown for stop in stops)


def test_what_could_become_a_stop_string_is_held_back_and_no_more():
    checker = StopStrings(["</end>"])
    assert checker.feed("text <") == ("text ", None)
    assert checker.feed("/en") == ("", None)
    assert checker.feed("x") == ("</enx", None)
    assert checker.feed("</end> more") == ("", "</end>")


def test_a_template_renders_as_the_model_wants_it():
    template = ChatTemplate.find(BUNDLED_MODEL, TOKENIZER)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert template.render(messages, add_generation_prompt=True) == "<|begin|><|user|>a<|assistant|>b<|assistant|>"


def test_templates_use_what_they_use_elsewhere():
    source = """{%- for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}
    {%- if loop.index0 > 1 %}{% break %}{% endif %}
    {{- message | tojson }}
{%- endfor %}"""
    template = ChatTemplate(source, TOKENIZER)
    assert (
        template.render([{"role": "user", "content": "é"}], add_generation_prompt=False)
        == '{"role": "user", "content": "é"}'
    )
    with pytest.raises(ApiError, match="the chat template refuses them: no tools"):
        template.render([{"role": "tool"}], add_generation_prompt=False)
    escape = ChatTemplate("{{ messages.__class__.__mro__ }}", TOKENIZER)
    with pytest.raises(ApiError):
        escape.render([], add_generation_prompt=False)
