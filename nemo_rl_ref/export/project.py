# SPDX-License-Identifier: Apache-2.0
"""The files of an exported folder: what is in them, and how they are written."""

from __future__ import annotations

import ast
import inspect
import os
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_rl_ref.contract.build import build_loss, signature_of, takes_any_field
from nemo_rl_ref.contract.user_code import find
from nemo_rl_ref.export.carry import (
    Carried,
    ExportError,
    carry,
    module_name,
    refuse_private_methods,
)
from nemo_rl_ref.training.user_code import load_reward
from nemo_rl_ref.upstream import COMMIT

_SUPERVISED = (
    "policy", "cluster", "dataloader", "val_dataloader", "loss_fn", "logger", "checkpointer",
    "state", "config",
)  # fmt: skip


@dataclass(frozen=True)
class Script:
    """One of NeMo RL's entry scripts.

    Attributes:
        section: The section of the configuration with the settings of its loss.
        outputs: What its ``setup`` returns, in order.
        base: The file in ``examples/configs`` that it takes by default.
    """

    section: str
    outputs: tuple[str, ...]
    base: str


#: ``examples/run_NAME.py`` by name.
SCRIPTS = {
    "dpo": Script("dpo", _SUPERVISED, "dpo.yaml"),
    "sft": Script("sft", _SUPERVISED, "sft.yaml"),
    "rm": Script("rm", _SUPERVISED, "rm.yaml"),
    "grpo": Script(
        "loss_fn",
        (
            "policy", "generation", "nemo_gym", "cluster", "dataloader", "val_dataloader",
            "loss_fn", "logger", "checkpointer", "state", "config", "teachers", "aliases",
        ),
        "grpo_math_1B.yaml",
    ),
}  # fmt: skip

_FUSED = "use_fused_linear_logprobs"


@dataclass(frozen=True)
class Loss:
    """A loss as a launcher builds it.

    Attributes:
        name: Its class.
        module: Where it is carried.
        call: The Python that builds it from ``section`` and ``fused``.
        takes_fused: Whether its ``__init__`` takes ``use_fused_linear_logprobs``.
        settings: Its own keys, with values.
    """

    name: str
    module: str
    call: str
    takes_fused: bool
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Reward:
    """A reward function: its name and module, and what NeMo RL calls its environment and actor."""

    name: str
    module: str
    env_name: str
    actor: str


def make_files(
    algorithm: str, loss: str | None, env: str | None, pairs: Sequence[str], folder: str
) -> dict[str, str]:
    """Make the text of every file of the folder.

    Args:
        algorithm: One of `SCRIPTS`.
        loss: ``my_loss.py:MyLoss``, or None.
        env: ``my_reward.py:reward``, or None; for GRPO.
        pairs: Settings of the loss, ``key=value``.
        folder: The name of the folder.

    Raises:
        ExportError: If something cannot be carried.
        UsageError: If the loss cannot be imported, or built with these settings.
        ValueError: If the reward is no function of three texts.
    """
    if not (loss or env):
        raise ExportError(
            "nothing to export, expected my_loss.py:MyLoss or --env my_reward.py:reward"
        )
    if env and algorithm != "grpo":
        raise ExportError(
            f"--env: got it with --algorithm {algorithm}, expected grpo: it has rewards"
        )
    if pairs and not loss:
        raise ExportError(f"{pairs[0]}: got a setting, and no loss that it belongs to")
    kind, reward_function = find(loss) if loss else None, load_reward(env) if env else None
    things = [thing for thing in (kind, reward_function) if thing is not None]
    files = [_file_of(thing, str(loss or env)) for thing in things]
    if kind is not None:
        build_loss(kind, pairs)
        refuse_private_methods(kind)
    carried = carry(files)
    made = _loss(kind, pairs, SCRIPTS[algorithm].section) if kind else None
    reward = _reward(reward_function, files[-1]) if reward_function is not None else None
    return _render(algorithm, made, reward, carried, _notes(kind, algorithm), folder)


def _file_of(thing: Any, spec: str) -> Path:
    try:
        return Path(str(inspect.getsourcefile(thing))).resolve()
    except TypeError as error:
        raise ExportError(
            f"{spec}: got no Python source, expected a class or a function"
        ) from error


def _reward(function: Any, file: Path) -> Reward:
    module = module_name(file)
    return Reward(function.__name__, module, module, f"{module}_environment.RewardEnvironment")


def _loss(kind: type, pairs: Sequence[str], section: str) -> Loss:
    """How a launcher builds a loss of this class, and with which keys."""
    argument, config, others = signature_of(kind)
    module = module_name(_file_of(kind, kind.__name__))
    settings = {**_defaults(kind, argument, config), **_parsed(section, pairs)}
    words = []
    if config is not None:
        words.append(f"{argument}={_section_as(config)}")
    parameters = inspect.signature(kind).parameters
    for name in others:
        if name == _FUSED:
            words.append(f"{_FUSED}=fused")
        elif name in settings or parameters[name].default is parameters[name].empty:
            words.append(f"{name}=section.{name}")
    call = f"{module}.{kind.__name__}({', '.join(words)})"
    return Loss(kind.__name__, module, call, _FUSED in others, settings)


def _section_as(config: Any) -> str:
    """The Python that makes a loss's config of NeMo RL's ``section``."""
    if config.__module__.startswith("nemo_rl_ref.algorithms."):  # NeMo RL hands over the section
        return "section"
    name = f"{module_name(_file_of(config, config.__name__))}.{config.__qualname__}"
    if takes_any_field(config):
        return f"{name}(**section.model_dump())"
    fields = tuple(getattr(config, "model_fields", config.__annotations__))
    return f"{name}(**section.model_dump(include={set(fields)!r}))"


def _parsed(section: str, pairs: Sequence[str]) -> dict[str, Any]:
    """The pairs, their values as NeMo RL's command line reads them."""
    from omegaconf import OmegaConf

    from nemo_rl_ref.utils.config import parse_hydra_overrides

    config = OmegaConf.create({section: {}})
    config = parse_hydra_overrides(config, [f"++{section}.{pair}" for pair in pairs])
    found: Any = OmegaConf.to_container(config)
    return found[section]


def _defaults(kind: type, argument: str, config: Any) -> dict[str, Any]:
    """The keys of a loss's own with their defaults, as far as they are literals in its source.

    They are the fields of its config class, its ``__init__``'s other arguments, and what is read
    as ``getattr(cfg, "key", default)``.
    """
    found: dict[str, Any] = {}
    own = [base for base in kind.__mro__ if not _is_mirrored(base)]
    for base in reversed(own):
        found |= dict(_read_keys(base, argument))
    for base in reversed(getattr(config, "__mro__", ())):
        if not _is_mirrored(base) and config.__module__ == base.__module__:
            for name in vars(base).get("__annotations__", {}):
                field = getattr(config, "model_fields", {}).get(name)
                if field is not None and not field.is_required():
                    found[name] = field.get_default(call_default_factory=True)
    parameters = inspect.signature(kind).parameters.items()
    found |= {
        name: parameter.default
        for name, parameter in parameters
        if name not in (argument, _FUSED) and parameter.default is not parameter.empty
    }
    plain = (bool, int, float, str)
    return {name: value for name, value in found.items() if isinstance(value, plain)}


def _is_mirrored(kind: type) -> bool:
    return (
        kind is object
        or not kind.__module__
        or kind.__module__.startswith(("nemo_rl_ref.algorithms.", "pydantic", "typing", "abc"))
    )


def _read_keys(kind: type, argument: str) -> Iterator[tuple[str, Any]]:
    """Keys and defaults of calls such as ``getattr(cfg, "key", default)`` in a class."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))):
        match node:
            case ast.Call(
                args=[ast.Name(id=name), ast.Constant(value=str(key)), ast.Constant(value=default)]
            ) if name == argument:
                yield key, default


def _notes(kind: Any, algorithm: str) -> list[str]:
    """What a reader must know before training with a loss."""
    notes = []
    if needs := getattr(kind, "needs_data", ()):
        keys = ", ".join(f"`{key}`" for key in needs)
        notes.append(f"The loss reads {keys}, which NeMo RL's batches for {algorithm} do not have.")
    if getattr(kind, "needs_whole_batch", False):
        notes.append(
            "The loss couples the rows of a micro-batch: with more than one micro-batch or GPU it is "
            "another loss."
        )
    return notes


def _render(
    algorithm: str, loss: Loss | None, reward: Reward | None, carried: Carried,
    notes: list[str], folder: str,
) -> dict[str, str]:  # fmt: skip
    from jinja2 import Environment, PackageLoader, StrictUndefined

    script, main = SCRIPTS[algorithm], loss or reward
    assert main is not None
    stem = main.module
    names = {"launcher": f"run_{stem}", "overlay": f"{stem}.yaml", "test": f"test_{stem}.py"}
    says = {f"{name}.py": "the code, with NeMo RL's import prefix" for name in carried.modules}
    if reward:
        says[f"{reward.module}_environment.py"] = "the reward as an environment, a Ray actor"
    says |= {
        f"{names['launcher']}.py": f"puts it into NeMo RL's `examples/run_{algorithm}.py`",
        names["overlay"]: f"the keys, on top of NeMo RL's `{script.base}`",
        names["test"]: "whether it keeps NeMo RL's promises",
    }
    modules = [name.removesuffix(".py") for name in says if name.endswith(".py")]
    modules = [name for name in modules if name not in (names["launcher"], f"test_{stem}")]
    taken = sorted({f"run_{algorithm}", "nemo_rl", "ray", "torch"} & {*modules, names["launcher"]})
    if taken or len(says) != len(carried.modules) + 3 + bool(reward):
        raise ExportError(f"{taken[0] if taken else stem}.py: the name is taken; rename your file")
    named = {"the loss": loss, "the reward": reward}
    what = " and ".join(f"{kind} {one.module}.{one.name}" for kind, one in named.items() if one)
    values = {
        **names, "algorithm": algorithm, "loss": loss, "reward": reward, "what": what,
        "name": main.name, "modules": modules, "outputs": script.outputs, "base": script.base,
        "section": script.section, "folder": folder, "files": says, "notes": notes,
        "packages": carried.packages, "commit": COMMIT,
        "settings": [repr(f"{key}={value}") for key, value in loss.settings.items()] if loss else [],
    }  # fmt: skip
    environment = Environment(
        loader=PackageLoader("nemo_rl_ref.export", "."), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    made = {f"{name}.py": text for name, text in carried.modules.items()}
    made[names["overlay"]] = _overlay(script, loss, reward, stem)
    templates = {
        f"{names['launcher']}.py": "launcher.py.jinja",
        names["test"]: "test.py.jinja",
        "README.md": "README.md.jinja",
    }
    if reward:
        templates[f"{reward.module}_environment.py"] = "environment.py.jinja"
    for name, template in templates.items():
        made[name] = environment.get_template(template).render(values)
    for name, text in made.items():
        if name.endswith(".py"):
            compile(text, name, "exec")
    return made


def _overlay(script: Script, loss: Loss | None, reward: Reward | None, stem: str) -> str:
    """The YAML file: NeMo RL's configuration below, and what differs."""
    from omegaconf import OmegaConf

    found: dict[str, Any] = {"checkpointing": {"checkpoint_dir": f"results/{stem}"}}
    if loss and loss.settings:
        found[script.section] = dict(loss.settings)
    if reward:
        found["env"] = {reward.env_name: {"num_workers": 1}}
        found["data"] = {
            "train": {"env_name": reward.env_name, "split_validation_size": 0},
            "validation": {"dataset_name": "AIME2024"},
        }
    head = "# On top of NeMo RL's own configuration, with this folder in examples/.\n"
    return f"{head}defaults: ../configs/{script.base}\n\n" + OmegaConf.to_yaml(
        OmegaConf.create(found)
    )


def write_folder(files: Mapping[str, str], to: Path, *, force: bool = False) -> None:
    """Write a folder, whole or not at all.

    Args:
        files: Text by name.
        to: The folder; its parent is made if there is none.
        force: Replace a folder that is there, if it holds nothing but files of these names.

    Raises:
        ExportError: If there is something that would be lost.
    """
    to = to.absolute()
    there = {path.name for path in to.iterdir()} if to.is_dir() else set()
    there -= {"__pycache__", ".pytest_cache"}
    if to.exists() and not to.is_dir():
        raise ExportError(f"--to: got the file {to}, expected a folder")
    if others := sorted(there - files.keys()):
        raise ExportError(f"--to: {to} holds {others[0]}, which is no export; give another folder")
    if there and not force:
        raise ExportError(f"--to: {to} is there; --force replaces it")
    to.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{to.name}.", suffix=".tmp", dir=to.parent))
    old = new.with_suffix(".old")
    try:
        for name, text in files.items():
            (new / name).write_text(text, encoding="utf-8")
        new.chmod(0o755)
        if to.is_dir():
            os.replace(to, old)
        os.replace(new, to)
    finally:
        if old.is_dir() and not to.exists():
            os.replace(old, to)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)
