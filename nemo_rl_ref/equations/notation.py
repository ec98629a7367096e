# SPDX-License-Identifier: Apache-2.0
"""The notation of all pages: one letter for one thing.

A symbol is made here and nowhere else, with its LaTeX, its meaning and its unit. The tables of
symbols and the glossary's are made of this.
"""

from nemo_rl_ref.equations._symbols import (
    MODERATE,
    POSITIVE,
    PROBABILITIES,
    PROBABILITY,
    RATIO,
    REAL,
    SMALL,
    UNIT,
    index,
    indexed,
    size,
    symbol,
)

# ---- sizes and what runs over them ---------------------------------------------------------

Y = size("Y", r"|\mathcal{Y}|", "number of answers that are possible", (2, 7))
y = index("y", "y", "an answer")
y_other = index("y_other", "y'", "another answer")
T = size("T", "T", "number of tokens of an answer", (1, 2, 7))
t = index("t", "t", "position of a token in an answer, from 1")
u = index("u", "u", "position of a later token")
G = size("G", "G", "answers in a group, for one prompt (or in a batch, where so noted)", (2, 3, 8))
i = index("i", "i", "an answer of a group")
j = index("j", "j", "another answer of the group")
N = size("N", "N", "number of samples or pairs", (1, 4))
n = index("n", "n", "a sample or a pair")
V = size("V", r"|\mathcal{V}|", "number of tokens in the vocabulary", (2, 5))
v = index("v", "v", "a token of the vocabulary")

# ---- policies -------------------------------------------------------------------------------

pi = indexed(
    "pi",
    r"\pi_\theta(#1 \mid x)",
    "probability of answer $y$ under the policy",
    PROBABILITIES,
    ("Y",),
)
ref = indexed(
    "ref",
    r"\pi_{\mathrm{ref}}(#1 \mid x)",
    "probability of answer $y$ under the reference policy",
    PROBABILITIES,
    ("Y",),
)
old = indexed(
    "old",
    r"\pi_{\mathrm{old}}(#1 \mid x)",
    "probability of answer $y$ under the policy that the update began from",
    PROBABILITIES,
    ("Y",),
)
pi_w = symbol(
    "pi_w",
    r"\pi_\theta(y_w \mid x)",
    "probability of the chosen answer under the policy",
    PROBABILITY,
)
pi_l = symbol(
    "pi_l",
    r"\pi_\theta(y_l \mid x)",
    "probability of the rejected answer under the policy",
    PROBABILITY,
)
ref_w = symbol(
    "ref_w",
    r"\pi_{\mathrm{ref}}(y_w \mid x)",
    "probability of the chosen answer under the reference policy",
    PROBABILITY,
)
ref_l = symbol(
    "ref_l",
    r"\pi_{\mathrm{ref}}(y_l \mid x)",
    "probability of the rejected answer under the reference policy",
    PROBABILITY,
)

# ---- rewards, advantages, coefficients -------------------------------------------------------

R = indexed("R", r"r(x, #1)", "reward of answer $y$", MODERATE, ("Y",))
beta = symbol("beta", r"\beta", "strength of the KL penalty, in units of reward per nat", POSITIVE)
m = symbol(
    "m",
    "m",
    "margin of a pair: how much more the policy prefers the chosen answer than the reference does, "
    "times $\\beta$",
    REAL,
)
h_w = symbol("h_w", "h_w", "log-ratio of the chosen answer to the reference, in nats", REAL)
h_l = symbol("h_l", "h_l", "log-ratio of the rejected answer to the reference, in nats", REAL)
rewards = indexed("rewards", "r_{#1}", "reward of answer $i$ of a group", MODERATE, ("G",))
rho = symbol(
    "rho",
    r"\rho",
    "importance ratio of a token: its probability under the policy over that under the policy that "
    "the update began from",
    RATIO,
)
A = symbol("A", "A", "advantage: how much better than expected, in units of reward", REAL)
eps = symbol("eps", r"\varepsilon", "clipping range of the importance ratio", SMALL)
gamma = symbol("gamma", r"\gamma", "discount factor, from 0 to 1", UNIT)
lam = symbol("lam", r"\lambda", "decay of generalized advantage estimation, from 0 to 1", UNIT)
