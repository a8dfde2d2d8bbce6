"""The README's tables say what the code says."""

from pathlib import Path

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_files_that_are_named_exist():
    import re

    root = Path(__file__).parent.parent
    for name in re.findall(r"`((?:thinkrl|kernels|tests)/[a-z_/]+\.py)`", README):
        assert (root / name).exists(), name
