"""Packaging. Ranges live here; the versions that are tested live in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


LINKED = (
    "accelerator",
    "compression",
    "launcher",
    "moe",
    "monitor",
    "ops",
    "pipe",
    "profiling",
    "runtime",
    "sequence",
    "utils",
)
"""Folders of xtrain/deepspeed_api/ that links in xtrain/ lead to."""


def read_version() -> str:
    """The version is written once, in xtrain/version.py (imported by nothing heavy)."""
    namespace: dict[str, str] = {}
    exec((HERE / "xtrain" / "version.py").read_text(), namespace)
    return namespace["__version__"]


setup(
    name="xtrain",
    version=read_version(),
    description="The DeepSpeed training API on NVIDIA CUDA, Ascend, Hygon DCU and Sunway, with loss curves that align",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "xtrain/align/vendor/uPlot.LICENSE"],
    python_requires=">=3.10",
    # backends/, comm/, launch/ and conf/ are reached through the symlinks inside xtrain/, so that
    # `xtrain` is the only importable name. examples/ ships as xtrain.examples: it holds the script
    # that `xtrain launch` runs by default.
    packages=[
        # What the other links in xtrain/ lead to is there under the links' names.
        *find_packages(
            include=["xtrain", "xtrain.*"], exclude=[f"xtrain.deepspeed_api.{name}*" for name in LINKED]
        ),
        "xtrain.conf",
        "xtrain.examples",
    ],
    package_dir={"xtrain": "xtrain", "xtrain.examples": "examples"},
    # xtrain/align/vendor: uPlot, which HTML reports carry inside, and its MIT licence.
    package_data={
        "xtrain": ["py.typed"],
        "xtrain.align": ["*.js", "vendor/*"],
        "xtrain.conf": ["*.yaml", "*/*.yaml"],
    },
    install_requires=[
        "torch>=2.4",
        "numpy>=1.26",
        "pydantic>=2.7,<3",
        "hydra-core>=1.3,<1.4",
        "rich>=13",
        "matplotlib>=3.8",
        "safetensors>=0.4.3",
        "tokenizers>=0.19",
    ],
    extras_require={
        "mpi": ["mpi4py>=4.0", "mpich>=4.2"],
        "deepspeed": ["deepspeed>=0.16"],
        "ascend": ["torch_npu>=2.4"],
        "monitor": ["tensorboard>=2.12", "wandb>=0.15", "comet_ml>=3.41"],
        "libraries": [
            "transformers>=5.23",
            "accelerate>=1.15",
            "trl>=1.16",
            "peft>=0.21",
            "lightning>=2.6",
            "datasets>=5",
        ],
        "docs": ["mkdocs-material>=9.5"],
        "dev": [
            "pytest>=8",
            "hypothesis>=6.100",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "mypy>=1.11",
            "build>=1.2",
        ],
    },
    entry_points={
        "console_scripts": ["xtrain=xtrain.cli:main"],
        "pytest11": ["xtrain.align.pytest_plugin=xtrain.align.pytest_plugin"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
