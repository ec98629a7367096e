# SPDX-License-Identifier: Apache-2.0
"""The examples in the docstrings of public functions and classes: they are there, and they run."""

import dataclasses
import doctest
import enum
import importlib
import inspect
import pkgutil
import typing

import pydantic
import pytest

import nemo_rl_ref.algorithms
import nemo_rl_ref.contract
import nemo_rl_ref.custom
import nemo_rl_ref.logprobs

PACKAGES = (
    nemo_rl_ref.algorithms,
    nemo_rl_ref.contract,
    nemo_rl_ref.custom,
    nemo_rl_ref.logprobs,
)
MODULES = sorted(
    module.name
    for package in PACKAGES
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")
)


def only_holds_data(value):
    """A class that is its fields: a configuration, keys of a batch, an enum, an error."""
    if not inspect.isclass(value):
        return False
    kinds = (pydantic.BaseModel, enum.Enum, Exception)
    fields = typing.is_typeddict(value) or dataclasses.is_dataclass(value)
    return fields or issubclass(value, kinds) or getattr(value, "_is_protocol", False)


def public_values():
    """What the documentation shows of the four folders."""
    pages = [nemo_rl_ref.contract, nemo_rl_ref.logprobs]
    pages += [
        importlib.import_module(name)
        for name in MODULES
        if "._" not in name and name.startswith(("nemo_rl_ref.algorithms", "nemo_rl_ref.custom"))
    ]
    for page in pages:
        for name, value in vars(page).items():
            named = name in getattr(page, "__all__", ()) or (
                not name.startswith("_") and getattr(value, "__module__", None) == page.__name__
            )
            if named and (inspect.isfunction(value) or inspect.isclass(value)):
                yield value


VALUES = [value for value in dict.fromkeys(public_values()) if not only_holds_data(value)]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value.__qualname__)
def test_a_public_function_or_class_has_an_example(value):
    assert doctest.DocTestParser().get_examples(inspect.getdoc(value) or "")


def test_the_walk_finds_what_is_there():
    names = {value.__qualname__ for value in VALUES}
    assert names >= {"DPOLossFn", "masked_mean", "SimPOLossFn", "token_logprobs", "check_loss"}


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name):
    failed, _ = doctest.testmod(importlib.import_module(name), verbose=False)
    assert not failed
