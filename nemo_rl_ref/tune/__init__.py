# SPDX-License-Identifier: Apache-2.0
r"""Searches for hyperparameters over NeMo RL's own configuration keys.

.. code-block:: sh

    python -m nemo_rl_ref.tune dpo --config configs/dpo.yaml --space configs/spaces/dpo.yaml \
        --objective val:validation-default_accuracy --trials 30

From Python::

    spec = make_spec("dpo", "configs/dpo.yaml", "configs/spaces/dpo.yaml", ["val:…"])
    study = optimize(spec, folder="results/tune_dpo", trials=30)
    print(best_of(study).override_line)

Samplers, pruners, the database, resuming and figures are Optuna's; the study is an Optuna study.
What this package adds is in its attributes: ``spec`` of the study; ``values``, ``seed``,
``seconds``, ``steps``, ``worker`` and, if it failed, ``failure`` of a trial.
"""

from __future__ import annotations

from typing import Any

_MODULES = {
    "space": ("Space", "SpaceError", "override_line"),
    "spec": ("Objective", "Spec", "SpecError", "make_spec"),
    "trial": ("TrialFailed", "run_trial"),
    "methods": ("SearchError",),
    "search": ("SearchStopped", "Settings", "Stopped", "StudyError", "optimize"),
    "outcome.best": ("best_of",),
    "outcome.report": ("write_report",),
    "engines.nemo_rl": ("launcher",),
    "engines.ray": ("optimize_on_ray",),
}
__all__ = [name for names in _MODULES.values() for name in names]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: Optuna takes a second, the trainers several."""
    from importlib import import_module

    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
