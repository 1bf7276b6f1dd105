"""Texts of others in what we write."""

from __future__ import annotations

import pytest

from pipeline.wording import in_markdown


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("kid_efflite0 (1.5)", "kid_efflite0 (1.5)"),
        ("optim.G.betas=[0.5, 0.99]", "optim.G.betas=[0.5, 0.99]"),
        ("_b <b>x</b> *i*", r"\_b \<b>x\</b> \*i\*"),
        ("$x_{1}$ | `c`", r"\$x\_{1}\$ \| \`c\`"),
        ("&lt; ![a](b)", r"\&lt; ![a\](b)"),
        ("[a](http://b)", r"[a\](http://b)"),
        ("a\nb", r"a\\nb"),
    ],
)
def test_a_text_in_markdown_is_shown_as_it_is(text, written):
    assert in_markdown(text) == written
