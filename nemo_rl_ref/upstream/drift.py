# SPDX-License-Identifier: Apache-2.0
"""What changed in NeMo RL between two commits, what of it is used here, and where."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import SequenceMatcher
from textwrap import fill
from typing import Any

from nemo_rl_ref.upstream.extract import Facts
from nemo_rl_ref.upstream.uses import Uses

#: What may happen to a name, the worst first, with the heading in a report.
KINDS = {
    "removed": "Removed",
    "renamed": "Renamed",
    "moved": "Moved",
    "signature": "Signature changed",
    "default": "Default changed",
    "formula": "Formula possibly changed",
    "unread": "Could not be read",
    "new": "New, and not covered here",
}

_WHAT = ("symbol", "export", "method", "field", "key", "file")

#: How alike two names and their contents must be to be called a rename, from 0 to 1.
LIKELY = 0.6


@dataclass(frozen=True)
class Change:
    """One fact that is no longer what it was.

    Attributes:
        kind: One of `KINDS`.
        what: ``symbol``, ``export``, ``method``, ``field``, ``key`` or ``file``.
        name: The name before; of what is new, the name now.
        new: The likely name now, if it is another.
        detail: What is different, as text.
        mirror: File and line of the mirror of the symbol, if it has one.
        uses: Places that name it, ``file:line``.
    """

    kind: str
    what: str
    name: str
    new: str | None = None
    detail: str = ""
    mirror: str | None = None
    uses: tuple[str, ...] = ()

    @property
    def used(self) -> bool:
        """Whether it is something that we use. Code that only pages name may change."""
        if self.kind == "new":
            return False
        return bool(self.mirror or (self.uses and self.kind != "formula"))


def shared_names(*facts: Mapping[str, Facts]) -> set[str]:
    """The last parts of names that several symbols of one commit have."""
    counts = [Counter(n.rpartition(".")[2] for n in f["manifest.json"]["symbols"]) for f in facts]
    return {name for count in counts for name, number in count.items() if number > 1}


def find_drift(
    old: Mapping[str, Facts],
    new: Mapping[str, Facts],
    uses: Uses,
    renamed_files: Mapping[str, str] | None = None,
    unread: Iterable[str] = (),
) -> list[Change]:
    """Compare the facts about two commits.

    Args:
        old: What `extract.extract` returns for the earlier commit.
        new: The same for the later.
        uses: What this repository uses.
        renamed_files: Old path to new, where git knows it.
        unread: Files of the later commit that could not be parsed.

    Returns:
        The changes: what is used first, then by kind, by number of uses and by name.
    """
    changes, symbols = _compare_symbols(old, new)
    changes += _compare_keys(old, new)
    changes += _compare_files(old, new, symbols, renamed_files or {})
    files = {name: entry["file"] for name, entry in old["manifest.json"]["symbols"].items()}
    unread = set(unread)

    def finish(change: Change) -> Change:
        owner = change.name
        if change.what in ("field", "method"):
            owner = change.name.rpartition(".")[0]
        if files.get(owner) in unread and change.kind in ("removed", "renamed", "moved"):
            change = replace(change, kind="unread", detail=files[owner], new=None)
        if unread and (change.kind, change.what, change.detail) == ("removed", "key", ""):
            change = replace(change, kind="unread", detail=f"perhaps in {_some(sorted(unread))}")
        return _with_uses(change, owner, symbols.get(owner, owner), uses, old, new)

    order = list(KINDS)
    done = [finish(change) for change in changes if not _is_covered(change, uses)]
    done.sort(
        key=lambda c: (not c.used, order.index(c.kind), _WHAT.index(c.what), -len(c.uses), c.name)
    )
    return done


def _is_covered(change: Change, uses: Uses) -> bool:
    """Whether something new is here already."""
    if change.kind != "new":
        return False
    if change.what == "key":
        return bool(uses.key(change.name))
    owner, _, inner = change.name.rpartition(".")
    field = uses.mirror(owner, inner) if change.what == "field" else uses.mirror(change.name)
    return field is not None


def _with_uses(
    change: Change, owner: str, now: str, uses: Uses, old: Mapping, new: Mapping
) -> Change:
    """Look up who uses a change, by the old name and by the new."""
    found: list[str] = []
    mirror = None
    if change.what in ("symbol", "field", "method", "export"):
        for path, facts in ((owner, old), (now, new)):
            exports = facts["manifest.json"]["exports"].items()
            if change.what in ("symbol", "export"):
                found += uses.symbol(path, [name for name, to in exports if to == path])
            else:
                found += uses.names.get(".".join(change.name.split(".")[-2:]), ())
            is_inner = change.what in ("field", "method") and change.kind != "new"
            inner = change.name.rpartition(".")[2] if is_inner else None
            mirror = mirror or uses.mirror(path, inner)
    elif change.what == "key":  # of a new one, its section
        name = change.name if change.kind != "new" else change.name.rpartition(".")[0]
        found = uses.key(name) + (uses.key(change.new) if change.new else [])
    else:
        found = uses.file(change.name) + (uses.file(change.new) if change.new else [])
    places = sorted({place for place in found if place != mirror}, key=_rank_place)
    return replace(change, uses=tuple(places), mirror=mirror)


def _rank_place(place: str) -> tuple[bool, bool, str, int]:
    """Pages before notebooks and configurations, code last; lines in order."""
    file, _, line = place.rpartition(":")
    return file.startswith("nemo_rl_ref/"), not file.endswith(".md"), file, int(line)


def _alike(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b).ratio()


def _overlap(a: Iterable[str], b: Iterable[str]) -> float:
    """The share of names that two sets have in common; 1 if both are empty."""
    a, b = set(a) - {"self"}, set(b) - {"self"}
    return len(a & b) / len(a | b) if a | b else 1.0


def _best(name: str, candidates: Iterable[str], score: Callable[[str, str], float]) -> str | None:
    """The candidate that is most probably the new name, or None."""
    scored = max(((score(name, other), other) for other in candidates), default=(0.0, ""))
    return scored[1] if scored[0] >= LIKELY else None


def _contents(entry: Facts) -> list[str]:
    """The names inside a symbol: fields and methods, or arguments."""
    if entry["kind"] == "function":
        return re.findall(r"(?<![=\w.'\"])[A-Za-z_]\w*(?=[,=)])", entry["signature"])
    return [*entry["fields"], *(name for name in entry["methods"] if name[:2] != "__")]


def _compare_symbols(
    old: Mapping[str, Facts], new: Mapping[str, Facts]
) -> tuple[list[Change], dict[str, str]]:
    """The changes of functions and classes, and where those are now that are elsewhere."""
    before, after = old["manifest.json"]["symbols"], new["manifest.json"]["symbols"]
    hashes, hashes_now = old["sources.json"]["sources"], new["sources.json"]["sources"]
    fresh = [name for name in after if name not in before]

    def score(name: str, other: str) -> float:
        a, b = before[name], after[other]
        if a["kind"] != b["kind"]:
            return 0.0
        module, _, short = name.rpartition(".")
        module_now, _, short_now = other.rpartition(".")
        inside = _overlap(_contents(a), _contents(b))
        if short == short_now:
            return 1 + inside + _alike(module, module_now)
        if hashes.get(name) == hashes_now.get(other) and len(_contents(a)) > 1:
            return 0.99
        alike, many = _alike(short.lower(), short_now.lower()), len(_contents(a))
        if alike < 0.5:  # another word for the same thing has the same things in it
            return 0.9 * inside if many > 3 else 0.0
        beside = 0.25 * _alike(module, module_now)
        return 0.45 * alike + 0.3 * inside + beside if many > 1 else 0.75 * alike + beside

    changes, pairs = [], {}
    for name, entry in before.items():
        now = name if name in after else _best(name, fresh, score)
        if now is None:
            changes.append(Change("removed", "symbol", name))
            continue
        pairs[name] = now
        if now != name:
            same = name.rpartition(".")[2] == now.rpartition(".")[2]
            changes.append(Change("moved" if same else "renamed", "symbol", name, now))
        changes += _compare_symbol(name, entry, after[now])
        is_function, parts = entry["kind"] == "function", hashes_now.get(now, {})
        for part, value in hashes.get(name, {}).items():
            if parts.get(part, value) == value or (part == "body" and not is_function):
                continue  # what a class has besides methods are its fields
            what, path = ("symbol", name) if is_function else ("method", f"{name}.{part}")
            changes.append(Change("formula", what, path))
    known = {name.rpartition(".")[2] for name in before}
    for name in fresh:
        is_loss = any("Loss" in base for base in after[name].get("bases", ())) or "LossFn" in name
        if is_loss and ".algorithms." in name and name.rpartition(".")[2] not in known:
            if not name.endswith(("Config", "DataDict", "Wrapper")):
                changes.append(Change("new", "symbol", name, detail="a loss"))
    exports = new["manifest.json"]["exports"]
    for name, target in old["manifest.json"]["exports"].items():
        if name not in exports and name not in after:
            now = pairs.get(target, target)
            again = [export for export, to in exports.items() if to == now]
            likely = next(iter(again), now if now in after else None)
            changes.append(Change("moved" if likely else "removed", "export", name, likely))
    return changes, pairs


def _compare_symbol(name: str, old: Facts, new: Facts) -> list[Change]:
    """The changes inside a function or class that is still there."""
    if old["kind"] != new["kind"]:
        return [Change("signature", "symbol", name, detail=f"{old['kind']} -> {new['kind']}")]
    changes = []
    if old["kind"] == "function":
        if old["signature"] != new["signature"]:
            detail = f"{old['signature']} -> {new['signature']}"
            changes.append(Change("signature", "symbol", name, detail=detail))
        return changes
    if old["bases"] != new["bases"]:
        detail = "bases " + " -> ".join(", ".join(c["bases"]) or "unset" for c in (old, new))
        changes.append(Change("signature", "symbol", name, detail=detail))
    for part, what in (("fields", "field"), ("methods", "method")):
        fresh = [inner for inner in new[part] if inner not in old[part]]
        for inner, entry in old[part].items():
            path = f"{name}.{inner}"
            now = new[part].get(inner)
            if now is None:
                likely = _best(inner, fresh, lambda a, b: _alike(a, b) * 0.8)
                changes.append(Change("renamed" if likely else "removed", what, path, likely))
                continue
            for fact, kind in (
                ("signature", "signature"),
                ("type", "signature"),
                ("default", "default"),
            ):
                was, now_is = entry.get(fact), now.get(fact)
                if was != now_is and was != f"NotRequired[{now_is}]":
                    detail = f"{was or 'unset'} -> {now_is or 'unset'}"
                    changes.append(Change(kind, what, path, detail=detail))
        if part == "fields" and "Config" in name:
            changes += [
                Change("new", "field", f"{name}.{inner}", detail="a flag") for inner in fresh
            ]
    return changes


def _effective(configs: Mapping[str, Facts]) -> dict[str, Facts]:
    """Each configuration with what it takes over from the files under ``defaults``."""

    def resolve(name: str, above: tuple[str, ...] = ()) -> Facts:
        own = configs.get(name, {})
        parents = own.get("defaults") or []
        merged: Facts = {}
        for parent in [parents] if isinstance(parents, str) else parents:
            if isinstance(parent, str) and parent not in (*above, name):
                merged |= resolve(parent, (*above, name))
        return {k: v for k, v in (merged | own).items() if k != "defaults"}

    return {name: resolve(name) for name in configs}


def _compare_keys(old: Mapping[str, Facts], new: Mapping[str, Facts]) -> list[Change]:
    """The changes of configuration keys and of their values in the examples."""
    before, after = set(old["keys.json"]["keys"]), set(new["keys.json"]["keys"])
    configs = _effective(old["manifest.json"]["configs"])
    configs_now = _effective(new["manifest.json"]["configs"])
    gone: dict[str, list[str]] = {key: [] for key in sorted(before - after)}
    set_now: set[str] = set()
    values: dict[tuple[str, str, str], list[str]] = {}
    for file in sorted(configs.keys() & configs_now.keys()):
        own, now = configs[file], configs_now[file]
        set_now |= now.keys() - own.keys()
        for key in own.keys() - now.keys():
            if not any(other.startswith(f"{key}.") for other in now):
                gone.setdefault(key, []).append(file)
        for key in own.keys() & now.keys():
            if _plain(own[key]) != _plain(now[key]):
                values.setdefault((key, repr(own[key]), repr(now[key])), []).append(file)
    fresh = after - before
    changes = []
    targets = set()
    for key, files in gone.items():
        likely = _best(key, set_now if key in after else fresh | set_now, _score_key)
        where = "" if key not in after else f"no longer set in {_some(sorted(files))}"
        targets.add(likely)
        changes.append(Change("renamed" if likely else "removed", "key", key, likely, where))
    for (key, was, now), files in values.items():
        detail = f"{was} -> {now} in {_some(sorted(files))}"
        changes.append(Change("default", "key", key, detail=detail))
    for key in sorted(fresh - targets):
        if key.rpartition(".")[0] not in fresh:  # a new section is told once
            below = sum(other.startswith(f"{key}.") for other in fresh)
            detail = f"a section of {below} keys" if below else "a key"
            changes.append(Change("new", "key", key, detail=detail))
    return changes


def _plain(value: Any) -> Any:
    """A value without what only its spelling says: 5e-7 is a string in YAML 1.1."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _score_key(key: str, other: str) -> float:
    """How probably a key is now called `other`: the same name in a section beside it, or near it."""
    section, _, name = key.rpartition(".")
    section_now, _, name_now = other.rpartition(".")
    if name == name_now:
        near = section_now.startswith(section) or section.startswith(section_now)
        return 0.6 + 0.4 * _alike(section, section_now) if near else 0.0
    return _alike(name, name_now) * 0.8 if section == section_now else 0.0


def _compare_files(
    old: Mapping[str, Facts],
    new: Mapping[str, Facts],
    symbols: Mapping[str, str],
    renamed: Mapping[str, str],
) -> list[Change]:
    """The files that are gone: renamed by git's account, by their symbols' or by their name."""
    before, after = old["manifest.json"], new["manifest.json"]
    files = set(after["files"])
    moved_to: dict[str, Counter] = {}
    for name, now in symbols.items():
        there = moved_to.setdefault(before["symbols"][name]["file"], Counter())
        there[after["symbols"][now]["file"]] += 1
    fresh = files - set(before["files"])
    by_name: dict[str, list[str]] = {}
    for path in fresh:
        by_name.setdefault(path.rpartition("/")[2], []).append(path)
    changes = []
    for path in before["files"]:
        if path in files:
            continue
        same = by_name.get(path.rpartition("/")[2], [])
        likely = same[0] if len(same) == 1 else None
        if path in moved_to:
            likely = moved_to[path].most_common(1)[0][0]
        elif path in renamed and not path.endswith("__init__.py"):  # empty files are all alike
            likely = renamed[path]
        changes.append(Change("moved" if likely else "removed", "file", path, likely))
    return changes


def _some(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def as_json(changes: Iterable[Change]) -> list[dict[str, Any]]:
    """The changes as mappings, with whether each is used."""
    return [{**asdict(change), "used": change.used} for change in changes]


def as_markdown(
    changes: Sequence[Change], before: str, after: str, notes: Iterable[str] = (), most: int = 0
) -> str:
    """Write a report: what is used with its places, what is new near it, and the number of others.

    Args:
        changes: What `find_drift` returns.
        before: The earlier commit, as it is to be called.
        after: The later one.
        notes: What could not be read.
        most: The number of entries under a heading, 0 for all.

    Returns:
        The report.
    """
    used = [change for change in changes if change.used]
    near = [c for c in changes if c.kind == "new" and (c.uses or c.mirror or c.what == "symbol")]
    lines = [
        f"# NeMo RL from {before} to {after}",
        f"{len(used)} changes touch what this project uses, {len(changes) - len(used)} do not.",
    ]
    for kind, heading in KINDS.items():
        entries = _entries([change for change in used + near if change.kind == kind])
        if entries:
            left = len(entries) - most if most else 0
            shown = entries[:most] if left > 0 else entries
            lines += [f"## {heading} ({len(entries)})", "\n".join(shown)]
            lines += [f"… and {left} more."] if left > 0 else []
    counts = Counter(c.kind for c in changes if not c.used and c not in near)
    if counts:
        told = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind])
        lines += ["## Elsewhere in NeMo RL", f"{told}. `--json` lists them."]
    if notes := list(notes):
        lines += ["## Not read", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(lines) + "\n"


def _entries(changes: Iterable[Change]) -> list[str]:
    """A line for each name; the fields and methods of a class share one."""
    grouped: dict[tuple, list[Change]] = {}
    for change in changes:
        inside = change.what in ("field", "method")
        owner = change.name.rpartition(".")[0] if inside else ""
        grouped.setdefault((owner,) if inside else (change.name, change.detail), []).append(change)
    lines = []
    for (owner, *_), group in grouped.items():
        parts = []
        for change in group:
            name = change.name.rpartition(".")[2] if change.what in ("field", "method") else ""
            told = f" `{change.name}`" if not name else f" `{name}`"
            likely = " likely" if change.kind == "renamed" else ""
            told += f" ->{likely} `{change.new}`" if change.new else ""
            parts.append(told + (f" {change.detail}" if change.detail else ""))
        inside = group[0].what in ("field", "method")
        line = f"- `{owner}`:{';'.join(parts)}" if inside else f"- {group[0].what}{parts[0]}"
        where = [f"mirror {group[0].mirror}"] if group[0].mirror else []
        uses = list(dict.fromkeys(place for change in group for place in change.uses))
        where += [f"named in {_some(uses)}"] if uses and group[0].kind != "new" else []
        line += f" ({'; '.join(where)})" if where else ""
        lines.append(
            fill(line, 100, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        )
    return lines
