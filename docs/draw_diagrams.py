# SPDX-License-Identifier: Apache-2.0
"""The diagrams of the site, drawn by code.

    python docs/draw_diagrams.py    # writes docs/_static/diagrams/*.svg

Each is 360 units wide with letters of at least 11, so that they stay legible on a phone. There is no
ground, and the site inverts them in the dark. A test compares the files with what this draws.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent / "_static" / "diagrams"

WIDTH = 360
STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #1b1f23; text-anchor: middle; }
  .small { font-size: 11px; }
  .bold { font-weight: 600; }
  .box { fill: none; stroke: #57606a; stroke-width: 1.2; }
  .blue { stroke: #0072B2; stroke-width: 2; }
  .red { stroke: #D55E00; stroke-width: 2; stroke-dasharray: 5 2; }
  .green { stroke: #007A5A; stroke-width: 2; }
  .arrow { fill: none; stroke: #57606a; stroke-width: 1.4; marker-end: url(#head); }
"""
HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="#57606a"/></marker></defs>'
)


class Diagram:
    """Boxes, arrows and words at coordinates, from the top left.

    Args:
        height: Height in units; the width is always 360.
        about: What it shows, for those who cannot see it.
    """

    def __init__(self, height: int, about: str):
        self.height, self.about, self.parts = height, about, []

    def text(self, x: float, y: float, words: str, kind: str = "") -> None:
        """Write a line, centered at ``x``. ``_{w}`` and ``^{w}`` are set low and high."""

        def move(found: re.Match[str]) -> str:
            down = 3 if found[1] == "_" else -4
            back = f'<tspan dy="{-down}">\u200b</tspan>'
            return f'<tspan dy="{down}" font-size="80%">{found[2]}</tspan>{back}'

        shown = re.sub(r"([_^])\{(.*?)\}", move, escape(words))
        self.parts.append(f'<text class="{kind}" x="{x:g}" y="{y:g}">{shown}</text>')

    def box(self, x: float, y: float, width: float, words: str, kind: str = "") -> None:
        """Draw a box around lines of words; ``x`` is its middle and ``y`` its upper edge."""
        lines = words.split("\n")
        height = self.tall(words)
        self.parts.append(
            f'<rect class="box {kind}" x="{x - width / 2:g}" y="{y:g}" width="{width:g}" '
            f'height="{height:g}" rx="5"/>'
        )
        for number, line in enumerate(lines):
            self.text(x, y + 17 + 15 * number, line, "bold" if number == 0 and lines[1:] else "")

    @staticmethod
    def tall(words: str) -> int:
        """Height of a box with these words."""
        return 12 + 15 * len(words.split("\n"))

    def arrow(self, *points: tuple[float, float]) -> None:
        """Draw an arrow through points."""
        path = "L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path class="arrow" d="M{path}"/>')

    def svg(self) -> str:
        """The picture."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" '
                f'width="{WIDTH}" height="{self.height}" role="img" '
                f'aria-label="{escape(self.about)}">',
                f"<style>{STYLE}</style>{HEAD}",
                *self.parts,
                "</svg>\n",
            ]
        )


def dpo() -> Diagram:
    """From a pair to DPO's loss."""
    d = Diagram(
        352,
        "A prompt has a chosen and a rejected response. Policy and reference policy give each a "
        "log-probability; their difference is a log-ratio; the difference of the two log-ratios is "
        "the margin; the loss is minus log sigma of beta times the margin.",
    )
    d.box(180, 6, 100, "prompt x")
    for x, name, letter, kind in ((95, "chosen", "w", "blue"), (265, "rejected", "l", "red")):
        d.arrow((180 + (x - 180) / 5, 33), (x, 56))
        d.box(x, 58, 144, f"{name} response y_{{{letter}}}", kind)
        for side, policy in ((-38, "θ"), (38, "ref")):
            d.arrow((x + side, 85), (x + side, 106))
            d.box(x + side, 108, 70, f"log π_{{{policy}}}")
            d.arrow((x + side, 135), (x + side / 3, 160))
        d.box(x, 162, 150, f"log-ratio h_{{{letter}}}\nlog π_{{θ}} − log π_{{ref}}", kind)
        d.arrow((x, 204), (180 + (x - 180) / 4, 230))
    d.box(180, 232, 130, "margin h_{w} − h_{l}")
    d.arrow((180, 259), (180, 282))
    d.box(180, 284, 180, "loss\n−log σ(β (h_{w} − h_{l}))", "green")
    d.text(180, 344, "mean over the pairs of the global batch", "small")
    return d


def grpo() -> Diagram:
    """One GRPO step as a loop."""
    d = Diagram(
        300,
        "The loop of a GRPO step: prompts; G responses to each by the policy; a reward for each; "
        "advantages, the reward less the mean of the prompt's group; the clipped loss; an update; "
        "and the next step starts with the new policy.",
    )
    left, right, width = 92, 268, 160
    d.box(left, 8, width, "1 prompts\nfrom the training data")
    d.box(right, 8, width, "2 responses\nG for each, by π_{θ}", "blue")
    d.box(right, 104, width, "3 rewards\nby the environment")
    d.box(right, 200, width, "4 advantages\nreward − group mean", "green")
    d.box(left, 200, width, "5 loss\nratio to π_{old}, clipped")
    d.box(left, 104, width, "6 update of π_{θ}\none or several a step", "blue")
    d.arrow((172, 29), (186, 29))
    d.arrow((right, 50), (right, 102))
    d.arrow((right, 146), (right, 198))
    d.arrow((188, 221), (174, 221))
    d.arrow((left, 198), (left, 148))
    d.arrow((left, 102), (left, 52))
    d.text(180, 272, "π_{old} is π_{θ} as it was when the responses were sampled.", "small")
    d.text(180, 290, "A group whose rewards are all equal has no advantage.", "small")
    return d


def batch() -> Diagram:
    """From a record to the terms of the loss."""
    d = Diagram(
        380,
        "A record becomes messages, the chat template makes tokens of them, the token mask is 1 for "
        "the tokens of the response, and the log-probability of each token comes from the logits "
        "one place before it.",
    )
    d.box(180, 6, 330, 'record\n{"input": "2+3=", "output": "5"}')
    d.arrow((180, 48), (180, 66))
    d.box(95, 68, 150, "user\n2+3=")
    d.box(265, 68, 150, "assistant\n5", "blue")
    d.arrow((180, 112), (180, 140))
    d.text(252, 130, "chat template", "small")
    tokens = ("<s>", "2", "+", "3", "=", "5", "</s>")
    step = 48
    for name, y in (
        ("token_mask", 212),
        ("logits at a token score the next token", 262),
    ):
        d.text(180, y, name, "bold")
    d.text(180, 156, "input_ids", "bold")
    for place, token in enumerate(tokens):
        x = 36 + step * place
        response = place >= 5
        d.box(x, 164, 42, token, "blue" if response else "")
        d.text(x, 231, "1" if response else "0", "bold" if response else "")
        if place + 1 < len(tokens):
            d.box(x, 272, 42, token)
            d.arrow((x, 299), (x + step - 8, 342))
        if place:
            kind = "blue" if response else ""
            d.box(x, 344, 42, token, kind)
    d.text(36, 360, "not", "small")
    d.text(36, 373, "predicted", "small")
    return d


def sums() -> Diagram:
    """How micro-batches and ranks add up to the batch."""
    d = Diagram(
        318,
        "A global batch of 10 response tokens lies on two ranks, in two micro-batches each. Every "
        "micro-batch sums its tokens' losses and divides by the 10 of the whole batch, so the sum "
        "over micro-batches and ranks is the mean over the batch.",
    )
    d.box(180, 6, 250, "global batch: 10 response tokens")
    for x, rank, counts in ((92, 0, (4, 1)), (268, 1, (2, 3))):
        d.arrow((180 + (x - 180) / 2, 33), (x, 52))
        d.text(x, 68, f"rank {rank}", "bold")
        for place, count in enumerate(counts):
            at = x - 42 + 84 * place
            d.box(at, 78, 78, f"{count} token{'s' * (count > 1)}", "blue")
            d.arrow((at, 105), (at, 128))
            d.box(at, 130, 78, "Σ loss\n÷ 10")
            d.arrow((at, 172), (x + (at - x) / 3, 196))
        d.box(x, 198, 150, "sum over micro-batches")
        d.arrow((x, 225), (180 + (x - 180) / 3, 248))
    d.box(180, 250, 240, "sum over ranks\n= mean over the 10 tokens", "green")
    d.text(180, 310, "global_valid_toks = 10 on every rank: one count for all", "small")
    return d


def workers() -> Diagram:
    """Where a loss of one's own runs."""
    d = Diagram(
        330,
        "The driver builds the loss and pickles it: by the name of its module and class, and its "
        "attributes. Each Ray worker imports that module, calls the loss on its micro-batches, and "
        "returns metrics, which the driver combines.",
    )
    d.box(180, 6, 300, "driver: your launcher\nloss_fn = MyLossFn(config)", "blue")
    d.arrow((180, 48), (180, 84))
    d.text(262, 70, "Ray: cloudpickle", "small")
    d.box(180, 86, 300, "what is sent\nmy_losses.MyLossFn, a name, and its attributes")
    for x in (92, 268):
        d.arrow((180 + (x - 180) / 2, 128), (x, 152))
        d.box(x, 154, 164, "worker\nimport my_losses\nloss_fn(logprobs, …)", "green")
        d.arrow((x, 211), (180 + (x - 180) / 2, 250))
    d.text(180, 236, "metrics", "small")
    d.box(180, 252, 300, "driver\ncombines the metrics of all workers")
    d.text(180, 316, "So the module must be importable on every node.", "small")
    return d


def softmax() -> Diagram:
    """How the online softmax merges."""
    d = Diagram(
        296,
        "The logits of a row lie in four tiles. Each tile keeps its largest logit m and the sum s of "
        "exp of logit minus m. Two pairs merge into the larger m and the sum of both s, each scaled "
        "by exp of its m minus the larger. At the end log of the sum over all is m plus log s.",
    )
    d.text(180, 18, "logits of one row, in tiles", "bold")
    for place in range(4):
        x = 48 + 88 * place
        d.box(x, 28, 76, f"tile {place + 1}", "blue")
        d.arrow((x, 55), (x, 72))
        d.box(x, 74, 76, f"m_{{{place + 1}}}, s_{{{place + 1}}}")
        middle = 92 if place < 2 else 268
        d.arrow((x, 101), (middle + (x - middle) / 3, 130))
    for x, names in ((92, ("1", "2")), (268, ("3", "4"))):
        a, b = names
        d.box(
            x,
            132,
            164,
            f"merge\nm = max(m_{{{a}}}, m_{{{b}}})\ns = s_{{{a}}}e^{{m{a}−m}} + s_{{{b}}}e^{{m{b}−m}}",
        )
        d.arrow((x, 189), (180 + (x - 180) / 3, 216))
    d.box(180, 218, 200, "merge again\nlog Σ e^{z} = m + log s", "green")
    d.text(180, 284, "In any order the result is the same, but for rounding.", "small")
    return d


def theory() -> Diagram:
    """From the KL-regularized optimum to the algorithms."""
    d = Diagram(
        372,
        "A map. At the top: maximize the expected reward less beta times the KL divergence from the "
        "reference policy. Its optimum is the reference policy times e to the reward over beta. "
        "Solved for the reward and put into a model of preferences it gives DPO, and IPO, KTO and "
        "SimPO beside it. Followed by its gradient it gives REINFORCE, then PPO with clipping and a "
        "critic, then GRPO with groups, and Dr. GRPO, DAPO, GSPO and CISPO.",
    )
    d.box(180, 6, 320, "one objective\nmax E[r] − β KL(π_{θ} ‖ π_{ref})", "green")
    d.arrow((110, 48), (92, 84))
    d.arrow((250, 48), (268, 84))
    d.text(64, 70, "its optimum", "small")
    d.text(306, 70, "its gradient", "small")
    d.box(92, 86, 164, "π* ∝ π_{ref} e^{r/β}\nsolve it for r")
    d.box(268, 86, 164, "REINFORCE\nE[(r − b) ∇ log π_{θ}]")
    d.arrow((92, 128), (92, 164))
    d.arrow((268, 128), (268, 164))
    d.box(92, 166, 164, "DPO\nlabels: Bradley–Terry", "blue")
    d.box(268, 166, 164, "PPO\nclipped ratio, critic", "red")
    d.arrow((92, 208), (92, 244))
    d.arrow((268, 208), (268, 244))
    d.text(48, 230, "another loss", "small")
    d.text(268 + 66, 230, "no critic", "small")
    d.box(92, 246, 164, "IPO, KTO, SimPO, …\nthe other pair losses", "blue")
    d.box(268, 246, 164, "GRPO\ngroups for a baseline", "red")
    d.arrow((268, 288), (268, 318))
    d.box(268, 320, 164, "Dr. GRPO, DAPO,\nGSPO, CISPO", "red")
    d.text(92, 336, "from preference pairs", "small")
    d.text(92, 352, "that are given", "small")
    return d


DIAGRAMS: dict[str, Callable[[], Diagram]] = {
    "dpo": dpo,
    "grpo": grpo,
    "batch": batch,
    "sums": sums,
    "workers": workers,
    "softmax": softmax,
    "theory": theory,
}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, make in DIAGRAMS.items():
        (FOLDER / f"{name}.svg").write_text(make().svg(), "utf-8")
        print(FOLDER.name, name)
