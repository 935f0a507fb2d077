"""Names and texts that mean harm to a terminal, a page, a picture, a spreadsheet or a file system."""

from __future__ import annotations

import unicodedata

from hypothesis import strategies as st

NAMES = (
    "[/x]",
    "[link=https://evil.example]bank[/link]",
    "[bold red]bank",
    ":skull:",
    r"$\frac{$",
    r"$\infty$ and \$",
    "_hidden",
    "\x1b]0;title\x07\x1b[2J\x1b[31m",
    "\x9b31m\x90q\x9c",
    "‮knab‬⁦",
    "a\nb\r\x00c\x7f",
    "a\u2028b\u2029c\x85d",
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "--><svg onload=alert(1)>",
    "a | b",
    "`code` *b* _i_ ![x](http://evil.example)",
    '=HYPERLINK("http://evil.example")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "＝1+1",
    "\t=1+1",
    " =1+1",
    '","=1+1',
    "../../etc/passwd",
    "..",
    "",
    "-rf",
    "x" * 5000,
    "é",
    "ü",
    "a b",
    "a/b",
    "银行",
    "\ufffe\ue000\U000e0041\U0010ffff",
    "a~0123456789abcdef",
)
TEXTS = st.one_of(
    st.sampled_from(NAMES),
    st.text(max_size=40),
    st.text("[]/=$\\{}<>|`*_~\x1b\x9b\u202e\n\t\r\"'&;!-+@ a", max_size=40),
)
"""With lone surrogates too, which neither JSON nor UTF-8 can hold."""
WHOLE = TEXTS.filter(lambda text: not any("\ud800" <= char <= "\udfff" for char in text))


def is_tame(text: str) -> bool:
    """Whether a terminal would show it as it stands, line breaks apart."""
    return not any(unicodedata.category(char) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp") for char in text if char != "\n")
