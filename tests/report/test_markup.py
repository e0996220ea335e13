import pytest

from rltune.report.markup import clean, join, tag


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", "<b>&", tag("i", '"x"')) == "<p>&lt;b&gt;&amp;<i>&quot;x&quot;</i></p>"
    assert join("<", tag("br"), None, 2.5) == "&lt;<br>2.5"


def test_attributes_are_escaped_too() -> None:
    made = tag("a", title='"><script>', data_t="001", class_="x", hidden=True, open=False, id=None, x=1.26)
    assert made == '<a title="&quot;&gt;&lt;script&gt;" data-t="001" class="x" hidden x="1.3"></a>'


def test_what_no_document_may_hold_is_replaced() -> None:
    assert clean("a\0b\x1b[31m\ud800\n") == "a\ufffdb\ufffd[31m\ufffd\n"
    assert tag("p", "\ud800", title="\0").encode("utf-8")


def test_a_secret_is_masked_before_it_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "se&<cret>0")
    clean.cache_clear()
    assert tag("p", "got se&<cret>0 back") == "<p>got *** back</p>"
    clean.cache_clear()
