"""Make control characters in text visible, for terminals and pages."""

# Control characters -> Unicode's control pictures; characters that change text direction -> their names.
DIRECTIONS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
VISIBLE = (
    {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | {ord(c): f"⟨U+{ord(c):04X}⟩" for c in DIRECTIONS}
    | {code: f"⟨U+{code:04X}⟩" for code in range(0x80, 0xA0)}
)


def visible(value) -> str:
    """Convert a value to text without control characters, which could change how other text is shown."""
    return str(value).translate(VISIBLE)
