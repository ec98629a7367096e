# SPDX-License-Identifier: Apache-2.0
"""The largest differences between two records (see `record`) of one variant."""

import math

#: Differences that stay, by the reason's name: the metrics that they touch. The page
#: ``docs/reference/against-nemo-rl.md`` says why.
TIES = "ties before the first step"
STAYS = {
    "environment message": {
        "mean_env_tokens_per_sample", "mean_total_tokens_per_sample", "total_num_tokens",
        "truncation_rate",
    },
}  # fmt: skip

#: A number may differ by this much, as a share of the larger of 1 and itself. Adam divides a gradient
#: by its own size, so that rounding in one step is a few times 1e-5 some steps later.
BOUND = 1e-4

#: Below it, the rewards of DPO are what rounding leaves of 0, and which is larger is chance.
TIE = 1e-4


def compare(theirs, ours):
    """Compare NeMo RL's record with this project's.

    Returns:
        A dict: ``batches`` and ``steps`` (numbers), ``largest`` (differences by what was compared),
        ``names`` (metrics that one side alone has), ``stays`` (reasons of `STAYS` that were met),
        and ``unexplained``, a list of sentences, empty if all agrees.
    """
    found = {"largest": {}, "unexplained": [], "stays": set()}
    _batches(theirs, ours, found)
    mine, his = _by_step(ours["metrics"]), _by_step(theirs["metrics"])
    _metrics(his, mine, found)
    _checkpoints(theirs, ours, found)
    trained = [batch for batch in ours["batches"] if batch["training"]]
    steps = {step for step, prefix in mine if prefix == "train"}
    return {
        "steps": len(steps), "batches": len(trained),
        "largest": {name: _short(value) for name, value in found["largest"].items()},
        "names": found["names"], "stays": sorted(found["stays"]),
        "checkpoints": ours["kept"], "unexplained": found["unexplained"],
    }  # fmt: skip


def _short(value):
    return float(f"{value:.2g}")


def _distance(a, b):
    """Difference of two numbers as a share of the larger of 1 and the first; inf if not comparable."""
    if a == b:
        return 0.0
    if isinstance(a, str) or isinstance(b, str):
        return math.inf
    return abs(a - b) / max(1.0, abs(a))


def _note(found, kind, distance, text, bound=BOUND):
    found["largest"][kind] = max(found["largest"].get(kind, 0.0), distance)
    if not distance <= bound:
        found["unexplained"].append(f"{kind}: {text}")


def _batches(theirs, ours, found):
    """Tokens and masks are to be equal; numbers to agree. After our row NeMo RL may have a message."""
    pairs = [[b for b in record["batches"] if b["training"]] for record in (theirs, ours)]
    for of in ("policy", "value"):
        a, b = ([batch for batch in side if batch["of"] == of] for side in pairs)
        if len(a) != len(b):
            found["unexplained"].append(f"{of}: {len(a)} ↔ {len(b)} training batches")
        for number, (his, mine) in enumerate(zip(a, b, strict=False)):
            _batch(his, mine, f"batch {number} of the {of} model", found)


def _batch(his, mine, where, found):
    if his["sample_mask"] != mine["sample_mask"]:
        found["unexplained"].append(f"batches: {where}: other sample_mask")
    for row, ids in enumerate(mine["input_ids"]):
        other = his["input_ids"][row]
        tail = his["token_mask"][row][len(ids) :] if "token_mask" in his else ()
        if len(other) > len(ids) and not any(tail):
            found["stays"].add("environment message")
        if other[: len(ids)] != ids or any(tail):
            found["unexplained"].append(f"batches: {where}, row {row}: {other} ↔ {ids}")
        for name in set(his) & set(mine) - {"input_ids", "sample_mask", "training", "of"}:
            used = mine["token_mask"][row] if name != "token_mask" else [1] * len(ids)
            values = zip(his[name][row], mine[name][row], used, strict=False)
            # The first column predicts nothing; outside the mask nothing is read.
            distance = max((_distance(a, b) for a, b, on in list(values)[1:] if on), default=0.0)
            kind = "masks" if name == "token_mask" else "batch columns"
            _note(found, kind, distance, f"{where}, row {row}: {name}, by {distance:.1e}")


def _by_step(metrics):
    """Metrics by step and prefix; what is logged in several parts is one."""
    joined: dict = {}
    for step, prefix, values in metrics:
        joined.setdefault((step, prefix), {}).update(values)
    return {key: values for key, values in joined.items() if key[1] != "timing/setup"}


def _metrics(his, mine, found):
    names = {"nemo_rl": set(), "here": set()}
    for key in sorted(his.keys() | mine.keys()):
        (step, prefix), a, b = key, his.get(key, {}), mine.get(key, {})
        if not (a and b) and not prefix.startswith(("timing", "performance")):
            found["unexplained"].append(f"metrics: step {step}, {prefix}: only one side logs it")
        names["nemo_rl"] |= {f"{prefix}/{name}" for name in a.keys() - b.keys()}
        names["here"] |= {f"{prefix}/{name}" for name in b.keys() - a.keys()}
        if prefix.startswith(("timing", "performance")):
            continue
        for name in sorted(a.keys() & b.keys()):
            reasons = {r for r, touched in STAYS.items() if name in touched and a[name] != b[name]}
            if name == "accuracy" and a[name] != b[name] and _are_ties(b):
                reasons.add(TIES)
            found["stays"] |= reasons
            if not reasons:
                kind = "learning rate" if name == "lr" else prefix.partition("-")[0]
                bound = 0.0 if name == "lr" else BOUND
                text = f"step {step}: {prefix}/{name} {a[name]} ↔ {b[name]}"
                _note(found, kind, _distance(a[name], b[name]), text, bound)
    found["names"] = {side: sorted(values) for side, values in names.items()}


def _are_ties(metrics):
    """Whether policy and reference are the same, so that all rewards of DPO are 0."""
    rewards = [metrics.get(f"rewards_{which}_mean", 1.0) for which in ("chosen", "rejected")]
    return max(map(abs, rewards)) < TIE


def _checkpoints(theirs, ours, found):
    steps = [[step for step, _ in record["checkpoints"]] for record in (theirs, ours)]
    for what, (a, b) in {"written": steps, "kept": (theirs["kept"], ours["kept"])}.items():
        if a != b:
            found["unexplained"].append(f"checkpoints {what}: {a} ↔ {b}")
    for (step, a), (_, b) in zip(theirs["checkpoints"], ours["checkpoints"], strict=False):
        for name in sorted(a):
            reasons = {
                r for r, touched in STAYS.items() if name in touched and a[name] != b.get(name)
            }
            found["stays"] |= reasons
            if not reasons and name in b:
                text = f"step {step}: training_info {name} {a[name]} ↔ {b[name]}"
                _note(found, "training_info", _distance(a[name], b[name]), text)
            elif not reasons:
                found["unexplained"].append(f"training_info: step {step}: no {name} here")
