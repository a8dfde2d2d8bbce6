"""Text of models and of data as a terminal and a page may show it."""

# Control characters as their pictures; characters that change the direction of the text around them by name.
DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
VISIBLE = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | {ord(c): f"⟨U+{ord(c):04X}⟩" for c in DIRECTIONS}
    | {code: f"⟨U+{code:04X}⟩" for code in range(0x80, 0xA0)}
)


def visible(value) -> str:
    """Any value as text without control characters, so that it cannot change how its surroundings are shown."""
    return str(value).translate(VISIBLE)
