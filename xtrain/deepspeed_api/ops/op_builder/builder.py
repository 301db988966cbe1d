"""The builders of DeepSpeed's operators: they tell what there is, and compile nothing."""

from __future__ import annotations

from typing import Any

import torch

from xtrain.base.errors import NotImplementedYetError


class OpBuilder:
    """One of DeepSpeed's operators.

    Attributes:
        NAME: DeepSpeed's name of it.
        optimizer: its counterpart below `xtrain.ops`; None: there is none.
        instead: what to do about the compiled library, which is not there.
    """

    NAME = "deepspeed_not_implemented"
    optimizer: str | None = None
    instead = "use torch.nn.functional in the model"

    def __init__(self, name: str | None = None) -> None:
        self.name = name or self.NAME

    def is_compatible(self, verbose: bool = False) -> bool:
        """Whether what the operator is for works here. The optimizers do, on every backend."""
        return self.optimizer is not None

    @staticmethod
    def is_rocm_pytorch() -> bool:
        """Whether PyTorch was built for AMD's and Hygon's chips."""
        return torch.version.hip is not None

    def load(self, verbose: bool = True) -> Any:
        """Always refuses: there is no compiled library."""
        raise NotImplementedYetError(f"the compiled operator {self.name!r}", self.instead)

    def builder(self) -> Any:
        """Always refuses: there is nothing to compile."""
        raise NotImplementedYetError(f"compiling the operator {self.name!r}", self.instead)


class NotImplementedBuilder(OpBuilder):
    """An operator that this accelerator does not have."""


def builder_class(
    title: str, name: str, instead: str | None = None, optimizer: str | None = None
) -> type[OpBuilder]:
    """The builder class `title` of the operator `name`; see OpBuilder for the rest."""
    if optimizer is not None:
        instead = f"use xtrain.ops.{optimizer}, which compiles nothing"
    body: dict[str, Any] = {
        "NAME": name,
        "optimizer": optimizer,
        "__module__": __name__.rpartition(".")[0],
        "__doc__": f"DeepSpeed's operator {name!r}: {instead or OpBuilder.instead}.",
    }
    if instead is not None:
        body["instead"] = instead
    return type(title, (OpBuilder,), body)
