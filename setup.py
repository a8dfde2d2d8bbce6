"""Packaging. `pip install -e '.[dev]'` for working on it; see the Makefile."""

import re
from pathlib import Path

from setuptools import setup

VERSION = re.search(r'__version__ = "(.+)"', (Path(__file__).parent / "thinkrl/__init__.py").read_text())[1]

EXTRAS = {
    "parquet": ["pyarrow"],
    "math": ["math-verify"],
    "hub": ["huggingface_hub"],
    "gym": ["reasoning-gym"],
    "wandb": ["wandb"],
    "tensorboard": ["tensorboard"],
    "report": ["matplotlib"],
    "flash": ["flash-attn"],
}

setup(
    name="thinkrl",
    version=VERSION,
    description="Reinforcement learning of efficient reasoning, from scratch, in PyTorch and Triton",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "thinkrl",
        *(
            f"thinkrl.{folder}"
            for folder in ("config", "data", "decode", "grading", "l2t", "longshort", "run", "tools")
        ),
        "kernels",
    ],
    py_modules=["train", "sample", "chunk"],
    entry_points={
        "console_scripts": [f"thinkrl-{name} = thinkrl.cli:{name}" for name in ("train", "sample", "chunk")]
    },
    package_data={"thinkrl": ["assets/tiny/*", "assets/report.*"]},
    install_requires=["torch>=2.11", "triton>=3.6", "safetensors", "tokenizers", "numpy", "tqdm", "jinja2"],
    extras_require=EXTRAS
    | {
        "dev": [
            "pytest",
            "pytest-xdist",
            # Triton 3.6's interpreter, in which tests run kernels, fails with 2.4 (triton issue 9171)
            "numpy<2.4",
            "ruff",
            "mypy",
            "hypothesis",
            "transformers",
            *EXTRAS["parquet"],
            *EXTRAS["math"],
            *EXTRAS["report"],
            *EXTRAS["gym"],
        ]
    },
)
