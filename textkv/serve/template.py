"""Chat templates for models that come without one: a file of the user's, and a plain one for the embedded text model.

A template is a program. transformers runs it in Jinja's sandbox: it sees the messages and nothing else of the process.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

LARGEST = 1_000_000  # bytes of a template; the longest that models come with have some 20,000
ASKED = "Is it so?"

PLAIN = (
    "{% for m in messages %}{{ m['role'] }}:\n{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
"""For the embedded text model. It was trained on pages of text and has no turns: it goes on from these lines as from
any others, which shows how a server keeps caches and not what a chat model says."""


def read_template(text: str) -> str:
    """The chat template in a file.

    Raises:
        ValueError: it cannot be read, is no template, or leaves out what a message says.
    """
    path = Path(text)
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path} is larger than {LARGEST:,} bytes; give the file of a chat template")
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"no chat template can be read from {text!r}: {error}") from None
    message = [{"role": "user", "content": ASKED}]
    try:
        told = render_jinja_template([message], chat_template=template, add_generation_prompt=True)[0][0]
    # A template may also add a number to a text: whatever it raises is wrong with the file.
    except (TemplateError, TypeError, ValueError, KeyError, ArithmeticError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        where = f", line {line}" if line else ""
        raise ValueError(f"{path} is no chat template ({error or type(error).__name__}{where})") from None
    if ASKED not in told:
        raise ValueError(f"{path} is no chat template: it leaves out what a message says; see messages[0]['content']")
    return template
