# SPDX-License-Identifier: Apache-2.0
"""The result of a check: printed, as HTML, as JUnit XML."""

from __future__ import annotations

import html
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from nemo_rl_ref.contract._batches import Batch
from nemo_rl_ref.contract._causes import Cause, causes_of
from nemo_rl_ref.files.whole import replacing

_MARKS = {"ok": "green", "failed": "red", "not applicable": "yellow"}


@dataclass(frozen=True)
class Failure:
    """One way in which a promise is broken.

    Attributes:
        problem: what was found.
        batch: the smallest batch that shows it; None where no batch is needed to show it.
        shown: the batch as text.
        probe: which probe found it.
        base: NeMo RL's loss that it comes from, which has it too; or empty.
    """

    problem: str
    batch: Batch | None = None
    shown: str = ""
    probe: str = ""
    base: str = ""


@dataclass(frozen=True)
class Entry:
    """What was found out about one promise.

    Attributes:
        name: a short name, for example ``"micro-batches"``.
        promise: what is promised, in words.
        status: ``"ok"``, ``"failed"`` or ``"not applicable"``.
        measured: what was measured, one phrase a probe.
        failures: in which ways it is broken; empty unless the status is ``"failed"``.
        seconds: how long it took.
    """

    name: str
    promise: str
    status: str
    measured: str
    failures: tuple[Failure, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, repr=False)
class Report:
    """Which promises a loss keeps. Prints as a table, in a notebook as HTML.

    Attributes:
        loss: name of the loss.
        entries: one entry a promise, in a fixed order.

    Example:
        >>> report = Report(
        ...     "MyLossFn", (Entry("masks", "masked tokens get no gradient", "failed", "2e-3"),)
        ... )
        >>> report
        <Report on MyLossFn: broken: masks>
        >>> report["masks"].measured
        '2e-3'
    """

    loss: str
    entries: tuple[Entry, ...]

    @property
    def ok(self) -> bool:
        """Whether no promise is broken. A promise that is not applicable is not broken."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the broken promises."""
        return tuple(entry.name for entry in self.entries if entry.status == "failed")

    @property
    def own(self) -> tuple[str, ...]:
        """Names of the promises that the author has broken: NeMo RL's loss below keeps them."""
        return tuple(e.name for e in self.entries if any(not f.base for f in e.failures))

    @property
    def causes(self) -> list[Cause]:
        """Why promises are broken, one entry a cause, the author's own first."""
        return causes_of(self.entries)

    def summary(self) -> str:
        """Say in a few lines what is broken, why, and what to write instead."""
        kept = [entry.name for entry in self.entries if entry.status == "ok"]
        absent = [entry.name for entry in self.entries if entry.status == "not applicable"]
        lines = [self.title, *(f"{n}. {cause}" for n, cause in enumerate(self.causes, 1))]
        for word, names in (("Kept", kept), ("Not applicable", absent)):
            lines += [f"{word}: {', '.join(names)}."] if names else []
        return "\n".join(lines)

    def __getitem__(self, name: str) -> Entry:
        """Returns the entry of a promise.

        Raises:
            KeyError: if there is no promise of that name.
        """
        for entry in self.entries:
            if entry.name == name:
                return entry
        names = [entry.name for entry in self.entries]
        raise KeyError(f"name is {name!r}, expected one of {names}")

    def __repr__(self) -> str:
        broken = f"broken: {', '.join(self.failed)}" if self.failed else "ok"
        return f"<Report on {self.loss}: {broken}>"

    def __str__(self) -> str:
        """Returns the table as plain text, 100 columns wide. Needs rich."""
        from rich.console import Console

        text = io.StringIO()
        console = Console(file=text, width=100, color_system=None, force_jupyter=False)
        console.print(self)
        return text.getvalue().rstrip("\n")

    def __rich__(self) -> Any:
        """Returns the table that rich prints."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title), title_justify="left", show_lines=True)
        table.add_column("promise", min_width=10)
        table.add_column("status", min_width=6)
        table.add_column("what was measured", overflow="fold", ratio=1)
        for entry in self.entries:
            status = Text(entry.status, style=_MARKS[entry.status])
            # Text, because rich would read the brackets of a list as styles.
            table.add_row(Text(entry.name), status, Text(_details(entry)))
        return table

    @property
    def title(self) -> str:
        """One line: the loss and how many promises it keeps."""
        kept = sum(entry.status == "ok" for entry in self.entries)
        applicable = sum(entry.status != "not applicable" for entry in self.entries)
        return f"{self.loss}: {kept} of {applicable} promises kept"

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        rows = []
        for entry in self.entries:
            cell = html.escape(entry.measured)
            for failure in entry.failures:
                problem = html.escape(failure.problem + _as_in(failure))
                cell += f"<br><strong>{problem}</strong>"
                if failure.shown:
                    cell += (
                        "<details><summary>smallest batch</summary>"
                        f"<pre>{html.escape(failure.shown)}</pre></details>"
                    )
            name = f'<span title="{html.escape(entry.promise)}">{html.escape(entry.name)}</span>'
            rows.append(f"<tr><td>{name}</td><td>{entry.status}</td><td>{cell}</td></tr>")
        return (
            f"<table><caption>{html.escape(self.title)}</caption>"
            "<thead><tr><th>promise</th><th>status</th><th>what was measured</th></tr></thead>"
            f"<tbody>{''.join(rows)}</tbody></table>"
        )

    def to_junit(self, path: str | Path) -> None:
        """Writes the report as JUnit XML, one test case a promise.

        The file is there as a whole or not at all.

        Args:
            path: of the file; its folder must exist.

        Raises:
            FileNotFoundError: if the folder does not exist.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"path is {str(path)!r}: there is no folder {path.parent}")
        suite = ElementTree.Element(
            "testsuite",
            name=_xml(self.loss),
            tests=str(len(self.entries)),
            failures=str(len(self.failed)),
            errors="0",
            skipped=str(sum(entry.status == "not applicable" for entry in self.entries)),
            time=f"{sum(entry.seconds for entry in self.entries):.3f}",
        )
        for entry in self.entries:
            case = ElementTree.SubElement(
                suite,
                "testcase",
                classname=_xml(self.loss),
                name=entry.name,
                time=f"{entry.seconds:.3f}",
            )
            if entry.status == "failed":
                message = "; ".join(failure.problem for failure in entry.failures)
                failure = ElementTree.SubElement(case, "failure", message=_xml(message))
                failure.text = _xml(_details(entry))
            elif entry.status == "not applicable":
                ElementTree.SubElement(case, "skipped", message=_xml(entry.measured))
            else:
                ElementTree.SubElement(case, "system-out").text = _xml(entry.measured)
        content = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
        with replacing(path) as temporary:
            temporary.write_bytes(content)


def _details(entry: Entry) -> str:
    lines = [entry.measured] if entry.measured else []
    for failure in entry.failures:
        lines.append(f"BROKEN{_as_in(failure)}: {failure.problem}")
        if failure.shown:
            lines += ["smallest batch: " + failure.shown.replace("\n", "\n  ")]
    return "\n".join(lines)


def _as_in(failure: Failure) -> str:
    return f" (as in NeMo RL's {failure.base})" if failure.base else ""


def _xml(text: str) -> str:
    """Replaces the characters that XML 1.0 cannot hold."""
    return re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
