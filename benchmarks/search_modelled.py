# SPDX-License-Identifier: Apache-2.0
"""A model of the recorded DPO runs: learning rate against β, and searches that cost no training.

    python benchmarks/search_modelled.py    # a few minutes on one core; after search_pool.py

A Gaussian process with a length scale for each key is fitted to the random runs of search_pool.py; its
length scales and its noise maximize the marginal likelihood. It is read in two ways. `surface`: what it
says over learning rate and β, the other keys fixed, for the accuracy and for the KL divergence. `runs`:
searches in which a trial's value is the process's mean at its setting, plus normal noise of the size
that was fitted, so that the true value of what a search takes is known. The mean is smooth, as the
Gaussian process among the methods assumes; real runs are not bound to be. Written to
results/search-modelled.json, with what leaving one run out says about the model.
"""

from __future__ import annotations

import argparse
import json
import math

import numpy as np
import optuna
from _search import DPO, RATE, RESULTS, WARM_UP, SeededByTrial, header, write
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.stats import spearmanr

SEARCHES, TRIALS = 20, 24
BETA = "dpo.reference_policy_kl_penalty"
FIXED = {  # on the surface
    "dpo.sft_loss_weight": 0.001,
    "policy.optimizer.kwargs.weight_decay": 0.01,
    "policy.max_grad_norm": 1.0,
    WARM_UP: 5,
}
SAMPLERS = {
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
}


def place(values):
    """A setting as a point of the unit cube."""
    point = []
    for key, range_ in DPO.space.items():
        scale = math.log if range_.log else float
        low, high = scale(range_.low), scale(range_.high)
        point.append((scale(values[key]) - low) / (high - low))
    return point


class Model:
    """A Gaussian process with squared exponential covariance.

    Args:
        points: Settings in the unit cube, ``(N, D)``.
        values: Their objective, ``(N,)``.
    """

    def __init__(self, points, values):
        self.points, self.mean = points, values.mean()
        self.values = values - self.mean
        deviation = values.std()
        start = np.log([*[0.5] * points.shape[1], deviation, deviation / 2])
        bounds = [(math.log(0.05), math.log(20))] * points.shape[1]
        bounds += [(math.log(deviation / 30), math.log(deviation * 10))] * 2
        found = minimize(self._misfit, start, bounds=bounds, method="L-BFGS-B")
        self.scales, self.size, self.noise = self._read(found.x)
        self.factor = cho_factor(self._covariance(found.x))
        self.weights = cho_solve(self.factor, self.values)

    @staticmethod
    def _read(parameters):
        natural = np.exp(parameters)
        return natural[:-2], natural[-2], natural[-1]

    def _covariance(self, parameters):
        scales, size, noise = self._read(parameters)
        apart = (self.points[:, None] - self.points[None]) / scales
        covariance = size**2 * np.exp(-0.5 * (apart**2).sum(-1))
        return covariance + noise**2 * np.eye(len(self.points))

    def _misfit(self, parameters):
        factor = cho_factor(self._covariance(parameters))
        half = 0.5 * self.values @ cho_solve(factor, self.values)
        return half + np.log(np.diag(factor[0])).sum()

    def __call__(self, point):
        apart = (self.points - np.asarray(point)) / self.scales
        covariance = self.size**2 * np.exp(-0.5 * (apart**2).sum(-1))
        return float(self.mean + covariance @ self.weights)

    def error(self, point):
        """The standard deviation of what is not known of the mean at a point."""
        apart = (self.points - np.asarray(point)) / self.scales
        covariance = self.size**2 * np.exp(-0.5 * (apart**2).sum(-1))
        known = covariance @ cho_solve(self.factor, covariance)
        return math.sqrt(max(self.size**2 - known, 0.0))

    def left_out(self):
        """What each run is predicted to be from all others (Rasmussen and Williams, 5.12)."""
        inverse = cho_solve(self.factor, np.eye(len(self.points)))
        return self.mean + self.values - self.weights / np.diag(inverse)


def search(model, method, seed):
    """The values that a search saw, and the true ones."""
    random = np.random.default_rng([seed, 1])
    study = optuna.create_study(direction="maximize", sampler=SeededByTrial(SAMPLERS[method], seed))
    seen, true = [], []
    for _ in range(TRIALS):
        trial = study.ask(DPO.space)
        true.append(model(place(trial.params)))
        seen.append(true[-1] + model.noise * random.standard_normal())
        study.tell(trial, seen[-1])
    return {"seen": [round(v, 4) for v in seen], "true": [round(v, 4) for v in true]}


def surface(model, kl_model):
    """Over learning rate and β: accuracy, its standard error, and the KL divergence."""
    rates, betas = np.geomspace(1e-5, 3e-3, 22), np.geomspace(0.01, 3.0, 16)
    points = [[place({**FIXED, RATE: rate, BETA: beta}) for rate in rates] for beta in betas]

    def over(read, digits):
        return [[round(read(point), digits) for point in row] for row in points]

    return {
        "fixed": FIXED,
        "rates": rates.round(8).tolist(),
        "betas": betas.round(5).tolist(),
        "accuracy": over(model, 4),
        "error": over(model.error, 4),
        "kl": over(lambda point: math.exp(kl_model(point)), 5),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.parse_args()
    recorded = json.loads((RESULTS / "search-pool-dpo.json").read_text())
    random = [run for run in recorded["runs"] if run["part"] == "random"]
    points = np.array([place(run["values"]) for run in random])
    values = np.array([run["curve"][-1][1] for run in random])
    model = Model(points, values)
    left_out = model.left_out()
    log_kl = np.log([run["kl"] for run in random])
    kl_model = Model(points, log_kl)
    content = {
        **header(DPO),
        "fitted_to": len(random),
        "length_scales": dict(zip(DPO.space, model.scales.round(3).tolist(), strict=True)),
        "noise": round(float(model.noise), 4),
        "left_out_rank_correlation": round(float(spearmanr(left_out, values)[0]), 3),
        "left_out_error": round(float(np.sqrt(np.mean((left_out - values) ** 2))), 4),
        "left_out_rank_correlation_kl": round(float(spearmanr(kl_model.left_out(), log_kl)[0]), 3),
        "surface": surface(model, kl_model),
        "runs": [],
    }
    print({name: content[name] for name in list(content)[-7:-2]})
    for method in SAMPLERS:
        for seed in range(SEARCHES):
            content["runs"].append({"part": method, "seed": seed, **search(model, method, seed)})
        print(method, flush=True)
    write("modelled", content)


if __name__ == "__main__":
    main()
