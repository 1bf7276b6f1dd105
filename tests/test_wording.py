"""Texts of others in what we write."""

from __future__ import annotations

import pytest

from pipeline.wording import in_bytes, in_markdown, in_millions


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


def test_no_number_of_bytes_is_written_with_an_exponent():
    sizes = [0, 980, 999, 1000, 1023, 1023 * 1024, 999.6 * 1024**2, 1234 * 1024**3]
    assert list(map(in_bytes, sizes)) == [
        "0 B", "980 B", "999 B", "0.977 KiB", "0.999 KiB", "0.999 MiB", "1.0 GiB", "1,234.0 GiB"
    ]  # fmt: skip


def test_few_parameters_are_not_0_million():
    assert list(map(in_millions, (640, 9_999, 10_000, 12_344_000))) == ["640", "9,999", "0.01 M", "12.34 M"]
