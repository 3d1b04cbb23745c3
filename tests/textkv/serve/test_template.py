"""Chat templates from a file, and the plain one by which the embedded text model is served."""

import pytest

from textkv.serve import ChatEngine, Opening
from textkv.serve.protocol import read_request
from textkv.serve.template import PLAIN, read_template

OWN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def test_a_template_is_read_and_used(tmp_path):
    (tmp_path / "t.jinja").write_text(OWN)
    engine = ChatEngine.open(Opening("mini", chat_template=read_template(str(tmp_path / "t.jinja"))))
    asked = read_request({"model": "mini", "messages": [{"role": "user", "content": "Hello"}]})
    assert engine.tokenizer.decode(engine.prepare(asked).inputs["input_ids"][0]).strip() == "[user] Hello"


def test_the_embedded_text_model_is_served_without_one():
    engine = ChatEngine.open(Opening("mini"))
    asked = {"model": "mini", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3, "temperature": 0}
    said = []
    outcome = engine.answer(engine.prepare(read_request(asked)), said.append, lambda: False)
    assert engine.chat_template == PLAIN and outcome.completion_tokens == 3 and "".join(said) == outcome.text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages[0].content }", "line 1"),
        ("{{ messages[0]['content'] + 1 }}", "is no chat template"),
        ("{{ messages[9]['content']['x'] }}", "is no chat template"),
        ("{{ 1 // 0 }}", "is no chat template"),
        ("Hello!", "leaves out what a message says"),
        ("{{ messages.__class__.__mro__ }}", "leaves out|no chat template"),
        ("{{ raise_exception('no\\nturns') }}", "is no chat template"),
    ],
)
def test_what_is_no_template_is_refused(tmp_path, text, says):
    (tmp_path / "t.jinja").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_template(str(tmp_path / "t.jinja"))
    (tmp_path / "t.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="no chat template can be read"):
        read_template(str(tmp_path / "t.jinja"))
