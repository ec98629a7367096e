# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Mathematical foundations: the checks
#
# Theorems of the page
# [Mathematical Foundations](../docs/advanced/algorithm-development/mathematical-foundations.md),
# verified by listing every answer of a world small enough for that. Nothing is sampled, and
# everything is float64.

# %%
#| label: foundations-imports
import torch

from nemo_rl_ref.equations.world import World, ascend, expect, gradient, groups, kl, variance

# %% [markdown]
# ## Notation and the token-level MDP

# %%
#| label: notation-world
#| num: notation-answers = {len(world)}
#| num: notation-prefixes = {world.states}
world = World(vocab=3, horizon=3, end=0)  # tokens 0, 1, 2; token 0 ends an answer
policy = world.policy(seed=1)  # logits: one row for each prefix, one column for each token
probability = world.logprob(policy).exp()

for tokens, mask, p in list(zip(world.answers, world.mask, probability, strict=True))[:6]:
    print(f"{tokens[mask.bool()].tolist()!s:<10} {p:.4f}")
print(f"... {len(world)} answers in all, from {world.states} prefixes, {probability.sum():.4f}")

# %%
#| label: notation-batch
from nemo_rl_ref.algorithms.loss import NLLLossFn

PROMPT = torch.tensor([[2, 1]])  # two tokens; the longest answers here have three
rows = [0, 1, 4]  # three of the answers, of one, two and three tokens
batch = {
    "input_ids": torch.cat([PROMPT.expand(3, -1), world.answers[rows]], dim=1),  # (B, S)
    "token_mask": torch.cat([torch.zeros(3, 2), world.mask[rows]], dim=1),  # (B, S)
    "sample_mask": torch.ones(3, dtype=torch.float64),  # (B,)
}
# Of S tokens, S - 1 are predicted. The first is a prompt token, whatever its value: masked.
of_prompt = torch.full((3, 1), -1.0, dtype=torch.float64)
next_token_logprobs = torch.cat([of_prompt, world.token_logprobs(policy)[rows]], dim=1)

tokens = batch["token_mask"][:, 1:].sum()
loss, _ = NLLLossFn()(next_token_logprobs, batch, None, tokens)
batch_error = abs(loss * tokens + world.logprob(policy)[rows].sum()).item()
assert batch_error < 1e-6  # the loss adds 1e-8 to the count
print(batch["input_ids"], batch["token_mask"].int(), sep="\n")

# %%
#| label: thm-factorization
#| num: factorization-total-error = {total_error:.0e}
#| num: factorization-conditional-error = {conditional_error:.0e}
total_error = conditional_error = 0.0
for end in (None, 0):
    small = World(vocab=3, horizon=4, end=end)
    for seed in range(30):
        logits = small.policy(scale=10 ** (seed % 3 - 1), seed=seed)
        p = small.logprob(logits).exp()[:, None] * small.mask  # (Y, T): p(y) at each of its tokens
        total_error = max(total_error, abs(p[:, 0].sum() - 1).item())
        # How probable is it that the answer goes through a prefix, and on with a token?
        on = torch.zeros_like(logits).index_put((small.prefixes, small.answers), p, True)
        given = on / on.sum(-1, keepdim=True)
        reached = on.sum(-1) > 1e-12
        off = (given - logits.softmax(-1))[reached]
        conditional_error = max(conditional_error, off.abs().max().item())
assert total_error < 1e-12 and conditional_error < 1e-9

# %%
#| label: thm-entropy
#| num: entropy-chain-error = {chain_error:.0e}
#| num: entropy-metric-error = {metric_error:.0e}
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn

log_p, engine = world.token_logprobs(policy), world.policy(seed=2)
log_mu = world.token_logprobs(engine)
of_prefix = torch.distributions.Categorical(logits=policy).entropy()  # of the next token
visited = (of_prefix[world.prefixes] * world.mask).sum(-1)  # added up along each answer

of_answer = expect(world.logprob(policy), -world.logprob(policy))
chain_error = abs(of_answer - expect(world.logprob(policy), visited)).item()

# NeMo RL's metric for answers of another engine μ, each weighted with its probability.
column = torch.zeros(len(world), 1, dtype=torch.float64)
stored = {"advantages": world.mask, "prev_logprobs": log_mu, "generation_logprobs": log_mu}
stored = {name: torch.cat([column, value], dim=1) for name, value in stored.items()}
masks = {"token_mask": stored["advantages"], "sample_mask": world.logprob(engine).exp()}
loss_fn = ClippedPGLossFn(ClippedPGLossConfig(reference_policy_kl_penalty=0.0))
one = torch.tensor(1.0, dtype=torch.float64)
metric = loss_fn(log_p, stored | masks, one, one)[1]["approx_entropy"]
metric_error = abs(metric - expect(world.logprob(engine), visited)).item()
assert chain_error < 1e-12 and metric_error < 1e-6

# %%
#| label: thm-values
#| num: value-error = {max(mean_error, step_error):.0e}
chain = World(vocab=3, horizon=3)
logits = chain.policy(seed=3)
reward = torch.randn(len(chain), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

p = chain.logprob(logits).exp()[:, None].expand(-1, 3)
table = torch.zeros(chain.states, 3, dtype=torch.float64)
places = (chain.prefixes, chain.answers)
reach = table.index_put(places, p, accumulate=True)
gained = table.index_put(places, p * reward[:, None], accumulate=True)
q = gained / reach  # Q(s, v): mean reward of the answers that go through s and on with v
value = gained.sum(-1) / reach.sum(-1)  # V(s): of those that go through s

mean_error = ((logits.softmax(-1) * q).sum(-1) - value).abs().max().item()
step_error = (q[places][:, :-1] - value[chain.prefixes][:, 1:]).abs().max().item()
advantage = q - value[:, None]
advantage_mean = (logits.softmax(-1) * advantage).sum(-1).abs().max().item()
assert max(mean_error, step_error, advantage_mean) < 1e-12

# %% [markdown]
# ## SFT as maximum likelihood

# %%
#| label: thm-sft-forward-kl
#| num: sft-rivals = {len(rivals)}
#| num: sft-gap-error = {gap_error:.0e}
#| num: sft-fit-error = {fit_error:.0e}
import torch

from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn, NLLLossFn
from nemo_rl_ref.equations.world import World, ascend, expect, gradient, groups, kl, variance

world = World(vocab=3, horizon=3)
log_data = world.logprob(world.policy(scale=1.5, seed=4)).detach()
entropy = expect(log_data, -log_data)


def cross_entropy(logits):
    return expect(log_data, -world.logprob(logits))


rivals = [world.policy(scale=10 ** (seed % 3 - 1), seed=seed) for seed in range(300)]
gap_error = max(
    abs(cross_entropy(rival) - entropy - kl(log_data, world.logprob(rival))).item()
    for rival in rivals
)
fitted = ascend(lambda logits: -cross_entropy(logits), world.policy(seed=5))
fit_error = (world.logprob(fitted).exp() - log_data.exp()).abs().max().item()
least_error = abs(cross_entropy(fitted) - entropy).item()
assert gap_error < 1e-12 and fit_error < 1e-6 and least_error < 1e-10

# %%
#| label: thm-sft-gradient
#| num: sft-gradient-error = {sft_gradient_error:.0e}
logits = world.policy(seed=6)
slope = gradient(cross_entropy(logits), logits)

p = log_data.exp()[:, None].expand(-1, 3)
table = torch.zeros_like(logits)
on = table.index_put((world.prefixes, world.answers), p, accumulate=True)
visits = on.sum(-1, keepdim=True)  # how often the data comes through a prefix
expected = visits * (logits.softmax(-1) - on / visits)
sft_gradient_error = (slope - expected).abs().max().item()

# Data in which no answer begins with token 2: the prefixes of those answers get no gradient.
absent = world.answers[:, 0] == 2
log_some = log_data.masked_fill(absent, -torch.inf).log_softmax(0)
slope = gradient(-expect(log_some, world.logprob(logits)), logits)
never = world.prefixes[absent, 1:].unique()
assert (slope[never] == 0).all() and (slope != 0).any()
assert sft_gradient_error < 1e-12

# %%
#| label: thm-mass-covering
#| num: covering-q = {covering:.2f}
#| num: covering-outside = {outside:.2f}
#| num: seeking-q = {max(seeking, 1 - seeking):.3f}
#| num: seeking-other = {memoryless(seeking).exp()[[0, 3]].min():.0e}
pair = World(vocab=2, horizon=2)  # answers 00, 01, 10, 11
log_data = torch.tensor([0.49, 0.01, 0.01, 0.49], dtype=torch.float64).log()


def memoryless(q):
    """Log-probabilities of the answers when both tokens are 1 with probability q."""
    row = torch.stack([1 - q, q]).log()
    return pair.logprob(row.expand(pair.states, 2))


grid = torch.linspace(0.002, 0.998, 499, dtype=torch.float64)
forward = torch.stack([kl(log_data, memoryless(q)) for q in grid])  # KL(data || policy)
reverse = torch.stack([kl(memoryless(q), log_data) for q in grid])  # KL(policy || data)

covering, seeking = grid[forward.argmin()], grid[reverse.argmin()]
outside = memoryless(covering).exp()[[1, 2]].sum()
assert abs(covering - 0.5) < 1e-9 and min(seeking, 1 - seeking) < 0.05
low = (reverse[1:-1] < reverse[:-2]) & (reverse[1:-1] < reverse[2:])
assert low.sum() == 2  # two minima, one for each mode

# %%
#| label: fig-forward-reverse-kl
#| caption: A policy that draws both tokens alike, fitted to data that is `00` or `11` almost
#|   always. The forward divergence has one minimum, in the middle, and covers both answers. The
#|   reverse divergence has two, one near each end.
#| alt: Two panels over the probability of token 1. Above, the forward divergence, a bowl with its
#|   minimum at one half. Below, the reverse divergence, with a hill at one half and a minimum near
#|   each end.
from nemo_rl_ref.show.figures import LINES, panels

figure, axes = panels(2, height=2.1)
curves = [("forward", "KL(data ‖ policy)", forward), ("reverse", "KL(policy ‖ data)", reverse)]
for axis, line, (name, title, curve) in zip(axes, LINES, curves, strict=False):
    axis.plot(grid, curve, **(line | {"marker": ""}))
    axis.set_title(f"{name}: {title}, nats")
axes[-1].set_xlabel("probability of token 1");

# %%
#| label: thm-token-mean
#| num: share-error = {share_error:.0e}
#| num: nll-whole = {whole:.3f}
#| num: nll-averaged = {averaged:.3f}
#| num: nll-answers = {per_answer.mean():.3f}
world = World(vocab=3, horizon=4, end=0)
logits = world.policy(seed=7)
logprobs, lengths = world.token_logprobs(logits), world.mask.sum(-1)
zero = torch.zeros(len(world), 1, dtype=torch.float64)
token_mask = torch.cat([zero, world.mask], dim=1)


def nll(rows, tokens):
    data = {"token_mask": token_mask[rows], "sample_mask": torch.ones(len(rows))}
    return NLLLossFn()(logprobs[rows], data, None, tokens)[0]


every = torch.arange(len(world))
whole = nll(every, lengths.sum())
parts = every.split([3, 10, len(world) - 13])  # micro-batches of unequal size
shares = sum(nll(rows, lengths.sum()) for rows in parts)
averaged = sum(nll(rows, lengths[rows].sum()) for rows in parts) / len(parts)

per_answer = -world.logprob(logits) / lengths
weighted = (lengths / lengths.sum() * per_answer).sum()
share_error = abs(shares - whole).item()
assert share_error < 1e-12 and abs(weighted - whole) < 1e-8
assert abs(averaged - whole) > 0.01 and abs(per_answer.mean() - whole) > 0.01

# %% [markdown]
# ## The policy gradient

# %%
#| label: thm-policy-gradient
#| num: pg-error = {pg_error:.0e}
world = World(vocab=3, horizon=3)
policy = world.policy(seed=8)
reward = torch.randn(len(world), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def scores(logits):
    """Gradient of each answer's log-probability, (Y, states, V)."""
    return torch.autograd.functional.jacobian(world.logprob, logits)


log_p, score = world.logprob(policy), scores(policy)
exact = gradient(expect(log_p, reward), policy)  # autograd through the sum over all answers
estimate = expect(log_p, reward[:, None, None] * score)  # the theorem
score_error = expect(log_p, score).abs().max().item()
pg_error = (estimate - exact).abs().max().item()
assert pg_error < 1e-12 and score_error < 1e-12

# %%
#| label: thm-baseline
#| num: baseline-error = {baseline_error:.0e}
#| num: baseline-bias = {baseline_bias:.1f}
token_scores = torch.autograd.functional.jacobian(world.token_logprobs, policy)  # (Y, T, s, V)
random = torch.Generator().manual_seed(2)
baseline_error = 0.0
for scale in (0.1, 1.0, 100.0):
    at_prefix = scale * torch.randn(world.states, generator=random, dtype=torch.float64)
    # Token t's score is weighted by the reward less a number that knows the prefix, not the token.
    weights = reward[:, None] - at_prefix[world.prefixes]
    estimate = expect(log_p, torch.einsum("yt,ytsv->ysv", weights, token_scores))
    baseline_error = max(baseline_error, (estimate - exact).abs().max().item() / max(1, scale))

# A number that knows the token does not drop out.
at_token = torch.randn(world.states, world.vocab, generator=random, dtype=torch.float64)
weights = reward[:, None] - at_token[world.prefixes, world.answers]
wrong = expect(log_p, torch.einsum("yt,ytsv->ysv", weights, token_scores))
baseline_bias = (wrong - exact).norm() / exact.norm()
assert baseline_error < 1e-12 and baseline_bias > 0.1

# %%
#| label: thm-optimal-baseline
#| num: baseline-none-centered = {spread(5.0) / spread(centered):.2f}
#| num: baseline-sure-none = {sure_none:.4f}
#| num: baseline-sure-mean = {sure_mean:.3f}
#| num: baseline-best = {best:.2f}
#| num: baseline-average = {average:.2f}
#| num: baseline-none = {spread(0) / spread(best):.1f}
#| num: baseline-mean-reward = {spread(average) / spread(best):.3f}
reward_5 = reward + 5  # rewards that are all positive, as a rule


def spread(baseline):
    """Variance of one sample's gradient, added up over all logits."""
    return variance(log_p, (reward_5 - baseline)[:, None, None] * score).sum()


square = (score**2).sum((1, 2))
best = expect(log_p, reward_5 * square) / expect(log_p, square)
average = expect(log_p, reward_5)
offsets = torch.linspace(-3, 3, 61, dtype=torch.float64)
others = torch.stack([spread(best + offset) for offset in offsets])
parabola = spread(best) + offsets**2 * expect(log_p, square)
parabola_error = (others / parabola - 1).abs().max().item()
assert others.argmin() == 30 and parabola_error < 1e-12

# Without the 5; and two answers of which the better one is almost sure.
centered = expect(log_p, reward * square) / expect(log_p, square) + 5
sure = torch.tensor([0.9, 0.1], dtype=torch.float64).log()
sure_score = torch.eye(2, dtype=torch.float64) - sure.exp()  # of a softmax
sure_reward = torch.tensor([1.0, 0.0], dtype=torch.float64)
sure_none, sure_mean = (
    variance(sure, (sure_reward - b)[:, None] * sure_score).sum().item()
    for b in (0.0, expect(sure, sure_reward))
)
assert sure_none < sure_mean

# %%
#| label: thm-reward-to-go
#| num: rtg-error = {max(reached, means):.0e}
#| num: rtg-worlds = {len(ratios)}
#| num: rtg-lower = {lower}
#| num: rtg-median = {sorted(ratios)[len(ratios) // 2]:.2f}
#| num: rtg-worst = {max(ratios):.2f}
reached, means, ratios = 0.0, 0.0, []
for seed in range(60):
    logits = world.policy(seed=100 + seed)
    random = torch.Generator().manual_seed(seed)
    token_reward = torch.randn(world.states, 3, generator=random, dtype=torch.float64)
    r = token_reward[world.prefixes, world.answers]  # (Y, T)
    to_go = r.flip(-1).cumsum(-1).flip(-1)
    log_p = world.logprob(logits)
    s = torch.autograd.functional.jacobian(world.token_logprobs, logits)
    exact = gradient(expect(log_p, r.sum(-1)), logits)
    full = torch.einsum("y,ytsv->ysv", r.sum(-1), s)
    causal = torch.einsum("yt,ytsv->ysv", to_go, s)
    past = expect(log_p, r[:, 0, None, None] * s[:, 1:].sum(1))  # earlier reward, later scores
    reached = max(reached, past.abs().max().item())
    means = max(means, (expect(log_p, causal) - exact).abs().max().item())
    ratios.append((variance(log_p, causal).sum() / variance(log_p, full).sum()).item())
lower = sum(ratio < 1 for ratio in ratios)
assert reached < 1e-12 and means < 1e-12 and lower > 30

# %%
#| label: thm-importance-sampling
#| num: is-error = {stale_error:.0e}
stale_error = 0.0
for seed in range(50):
    policy = world.policy(seed=seed)
    stale = policy.detach() + 0.5 * world.policy(seed=1000 + seed).detach()
    log_p, log_old = world.logprob(policy), world.logprob(stale)
    rho = (log_p - log_old).exp()
    unweighted = expect(log_old, reward) - expect(log_p, reward)
    weighted = expect(log_old, rho * reward)  # the ratio carries the gradient, too
    slope = gradient(weighted, policy) - gradient(expect(log_p, reward), policy)
    found = max(abs(weighted - expect(log_p, reward)).item(), slope.abs().max().item())
    stale_error = max(stale_error, found)
assert stale_error < 1e-12 and abs(unweighted) > 0.01

# %%
#| label: thm-ratio-variance
#| num: is-growth-error = {growth_error:.0e}
#| num: is-one-token = {curves[-1, 0]:.2f}
#| num: is-eight-tokens = {curves[-1, -1]:.1f}
by_length = []
steps, drifts = range(1, 9), (0.1, 0.3, 0.5)
lines = [World(vocab=3, horizon=horizon) for horizon in steps]
for drift in drifts:  # both policies are the same after every prefix, logits `drift` apart
    for line in lines:
        before = torch.zeros(line.states, 3, dtype=torch.float64)
        after = before + drift * torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
        log_old = line.logprob(before)
        by_length.append(variance(log_old, (line.logprob(after) - log_old).exp()).item())
curves = torch.tensor(by_length, dtype=torch.float64).reshape(len(drifts), len(steps))
law = (1 + curves[:, :1]) ** torch.tensor(steps) - 1  # (1 + c)^T - 1
growth_error = (curves / law - 1).abs().max().item()
assert growth_error < 1e-10

# %%
#| label: fig-ratio-variance
#| caption: Variance of an answer's importance ratio against its length, an exact sum over all
#|   answers, for three distances between the two policies.
#| alt: Three rising curves on a logarithmic axis: the variance of the ratio against one to eight
#|   tokens. The larger the distance between the policies, the higher the curve and the faster its
#|   growth.
figure, (axis,) = panels(1, height=3.0)
for drift, style, curve in zip(drifts, LINES, curves, strict=False):
    axis.plot(steps, curve, label=f"logits {drift} apart", **style)
axis.set_yscale("log")
axis.set_title("variance of the ratio")
axis.set_xlabel("tokens of the answer")
axis.legend();

# %%
#| label: reinforce-pairs
loss_fn = ClippedPGLossFn(
    ClippedPGLossConfig(disable_ppo_ratio=True, reference_policy_kl_penalty=0.0)
)


def mean_gradient(world, reward, tokens=None):
    """Exact mean of the loss's gradient over all pairs of answers, and the gradient of J."""
    policy = world.policy(seed=9)
    log_p, members = world.logprob(policy), groups(world.logprob(policy), 2)[0]
    zero = torch.zeros(len(world), 1, dtype=torch.float64)
    column = torch.cat([zero, world.mask], dim=1)
    total = torch.zeros_like(policy)
    for pair in members:
        mask, advantage = column[pair], (reward[pair] - 0.3)[:, None]
        data = {"token_mask": mask, "sample_mask": torch.ones(2), "advantages": mask * advantage}
        data |= {"prev_logprobs": mask, "generation_logprobs": mask}  # not read for the loss
        count = mask.sum() if tokens is None else torch.tensor(tokens)
        loss, _ = loss_fn(world.token_logprobs(policy)[pair], data, torch.tensor(2.0), count)
        total += log_p[pair].sum().exp().detach() * gradient(loss, policy)
    return total, gradient(expect(log_p, reward), policy)


# %%
#| label: thm-reinforce-loss
#| num: reinforce-error = {reinforce_error:.0e}
#| num: reinforce-cosine = {cosine:.3f}
fixed = World(vocab=3, horizon=2)
mean, exact = mean_gradient(fixed, torch.linspace(-1, 1, len(fixed), dtype=torch.float64))
reinforce_error = (mean + exact / 2).abs().max().item()  # two tokens in every answer
ragged = World(vocab=3, horizon=2, end=0)
reward_2 = torch.linspace(-1, 1, len(ragged), dtype=torch.float64)
mean, exact = mean_gradient(ragged, reward_2)
cosine = -torch.cosine_similarity(mean.flatten(), exact.flatten(), dim=0).item()
mean, exact = mean_gradient(ragged, reward_2, tokens=2.0)  # a count that no answer changes
constant_error = (mean + exact).abs().max().item()
assert reinforce_error < 1e-7 and constant_error < 1e-7 and cosine < 0.9999

# %% [markdown]
# ## Reward under a KL penalty

# %%
#| label: kl-world
import torch

from nemo_rl_ref.equations.world import World, ascend, expect, kl, variance

BETA = 0.5
world = World(vocab=3, horizon=2)
reward = torch.randn(len(world), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
log_ref = world.logprob(world.policy(seed=1)).detach()


def regularized(log_p, beta=BETA):
    """Expected reward less β times the divergence from the reference."""
    return expect(log_p, reward) - beta * kl(log_p, log_ref)


def best(beta):
    """The best policy and the logarithm of its normalizer."""
    unnormalized = log_ref + reward / beta
    log_z = torch.logsumexp(unnormalized, dim=0)
    return unnormalized - log_z, log_z


print(f"{len(world)} answers, a policy is a table of {world.states} x {world.vocab} logits")

# %%
#| label: thm-kl-optimum
#| num: kl-ascent-error = {ascent_error:.0e}
#| num: kl-value-error = {value_error:.0e}
log_best, log_z = best(BETA)
found = ascend(lambda logits: regularized(world.logprob(logits)), world.policy(seed=2))
log_found = world.logprob(found)

ascent_error = (log_found.exp() - log_best.exp()).abs().max().item()
value_error = (regularized(log_found) - BETA * log_z).abs().item()
assert ascent_error < 1e-6 and value_error < 1e-12

# %%
#| label: thm-kl-gap
#| num: kl-rivals = {len(rivals)}
#| num: kl-gap-error = {gap_error:.0e}
# Any policy misses the optimum by exactly β KL(policy || best).
scales = (0.1, 1.0, 10.0)  # nearly uniform to nearly deterministic
rivals = [
    world.logprob(world.policy(scale, seed=n)).detach() for scale in scales for n in range(40)
]
gaps = torch.stack([BETA * log_z - regularized(rival) for rival in rivals])
divergences = torch.stack([kl(rival, log_best) for rival in rivals])

gap_error = (gaps - BETA * divergences).abs().max().item()
assert gap_error < 1e-12 and gaps.min() > 0

# %%
#| label: thm-kl-limits
# A strong penalty leaves the reference; a weak one leaves the answer with the largest reward.
strong, weak = best(1e4)[0], best(1e-3)[0]
assert kl(strong, log_ref) < 1e-8
assert weak.exp()[reward.argmax()] > 1 - 1e-12

# Near the reference the gain in reward is the reward's variance there, over β.
gain = expect(strong, reward) - expect(log_ref, reward)
limit_error = (1e4 * gain / variance(log_ref, reward) - 1).abs().item()
# The price of the sure answer is its surprise under the reference.
price_error = (kl(weak, log_ref) + log_ref[reward.argmax()]).abs().item()
assert limit_error < 1e-3 and price_error < 1e-9

# %%
#| label: fig-kl-frontier
#| alt: Expected reward over divergence from the reference. A concave curve of best policies rises
#|   from the reference, steeply at first, and flattens towards the largest reward. Points for three
#|   strengths lie on it. All other policies lie below it.
#| caption: Every policy of the little world lies below the curve of best policies. The slope of
#|   the curve is β, the price of a nat.
from nemo_rl_ref.show.figures import LINES, panels

strengths = torch.logspace(2, -2, 200, dtype=torch.float64).tolist()
frontier = [(kl(p, log_ref).item(), expect(p, reward).item()) for p, _ in map(best, strengths)]
below = [(kl(p, log_ref).item(), expect(p, reward).item()) for p in rivals[40:]]
figure, (axis,) = panels(1, height=3.2)
axis.plot(*zip(*frontier, strict=True), color=LINES[0]["color"], label="best policies")
axis.plot(*zip(*below, strict=True), ".", color=LINES[1]["color"], label="other policies")
for strength in (10.0, 1.0, 0.3):
    log_p, _ = best(strength)
    place = (kl(log_p, log_ref).item(), expect(log_p, reward).item())
    axis.plot(*place, "o", color=LINES[0]["color"])
    axis.annotate(f"β = {strength:g}", place, (5, -13), textcoords="offset points", fontsize=9)
axis.set_xlabel("KL(π ‖ π_ref), nats")
axis.set_title("expected reward")
axis.legend(loc="lower right", fontsize=9)

# %%
#| label: thm-kl-frontier
#| num: kl-slope-error = {slope_error:.0e}
# Along the curve a nat buys β reward, and every other policy lies below the curve's tangent.
slope_error = 0.0
for strength in (0.1, 0.3, 1.0, 3.0):
    beta = torch.tensor(strength, dtype=torch.float64, requires_grad=True)
    log_p, log_normaliser = best(beta)
    (bought,) = torch.autograd.grad(expect(log_p, reward), beta, retain_graph=True)
    (paid,) = torch.autograd.grad(kl(log_p, log_ref), beta, retain_graph=True)
    slope_error = max(slope_error, abs(bought / paid / strength - 1).item())
    for rival in rivals:
        tangent = strength * (log_normaliser + kl(rival, log_ref))
        assert expect(rival, reward) < tangent
assert slope_error < 1e-9

# %% [markdown]
# ## From preferences to DPO

# %%
#| label: thm-implicit-reward
#| num: preference-error = {preference_error:.0e}
implied = BETA * (log_found - log_ref)  # of the policy that optimization found
# Two answers to one prompt: their difference is the reward's, whatever Z is.
differences = (implied[:, None] - implied) - (reward[:, None] - reward)
implied_error = differences.abs().max().item()
# So is the probability of every preference.
stated = torch.sigmoid(implied[:, None] - implied)
preferences = torch.sigmoid(reward[:, None] - reward)  # Bradley-Terry
preference_error = (stated - preferences).abs().max().item()
assert implied_error < 1e-5 and preference_error < 1e-6

# %%
#| label: thm-reward-shift
# What one reward says of a prompt, r + c says, too: the same preferences, the same best policy.
shifted = reward + 7.0
same = torch.sigmoid(shifted[:, None] - shifted)
shift_error = (same - preferences).abs().max().item()
log_shifted = torch.log_softmax(log_ref + shifted / BETA, dim=0)
shift_error = max(shift_error, (log_shifted - log_best).abs().max().item())
assert shift_error < 1e-12


# %%
#| label: thm-dpo-weight
#| num: dpo-weight-error = {weight_error:.0e}
from nemo_rl_ref.algorithms.loss import DPOLossConfig, DPOLossFn
from nemo_rl_ref.custom.pairwise import ConservativeDPOLossFn, DPOPLossFn, IPOLossFn


def loss_of(loss_fn, h_w, h_l):
    """A loss of NeMo RL's protocol on one pair, whose answers are one token long."""
    rows = torch.stack([h_w, h_l])[:, None]
    data = {
        "reference_policy_logprobs": torch.zeros(2, 2, dtype=torch.float64),
        "token_mask": torch.ones(2, 2),
        "sample_mask": torch.ones(2, dtype=torch.float64),
    }
    return loss_fn(rows, data, torch.tensor(2.0, dtype=torch.float64), torch.tensor(2.0))[0]


dpo = DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=BETA))
weight_error = 0.0
for h in torch.linspace(-40, 40, 81, dtype=torch.float64):
    h_w, h_l = h.clone().requires_grad_(), torch.zeros_like(h, requires_grad=True)
    up, down = torch.autograd.grad(loss_of(dpo, h_w, h_l), (h_w, h_l))
    wanted = BETA * torch.sigmoid(-BETA * h)  # σ(-margin): 1 for a pair in the wrong order
    weight_error = max(weight_error, (up + wanted).abs().item(), (down - wanted).abs().item())
assert weight_error < 1e-8  # 1e-8 is what NeMo RL adds to its denominators

# %%
#| label: thm-dpo-minimizer
#| num: dpo-minimizer-error = {minimiser_error:.0e}
# DPO on infinite data: every ordered pair of answers, as often as annotators prefer it.
rows = torch.cartesian_prod(*[torch.arange(len(world))] * 2).flatten()  # chosen, rejected, …


def population_loss(loss_fn, logits, weights):
    """A loss of NeMo RL's protocol, each answer in the place of a token, pairs weighted."""
    data = {
        "reference_policy_logprobs": log_ref[rows, None].expand(-1, 2),
        "token_mask": torch.ones(len(rows), 2),
        "sample_mask": weights.flatten().repeat_interleave(2),
    }
    count = torch.tensor(float(len(rows)), dtype=torch.float64)
    return loss_fn(world.logprob(logits)[rows, None], data, count, count)[0]


def fit(loss_fn, weights):
    """Log-probabilities of the policy that a loss leads to, from the uniform policy."""
    from_uniform = torch.zeros(world.states, world.vocab, dtype=torch.float64)
    found = ascend(lambda logits: -population_loss(loss_fn, logits, weights), from_uniform)
    return world.logprob(found)


by_dpo = fit(dpo, preferences.sqrt())  # the class multiplies by the mask twice
minimiser_error = (by_dpo.exp() - log_best.exp()).abs().max().item()
assert minimiser_error < 1e-6

# %%
#| label: thm-dpo-both-fall
#| num: fall-chosen = {falls[0]:+.3f}
#| num: fall-rejected = {falls[1]:+.3f}
#| num: rise-other = {falls[2]:+.3f}
# One softmax for every position: whatever the prefix, the next token has the same distribution.
pairs_world = World(vocab=3, horizon=2)
names = ["".join("abc"[token] for token in answer) for answer in pairs_world.answers]
w, l, other = names.index("ab"), names.index("aa"), names.index("bb")
start = torch.tensor([0.2, 0.6, 0.2], dtype=torch.float64).log()


def answer_logprobs(shared):
    return pairs_world.logprob(shared.expand(pairs_world.states, -1))


def dpo_steps(loss_fn, count, rate=0.5):
    """Gradient descent on one pair; the log-probability of every answer after each step."""
    shared, path = start.clone().requires_grad_(), [answer_logprobs(start)]
    for _ in range(count):
        h = answer_logprobs(shared) - path[0]
        slope = torch.autograd.grad(loss_of(loss_fn, h[w], h[l]), shared)[0]
        shared = (shared - rate * slope).detach().requires_grad_()
        path.append(answer_logprobs(shared).detach())
    return torch.stack(path)


dpo = DPOLossFn(DPOLossConfig(reference_policy_kl_penalty=1.0))
path = dpo_steps(dpo, 1)
falls = (path[1] - path[0])[[w, l, other]]
assert falls[0] < 0 and falls[1] < falls[0] < 0 < falls[2]
before, after = path[0].exp(), path[1].exp()
assert (after.sum() - 1).abs() < 1e-12

# %%
#| label: fig-dpo-both-fall
#| alt: Two panels of the change of three answers' log-probabilities over 200 steps. Above, DPO. The
#|   chosen answer ab and the rejected answer aa both fall, the rejected one faster, and bb, which
#|   is in no pair, rises. Below, DPO-Positive. The chosen answer stays near its start.
#| caption: One pair, the chosen answer ab and the rejected answer aa, and a policy that shares its
#|   parameters between positions. Change of log π in nats.
config = DPOLossConfig(reference_policy_kl_penalty=1.0, dpop_penalty=5.0)
figure, axes = panels(2)
for axis, loss_fn, title in zip(
    axes, (dpo, DPOPLossFn(config)), ("DPO", "DPO-Positive"), strict=True
):
    moved = dpo_steps(loss_fn, 200, rate=0.02)
    moved = moved - moved[0]
    for style, place, name in zip(
        LINES,
        (w, l, other),
        ("ab, chosen", "aa, rejected", "bb, in no pair"),
        strict=False,
    ):
        axis.plot(moved[:, place], **(style | {"marker": None}), label=name)
    axis.set_title(title)
axes[0].legend(fontsize=9)
axes[1].set_xlabel("steps of gradient descent")

# %%
#| label: thm-deterministic
from itertools import pairwise

# Annotators who always agree, one pair: chosen 0, rejected 1 of a world of three answers.
small = World(vocab=3, horizon=1)
log_small = small.logprob(small.policy(seed=3)).detach()


def one_pair(loss_fn, logits):
    h = small.logprob(logits) - log_small
    return loss_of(loss_fn, h[0], h[1])


for strength in (0.1, 1.0, 10.0):
    config = DPOLossConfig(reference_policy_kl_penalty=strength)
    dpo, ipo = DPOLossFn(config), IPOLossFn(config)
    # DPO: whatever β, the loss still falls when the rejected answer is all but impossible.
    tables = [torch.tensor([[0.0, -away, 0.0]], dtype=torch.float64) for away in (0, 1, 3, 10, 30)]
    losses = [one_pair(dpo, table).item() for table in tables]
    assert all(earlier > later for earlier, later in pairwise(losses))
    # IPO: least at the log-ratio difference 1 / 2β, from wherever one begins.
    for seed in range(3):
        found = ascend(lambda logits, ipo=ipo: -one_pair(ipo, logits), small.policy(seed=seed))
        h = small.logprob(found) - log_small
        assert abs(h[0] - h[1] - 1 / (2 * strength)) < 1e-6
        rejected = small.logprob(found)[1].exp()  # it lives
        assert rejected > (0.01 if strength >= 1 else 1e-3)

# %%
#| label: fig-preference-minimizers
#| alt: The margin at which each loss is least, over the probability p that the chosen answer is
#|   preferred. DPO's grows without bound as p goes to 1. IPO's is a straight line up to one half.
#|   Conservative DPO's stays finite.
#| caption: Margin at which the average loss of a pair is least, found by minimizing it.
agreement = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
candidates = torch.linspace(-5, 5, 20001, dtype=torch.float64)
zero = torch.zeros_like(candidates)
settings = {"reference_policy_kl_penalty": 1.0}
contenders = {
    "DPO": ConservativeDPOLossFn(DPOLossConfig(**settings, label_smoothing=0.0)),
    "conservative DPO, 0.1": ConservativeDPOLossFn(DPOLossConfig(**settings, label_smoothing=0.1)),
    "IPO": IPOLossFn(DPOLossConfig(**settings)),
}
figure, (axis,) = panels(1, height=3.0)
for style, (name, loss_fn) in zip(LINES, contenders.items(), strict=False):
    preferred = loss_fn.pair_losses(candidates, zero, 1.0)
    reversed_ = loss_fn.pair_losses(zero, candidates, 1.0)
    average = agreement[:, None] * preferred + (1 - agreement[:, None]) * reversed_
    axis.plot(
        agreement,
        candidates[average.argmin(1)],
        **(style | {"marker": None}),
        label=name,
    )
axis.set_xlabel("p, share of annotators who prefer the chosen answer")
axis.set_title("margin β (h_w − h_l) at the minimum")
axis.legend(fontsize=9)

# %%
#| label: thm-label-noise
#| num: noise-kl = {noise_kl:.2f}
from nemo_rl_ref.custom.pairwise import RobustDPOLossFn

# A fifth of the labels is flipped. DPO then ends at the policy of weaker preferences.
NOISE = 0.2
noisy = (1 - NOISE) * preferences + NOISE * preferences.T
settings = {"reference_policy_kl_penalty": BETA}
on_noise = fit(DPOLossFn(DPOLossConfig(**settings)), noisy.sqrt())
robust = RobustDPOLossFn(DPOLossConfig(**settings, label_smoothing=NOISE))
corrected = fit(robust, noisy)  # this class multiplies by the mask once
noise_kl, noise_error = (
    kl(log_best, on_noise).item(),
    kl(log_best, corrected).abs().item(),
)
assert noise_kl > 0.01 and noise_error < 1e-9

# %% [markdown]
# ## PPO

# %%
#| label: ppo-loss
import torch

from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl_ref.equations.world import World, expect, gradient, groups, variance


def pg_loss(logprobs, prev, advantages, generation=None, **settings):
    """NeMo RL's policy-gradient loss, summed over tokens; every entry is (answers, tokens)."""

    def shifted(entries):  # column 0 is the prompt's
        return torch.nn.functional.pad(entries.expand_as(prev), (1, 0))

    data = {
        "input_ids": torch.zeros(len(prev), prev.shape[1] + 1, dtype=torch.long),
        "token_mask": shifted(torch.ones_like(prev)),
        "sample_mask": torch.ones_like(prev[:, 0]),
        "advantages": shifted(advantages),
        "prev_logprobs": shifted(prev),
        "generation_logprobs": shifted(prev if generation is None else generation),
    }
    config = ClippedPGLossConfig(reference_policy_kl_penalty=0.0, **settings)
    one = torch.tensor(1 - 1e-8, dtype=torch.float64)  # the count to divide by, less what is added
    return ClippedPGLossFn(config)(logprobs, data, one, one)[0]


# %%
#| label: thm-ppo-surrogate
#| num: surrogate-error = {surrogate_error:.1g}
world = World(vocab=3, horizon=3)
generator = torch.Generator().manual_seed(1)
reward = torch.randn(len(world), generator=generator, dtype=torch.float64)
policy = world.policy(seed=1)
prev = world.token_logprobs(policy).detach()
p_old = prev.sum(-1).exp()


def surrogate(logits):
    """-L: expectation under π_old of the sum over an answer's tokens."""
    return -pg_loss(world.token_logprobs(logits), prev, (p_old * reward)[:, None])


def exact(logits):
    return gradient(expect(world.logprob(logits), reward), logits)


surrogate_error = (gradient(surrogate(policy), policy) - exact(policy)).abs().max().item()
assert surrogate_error < 1e-14

# %%
#| label: thm-ppo-surrogate-away
#| num: surrogate-gap-growth = {gaps[1] / gaps[0]:.1f}
# Away from π_old the two gradients part, in proportion to the distance.
direction = world.policy(seed=2).detach()
gaps = []
for distance in (1e-4, 1e-3):
    near = (policy + distance * direction).detach().requires_grad_()
    gaps.append((gradient(surrogate(near), near) - exact(near)).norm().item())
assert gaps[0] > 1e-6 and 9 < gaps[1] / gaps[0] < 11

# %%
#| label: thm-ppo-zero-gradient
#| num: ppo-points = {zero.numel()}
#| num: ppo-zero = {int(zero.sum())}
#| num: ppo-outside-kept = {kept}
ratio, advantage = torch.meshgrid(
    torch.linspace(0.06, 3.01, 119, dtype=torch.float64),  # no ratio is 0.8 or 1.28 itself
    torch.linspace(-2.0, 2.0, 41, dtype=torch.float64),
    indexing="ij",
)
logprobs = ratio.log().requires_grad_()
loss = pg_loss(
    logprobs, torch.zeros_like(ratio), advantage, ratio_clip_min=0.2, ratio_clip_max=0.28
)
zero = gradient(loss, logprobs) == 0
clipped = ((advantage > 0) & (ratio > 1.28)) | ((advantage < 0) & (ratio < 0.8))
outside = (ratio > 1.28) | (ratio < 0.8)
assert torch.equal(zero, clipped | (advantage == 0))
kept = (outside & ~zero & (advantage != 0)).sum().item()
assert kept > 0  # outside the interval there is a gradient, too: the one that leads back

# %%
#| label: thm-ppo-leaves
#| num: ppo-leap-up = {leap[0, 0]:.2f}
#| num: ppo-leap-down = {leap[0, 2]:.2f}
bandit = World(vocab=3, horizon=1)
start = bandit.policy(scale=0.0)  # uniform over three answers of one token
log_old = bandit.token_logprobs(start).detach()
gain = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)  # advantages, their mean is 0


def train(rate, steps, **settings):
    """Ratios of the three answers after each step of gradient descent on the exact loss."""
    logits, ratios = start, []
    for _ in range(steps):
        now = bandit.token_logprobs(logits)
        loss = pg_loss(now, log_old, log_old.exp() * gain[:, None], **settings)
        logits = (logits - rate * gradient(loss, logits)).detach().requires_grad_()
        ratios.append((bandit.logprob(logits) - log_old[:, 0]).exp().detach())
    return torch.stack(ratios)


leap = train(rate=3.0, steps=20)  # ε = 0.2
assert leap[0, 0] > 1.2 and leap[0, 2] < 0.8  # the first step leaves the interval
assert torch.equal(leap[0], leap[-1])  # and nothing brings the ratios back

# %%
#| label: thm-ppo-pushed
#| num: ppo-drift-from = {small[first_out, 0]:.3f}
#| num: ppo-drift-to = {small[-1, 0]:.3f}
# A clipped token has no gradient of its own, yet its ratio moves on: others share the softmax.
small = train(rate=0.2, steps=80)
first_out = int((small[:, 0] > 1.2).nonzero()[0])
drift = (small[-1, 0] - small[first_out, 0]).item()
assert drift > 0.01

# %%
#| label: fig-ppo-ratio
#| alt: Ratio of the best answer against gradient steps; with clipping and small steps it stops just above 1.2, with one large step it stays at its first value far above, without clipping it goes on growing.
#| caption: Ratio of the best of three answers over gradient steps on the exact loss. The gray band is the interval from 1 − ε to 1 + ε with ε = 0.2. Clipping ends the growth; it does not keep the ratio in the band.
from nemo_rl_ref.show.figures import LINES, panels

figure, (axis,) = panels(1)
runs = {
    "clipped, η = 0.2": small[:40, 0],
    "clipped, η = 3": train(3.0, 40)[:, 0],
    "not clipped, η = 0.2": train(0.2, 40, ratio_clip_min=1.0, ratio_clip_max=1e9)[:, 0],
}
for (name, ratios), style in zip(runs.items(), LINES, strict=False):
    axis.plot(range(1, 41), ratios, label=name, markevery=4, **style)
axis.axhspan(0.8, 1.2, color="#bbbbbb", alpha=0.4, linewidth=0)
axis.set(xlabel="gradient steps", ylabel="ratio of the best answer")
axis.set_ylim(0.7, 4.2)
axis.legend(loc="upper left");

# %%
#| label: thm-dual-clip-bound
#| num: dual-largest = {dual.max() / 0.7:.2f}
#| num: dual-without = {plain.max() / 0.7:.0e}
ratio = torch.logspace(-3, 6, 400, dtype=torch.float64)[:, None]
cost = torch.full_like(ratio, -0.7)  # a negative advantage


def gradient_weight(**settings):
    logprobs = ratio.log().requires_grad_()
    return gradient(pg_loss(logprobs, torch.zeros_like(ratio), cost, **settings), logprobs).abs()


plain, dual = gradient_weight(), gradient_weight(ratio_clip_c=3.0)
assert dual.max() <= 3.0 * 0.7 < plain.max()
assert torch.equal(dual == 0, (ratio < 0.8) | (ratio > 3.0))

# %% [markdown]
# ## Generalized advantage estimation

# %%
#| label: gae-world
from nemo_rl_ref.algorithms.advantage_estimator import GeneralizedAdvantageEstimator


def gae(state_values, lam, gamma=1.0):
    """NeMo RL's estimate for every token of every answer of the world, (answers, tokens)."""
    config = {
        "gae_lambda": lam,
        "gae_gamma": gamma,
        "gae_lambda_value": None,
        "gae_lambda_policy": None,
        "length_adaptive_alpha": 0.0,
        "normalize_advantages": False,
    }
    estimator = GeneralizedAdvantageEstimator(config, ClippedPGLossConfig())
    return estimator.compute_advantage(
        None, reward, world.mask, values=state_values[world.prefixes]
    )[0]


def mean_by_state(entries, weight):
    """Mean of the entries of all tokens that follow the same prefix, (states,)."""
    weight = weight[:, None].expand_as(entries)
    total, mass = torch.zeros(2, world.states, dtype=torch.float64)
    total = total.index_put((world.prefixes,), weight * entries, accumulate=True)
    return total / mass.index_put((world.prefixes,), weight, accumulate=True)


# The exact value of a state: the mean reward of the answers that begin with it.
exact_value = mean_by_state(reward[:, None].expand(len(world), 3), p_old)
error = torch.randn(world.states, generator=generator, dtype=torch.float64)
wrong_value = exact_value + 0.5 * error

# %%
#| label: thm-gae-limits
#| num: gae-limit-error = {max(at_0, at_1):.1g}
#| num: gae-limit-near = {max(near_0, near_1):.0e}
following = torch.nn.functional.pad(wrong_value[world.prefixes][:, 1:], (0, 1))  # V(s_{t+1})
token_reward = torch.nn.functional.pad(reward[:, None], (2, 0))  # only the last token has one
gamma = 0.9
discounts = gamma ** torch.arange(2, -1, -1, dtype=torch.float64)
residual = token_reward + gamma * following - wrong_value[world.prefixes]
monte_carlo = discounts * reward[:, None] - wrong_value[world.prefixes]
at_0 = (gae(wrong_value, 0.0, gamma) - residual).abs().max().item()
at_1 = (gae(wrong_value, 1.0, gamma) - monte_carlo).abs().max().item()
near_0 = (gae(wrong_value, 1e-9, gamma) - residual).abs().max().item()
near_1 = (gae(wrong_value, 1 - 1e-9, gamma) - monte_carlo).abs().max().item()
assert max(at_0, at_1) < 1e-14 and max(near_0, near_1) < 1e-8

# %%
#| label: thm-gae-unbiased
#| num: gae-exact-bias = {exact_bias:.0e}
#| num: gae-one-bias = {wrong_bias[-1]:.0e}
import itertools

scores = torch.autograd.functional.jacobian(world.token_logprobs, policy)  # (Y, T, states, V)


def gradients(advantages):
    """The estimate of the policy gradient that each answer gives, (Y, states, V)."""
    return torch.einsum("yt,ytsv->ysv", advantages.detach(), scores)


truth = exact(policy)
log_p = p_old.log()
lambdas = torch.linspace(0, 1, 11).tolist()


def bias(state_values, lam):
    return (expect(log_p, gradients(gae(state_values, lam))) - truth).norm().item()


exact_bias = max(bias(exact_value, lam) for lam in lambdas)
wrong_bias = [bias(wrong_value, lam) for lam in lambdas]
assert exact_bias < 1e-14 and wrong_bias[-1] < 1e-14  # at λ = 1 any value function will do
assert all(a > b for a, b in itertools.pairwise(wrong_bias))

# %%
#| label: fig-gae-tradeoff
#| alt: Two panels against λ from 0 to 1. Bias falls to zero at λ = 1 for the wrong value function and is zero for the exact one. Variance grows with λ for the exact value function and has its minimum at λ near 0.4 for the wrong one.
#| caption: Bias (norm of the error of the mean) and variance (summed over parameters) of the policy gradient from one answer against λ, exact sums over all answers.
#| num: gae-variance-growth = {exact_growth:.1f}
#| num: gae-variance-lowest = {lowest:.1f}


def spread(state_values, lam):
    return variance(log_p, gradients(gae(state_values, lam))).sum().item()


figure, (upper, lower) = panels(2, height=2.1)
for name, table, style in (
    ("exact value function", exact_value, LINES[0]),
    ("wrong value function", wrong_value, LINES[1]),
):
    upper.plot(lambdas, [bias(table, lam) for lam in lambdas], label=name, **style)
    lower.plot(lambdas, [spread(table, lam) for lam in lambdas], label=name, **style)
upper.set(ylabel="bias")
lower.set(xlabel="λ", ylabel="variance")
upper.legend()
exact_growth = spread(exact_value, 1.0) / spread(exact_value, 0.0)
lowest = min(lambdas, key=lambda lam: spread(wrong_value, lam))

# %% [markdown]
# ## Off-policy correction between engines

# %%
#| label: thm-off-policy-unbiased
#| num: engine-none = {100 * uncorrected:.1f}
#| num: engine-token = {100 * by_token:.1f}
#| num: engine-answer = {by_answer:.0e}
# The engine's policy: the same, with noise on the logits.
noise = world.policy(seed=5).detach()
engine = world.token_logprobs(policy.detach() + 0.3 * noise)
p_engine = engine.sum(-1).exp()
correction = {"use_importance_sampling_correction": True}
whole = {"sequence_level_importance_ratios": True, "token_level_loss": False}


def estimate(tokens=1, **settings):
    """-∇L at π_old, expected over answers that the engine sampled."""
    now = world.token_logprobs(policy)
    loss = pg_loss(now, prev, (p_engine * reward)[:, None], engine, **settings)
    return -tokens * gradient(loss, policy)


def relative(found):
    return ((found - truth).norm() / truth.norm()).item()


uncorrected = relative(estimate())
by_token = relative(estimate(**correction))
by_answer = relative(estimate(tokens=3, **correction, **whole))  # it divides by the length
assert by_answer < 1e-8 < by_token < uncorrected  # 1e-8 is added to the length, too

# %%
#| label: thm-one-token
#| num: one-token-error = {one_token_error:.0e}
# For answers of one token, the weight of the token is that of the answer: no bias.
one_engine = bandit.token_logprobs(bandit.policy(seed=6)).detach()
trained = bandit.policy(seed=7)
now = bandit.token_logprobs(trained)
loss = pg_loss(now, now.detach(), one_engine.exp() * gain[:, None], one_engine, **correction)
wanted = gradient(expect(bandit.logprob(trained), gain), trained)
one_token_error = (-gradient(loss, trained) - wanted).norm().item()
assert one_token_error < 1e-14

# %%
#| label: thm-truncation
#| num: truncation-bounds = {len(bounds)}
#| num: weight-largest = {weight.max():.0f}
log_engine = world.logprob(policy.detach() + 0.8 * noise)  # far away
weight = (log_p - log_engine).exp().detach()  # weights of whole answers
bounds = torch.logspace(0, weight.max().log10().item(), 30, dtype=torch.float64).tolist()
good = (reward > 0).double()  # a reward of 0 or 1
TRUNCATED = "truncated_importance_sampling"
truth_good = expect(log_p, good)


def bias_and_variance(kind, bound):
    """With NeMo RL's weights: each answer is one token, and the loss is -weight × advantage."""
    zero = torch.zeros(len(world), 1, dtype=torch.float64)
    advantage = torch.ones_like(zero, requires_grad=True)
    limits = {f"{TRUNCATED}_type": kind, f"{TRUNCATED}_ratio": bound, f"{TRUNCATED}_ratio_min": 0.0}
    loss = pg_loss(zero, zero, advantage, -weight.log()[:, None], **correction, **limits)
    value = -gradient(loss, advantage)[:, 0] * good
    return (expect(log_engine, value) - truth_good).item(), variance(log_engine, value).item()


tis = [bias_and_variance("tis", bound) for bound in bounds]
icepop = [bias_and_variance("icepop", bound) for bound in bounds]
for (bias_c, _), bound in zip(tis, bounds, strict=True):
    assert abs(bias_c + expect(log_engine, (weight - bound).clamp(min=0) * good)) < 1e-14
for before, after in itertools.pairwise(tis):
    assert after[0] >= before[0] and after[1] >= before[1]  # less bias, more variance
assert all(i[0] <= c[0] + 1e-15 for i, c in zip(icepop, tis, strict=True))  # IcePop drops more
assert abs(tis[-1][0]) < 1e-14

# %%
#| label: thm-cut-support
#| num: cut-whole = {mean_whole.item():.2f}
# A sampler with top-k of 2, whose logits differ a little from the trainer's, as engines' do.
import torch

from nemo_rl_ref.algorithms.logits_sampling_utils import apply_top_k_top_p

old_logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
mu_logits = old_logits + torch.tensor([[0.1, -0.1, 0.2, 0.0]], dtype=torch.float64)
log_mu, log_cut = (
    apply_top_k_top_p(logits, top_k=2, top_p=1.0)[0].log_softmax(-1)
    for logits in (mu_logits, old_logits)
)
drawn = log_mu > -torch.inf
mean_cut, mean_whole = (
    ((log_old - log_mu).exp() * log_mu.exp())[drawn].sum()
    for log_old in (log_cut, old_logits.log_softmax(-1))
)
assert abs(mean_cut - 1) < 1e-15 and mean_whole < 0.9

# %%
#| label: thm-zero-weight-counts
#| num: zero-weight-step = {(dropped / masked)[0].item():.2f}
# An answer of four tokens, one of which the engine found e³ times less likely than the trainer.
import torch

from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn

ones = torch.ones(1, 5, dtype=torch.float64)
mismatch = torch.tensor([[0.0, 0.1, -0.1, 3.0, 0.0]], dtype=torch.float64)
icepop_loss = ClippedPGLossFn(
    ClippedPGLossConfig(
        use_importance_sampling_correction=True,
        truncated_importance_sampling_type="icepop",
        truncated_importance_sampling_ratio=5.0,
        truncated_importance_sampling_ratio_min=0.5,
        reference_policy_kl_penalty=0.1,
    )
)


def gradient_by_token(token_mask):
    now = torch.full((1, 4), -1.0, dtype=torch.float64, requires_grad=True)
    data = {
        "advantages": ones,
        "prev_logprobs": -ones,
        "generation_logprobs": -ones - mismatch,
        "reference_policy_logprobs": -1.5 * ones,
        "token_mask": token_mask,
        "sample_mask": torch.ones(1),
    }
    loss, _ = icepop_loss(now, data, torch.tensor(1.0), token_mask[:, 1:].sum())
    return torch.autograd.grad(loss, now)[0][0]


dropped = gradient_by_token(ones)  # IcePop gives the third token the weight 0
masked = gradient_by_token(torch.where(mismatch == 3, 0, ones))  # a mask takes it out of the count
kept = torch.tensor([True, True, False, True])
assert torch.allclose(dropped[kept], masked[kept] * 3 / 4, atol=1e-9)
assert dropped[2] != 0 and masked[2] == 0  # its KL term stays

# %%
#| label: fig-truncation
#| alt: Two panels against the largest weight on a logarithmic axis. The bias rises from below zero to zero, and IcePop's is larger than TIS's. The variance grows with the bound.
#| caption: Estimating the expected reward under π_old from one answer of a distant engine, against the largest weight. Exact sums over all answers.
figure, (upper, lower) = panels(2, height=2.1)
for name, results, style in (("TIS", tis, LINES[0]), ("IcePop", icepop, LINES[1])):
    upper.semilogx(bounds, [r[0] for r in results], label=name, markevery=3, **style)
    lower.semilogx(bounds, [r[1] for r in results], label=name, markevery=3, **style)
upper.set(ylabel="bias")
lower.set(xlabel="largest weight", ylabel="variance")
upper.legend();

# %%
#| label: thm-effective-sample-size
#| num: share-one = {100 * shares[1]:.1f}
#| num: share-eight = {100 * shares[8]:.0f}
#| num: share-thousand = {per_token.item() ** 1000:.0e}
import math

# The same mismatch at every token: the share of samples that count falls as a power of the length.
token_old = torch.log_softmax(torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64), 0)
token_engine = torch.log_softmax(torch.tensor([0.3, 0.2, -0.5], dtype=torch.float64), 0)
per_token = 1 / expect(token_engine, (2 * (token_old - token_engine)).exp())
# What it says: the mean of two weighted signs has the variance 1 / (2 × share), over all pairs.
signed = torch.cat([token_engine, token_engine]) - math.log(2)
ratio = (token_old - token_engine).exp()
pairs, log_pair = groups(signed, 2)
spread_of_mean = variance(log_pair, torch.cat([ratio, -ratio])[pairs].mean(-1))
assert abs(spread_of_mean - 1 / (2 * per_token)) < 1e-13
shares = {}
for length in range(1, 9):
    answers = World(vocab=3, horizon=length).answers
    log_old_y, log_engine_y = token_old[answers].sum(-1), token_engine[answers].sum(-1)
    shares[length] = 1 / expect(log_engine_y, (2 * (log_old_y - log_engine_y)).exp())
    assert abs(shares[length] - per_token**length) < 1e-13

# %% [markdown]
# ## GRPO and its relatives

# %%
#| label: grpo-world
import math

import torch

from nemo_rl_ref.algorithms.advantage_estimator import AdvEstimatorConfig, GRPOAdvantageEstimator
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl_ref.equations.world import World, expect, gradient, groups

SIZE = 3  # answers in a group
world = World(vocab=3, horizon=2)
logits = world.policy(seed=1)
log_p = world.logprob(logits)
reward = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0, 0.0, 0.5, 0.0, 1.0], dtype=torch.float64)
exact = gradient(expect(log_p, reward), logits)
members, log_group = groups(log_p.detach(), SIZE)  # every group there is


def advantages_of(rewards, **flags):
    """NeMo RL's advantages of groups of rewards (groups, G)."""
    estimator = GRPOAdvantageEstimator(AdvEstimatorConfig(**flags), ClippedPGLossConfig())
    prompts = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])[:, None]
    flat = rewards.reshape(-1)
    found = estimator.compute_advantage(prompts, flat, torch.ones(len(flat), 1))
    return found.reshape(rewards.shape)


def expected_gradient(advantages):
    """The mean over all groups of the policy gradient, each group by its probability."""
    return gradient(expect(log_group, (advantages * log_p[members]).mean(1)), logits)


# %%
#| label: thm-group-baseline
#| num: groups-listed = {len(members)}
#| num: groups-loo-error = {loo_error:.0e}
#| num: groups-mean-error = {mean_error:.0e}
#| num: groups-scale-error = {scale_error:.0e}
others = advantages_of(reward[members], normalize_rewards=False)
mean = advantages_of(reward[members], normalize_rewards=False, use_leave_one_out_baseline=False)
loo_error = (expected_gradient(others) - exact).abs().max().item()
mean_error = (expected_gradient(mean) - (SIZE - 1) / SIZE * exact).abs().max().item()
scale_error = (others - SIZE / (SIZE - 1) * mean).abs().max().item()
assert max(loo_error, mean_error, scale_error) < 1e-12

# %%
#| label: thm-others-std
#| num: others-std-factor = {factor.item():.2f}
#| num: others-std-error = {direction_error:.0e}
#| num: others-std-sum = {left_over:.2f}
# The other answers know nothing of answer i, so their deviation is only a factor on average.
two, log_two = groups(log_p.detach(), SIZE - 1)  # the others
spread = reward[two].std(1)
factor = expect(log_two, torch.where(spread > 0, 1 / (spread + 1e-6), torch.ones_like(spread)))
divided = advantages_of(reward[members])
direction_error = (expected_gradient(divided) - factor * exact).abs().max().item()
assert direction_error < 1e-12

# It never changes a sign, but a group's advantages no longer add up to zero.
assert torch.equal(divided.sign(), others.sign())
left_over = divided.sum(1).abs().max().item()
assert left_over > 0.1 and others.sum(1).abs().max() < 1e-12

# %%
#| label: thm-group-std
#| num: group-std-degrees = {math.degrees(math.acos(graded)):.1f}

def cosine(a, b):
    """Cosine of the angle between two gradients."""
    return torch.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


# The group's own deviation depends on answer i: the direction changes ...
whole = advantages_of(reward[members], use_leave_one_out_baseline=False)
graded = cosine(expected_gradient(whole), exact)
# ... unless rewards are 0 or 1.
success = (reward > 0).double()
exact_binary = gradient(expect(log_p, success), logits)
whole_binary = advantages_of(success[members], use_leave_one_out_baseline=False)
binary = cosine(expected_gradient(whole_binary), exact_binary)
assert graded < 0.999 and abs(binary - 1) < 1e-12

# %% [markdown]
# With rewards of 0 or 1 the expected gradient of a prompt is a factor times the gradient of its
# success rate. The factor depends on the success rate: exact sums over the number of successes.

# %%
#| label: fig-difficulty
#| alt: Two panels against the success rate p of a prompt. Above, the factor on the gradient of p, for
#|   groups of eight. Without division it is flat, at 1 for leave-one-out and at 7/8 for the mean
#|   baseline. Divided by the group's deviation it is lowest in the middle, about 1.7, and rises
#|   towards both ends to about 2.5. Divided by the others' deviation it is about 2 over the whole
#|   middle and falls to 1 at both ends. Below, the probability that all answers of a group have the
#|   same reward, for 4, 8 and 16 answers: 1 at both ends and lowest in the middle, the lower the
#|   larger the group.
#| caption: What a prompt weighs, by its success rate. Above, the factor that a group of eight puts
#|   on the gradient of the success rate. Below, how often a group teaches nothing.
from nemo_rl_ref.show.figures import LINES, panels

eight = torch.tensor([[1.0] * k + [0.0] * (8 - k) for k in range(9)], dtype=torch.float64)
rates = torch.linspace(0.005, 0.995, 100, dtype=torch.float64)
seven = torch.distributions.Binomial(7, probs=rates[:, None])
chance = seven.log_prob(torch.arange(8.0, dtype=torch.float64)).exp()  # of k successes, others


def prompt_factor(**flags):
    """Mean advantage of a success less that of a failure, by success rate."""
    by_count = advantages_of(eight, **flags)  # row k: k successes, then 8 - k failures
    return chance @ by_count[1:, 0] - chance @ by_count[:-1, -1]


whole_group = {"use_leave_one_out_baseline": False}
curves = {
    "leave-one-out": prompt_factor(normalize_rewards=False),
    "mean baseline": prompt_factor(normalize_rewards=False, **whole_group),
    "mean, group's deviation": prompt_factor(**whole_group),
    "leave-one-out, others' deviation": prompt_factor(),
}
assert torch.allclose(curves["leave-one-out"], torch.ones(100, dtype=torch.float64))
assert torch.allclose(curves["mean baseline"], torch.full_like(rates, 7 / 8))
figure, (above, below) = panels(2)
for (name, curve), style in zip(curves.items(), LINES, strict=False):
    above.plot(rates, curve, label=name, markevery=12, **style)
above.set(ylabel="factor on the gradient", ylim=(0, 3.6), title="Weight of a prompt, G = 8")
above.legend(fontsize=8, ncols=2, loc="upper center")
for size, style in zip((4, 8, 16), LINES, strict=False):
    below.plot(rates, rates**size + (1 - rates) ** size, label=f"G = {size}", markevery=12, **style)
below.set(xlabel="success rate p of the prompt", ylabel="probability", title="All rewards equal")
below.legend()

# %%
#| label: thm-difficulty
#| num: difficulty-group = {group[hard] / group[even]:.2f}
#| num: difficulty-others = {other[hard] / other[even]:.2f}
at = {f"{p:.2f}": int((rates - p).abs().argmin()) for p in (0.05, 0.5)}
print(f"{'factor at':34}" + "".join(f"p = {p:8}" for p in at))
for name, curve in curves.items():
    print(f"{name:34}" + "".join(f"{curve[place]:<12.3f}" for place in at.values()))
group, other = curves["mean, group's deviation"], curves["leave-one-out, others' deviation"]
hard, even = at.values()
# The group's deviation favors hard prompts, the others' deviation even ones.
assert group[hard] > group[even] and other[hard] < other[even]

# %%
#| label: thm-lone-success
from nemo_rl_ref.algorithms.utils import calculate_baseline_and_std_per_prompt

lone = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
one_prompt = torch.zeros(4, 1, dtype=torch.long)
_, left_out = calculate_baseline_and_std_per_prompt(one_prompt, lone, torch.ones(4))
_, with_all = calculate_baseline_and_std_per_prompt(
    one_prompt, lone, torch.ones(4), leave_one_out_baseline=False
)
print("the others' deviation:", [round(s, 3) for s in left_out.tolist()])
print("the group's deviation:", [round(s, 3) for s in with_all.tolist()])
# A filter on a deviation that is not zero keeps the whole group, or all of it but the success.
assert (with_all != 0).all()
kept = lone[left_out != 0]
assert kept.tolist() == [0.0, 0.0, 0.0]
assert not advantages_of(kept[None]).any()  # and then nothing is left to learn

# %%
#| label: gspo-world
GSPO = ClippedPGLossConfig(
    sequence_level_importance_ratios=True,
    token_level_loss=False,
    reference_policy_kl_penalty=0.0,
    ratio_clip_min=1.0,  # nothing is clipped for a negative advantage
)
ended = World(vocab=3, horizon=3, end=0)
old, new = ended.policy(seed=2).detach(), ended.policy(seed=3)
tokens = ended.mask.sum(1)  # the length of each answer
whole_ratio = (ended.logprob(new) - ended.logprob(old)).exp().detach()


def batch_of(rows, advantages, old_logprobs):
    """NeMo RL's batch of some answers of the world."""
    pad = torch.nn.functional.pad
    stored = pad(old_logprobs[rows], (1, 0))
    return {
        "token_mask": pad(ended.mask[rows], (1, 0)),
        "sample_mask": torch.ones(len(ended.mask[rows]), dtype=torch.float64),
        "advantages": advantages[rows, None].expand(-1, ended.mask.shape[1] + 1),
        "prev_logprobs": stored,
        "generation_logprobs": stored,
    }


# %%
#| label: thm-gspo-ratio
#| num: gspo-error = {geometric_error:.0e}
#| num: gspo-mean = {root_mean:.3f}
minus_one = -torch.ones(len(ended), dtype=torch.float64)
new_tokens, old_tokens = ended.token_logprobs(new), ended.token_logprobs(old)
ratios = torch.zeros(len(ended), dtype=torch.float64)
for row in range(len(ended)):  # the loss of an answer with advantage -1 is its ratio
    one, one_answer = slice(row, row + 1), batch_of(slice(row, row + 1), minus_one, old_tokens)
    ratios[row] = ClippedPGLossFn(GSPO)(
        new_tokens[one], one_answer, torch.tensor(1.0), tokens[row]
    )[0]
geometric_error = (ratios - whole_ratio ** (1 / tokens)).abs().max().item()
assert geometric_error < 1e-7  # 1e-8 is added to each count
# The whole ratio corrects for the change of policy, its root does not.
assert abs(expect(ended.logprob(old), whole_ratio).item() - 1) < 1e-12
root_mean = expect(ended.logprob(old), ratios).item()
assert root_mean < 0.99


# %%
#| label: thm-cispo-gradient
def slope(ratio, advantage, **flags):
    """Weight of a token's log-probability in the gradient of minus its loss."""
    loss_fn = ClippedPGLossFn(ClippedPGLossConfig(reference_policy_kl_penalty=0.0, **flags))
    logprob = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    previous = logprob.detach() - torch.tensor([[0.0, ratio]], dtype=torch.float64).log()
    token = {
        "token_mask": torch.tensor([[0.0, 1.0]], dtype=torch.float64),
        "sample_mask": torch.ones(1, dtype=torch.float64),
        "advantages": torch.full((1, 2), advantage, dtype=torch.float64),
        "prev_logprobs": previous,
        "generation_logprobs": previous,
    }
    loss = loss_fn(logprob, token, torch.tensor(1.0), torch.tensor(1.0))[0]
    return 0.0 - torch.autograd.grad(loss, logprob)[0].item()


print(" ratio  advantage     PPO   CISPO")
for ratio, advantage in ((1.5, 1.0), (0.5, -1.0), (1.1, 1.0), (1.5, -1.0)):
    ppo, cispo = slope(ratio, advantage), slope(ratio, advantage, use_cispo=True)
    print(f"{ratio:6.1f} {advantage:10.0f} {ppo:7.2f} {cispo:7.2f}")
    assert abs(cispo - min(max(ratio, 0.8), 1.2) * advantage) < 1e-7
    assert (ppo == 0.0) == ((ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0))

# %%
#| label: thm-gdpo-resolution
#| num: gdpo-one = {decoupled[1].item():.2f}
#| num: gdpo-both = {decoupled[3].item():.2f}
from nemo_rl_ref.algorithms.advantage_estimator import GDPOAdvantageEstimator

# Two prompts, two answers each. The second answer fulfills one of two criteria, or both.
correct = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
format_ok = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=torch.float64)
mean_config = AdvEstimatorConfig(use_leave_one_out_baseline=False)
summed = advantages_of((correct + format_ok).reshape(2, 2), use_leave_one_out_baseline=False)
decoupled = GDPOAdvantageEstimator(mean_config, ClippedPGLossConfig()).compute_advantage(
    torch.tensor([[0], [0], [1], [1]]),
    None,
    torch.ones(4, 1),
    {"reward/correct": correct, "reward/format": format_ok},
)[:, 0]
print("GRPO on the sum:", [round(a, 3) for a in summed.flatten().tolist()])
print("GDPO:           ", [round(a, 3) for a in decoupled.tolist()])
assert torch.allclose(summed[0], summed[1], atol=1e-5)  # one criterion or both: the same
assert abs(decoupled[3] / decoupled[1] - 2).item() < 1e-12

# %%
#| label: thm-length-bias
#| num: length-constant-error = {constant_error:.0e}
#| num: length-answer-error = {answer_error:.0e}
#| num: length-degrees = {angle:.0f}
from nemo_rl_ref.custom.policy_gradient import DrGRPOLossFn

policy = ended.policy(1.5)
log_y = ended.logprob(policy)
correctness = torch.zeros(len(ended), dtype=torch.float64)
correctness[::2] = 1.0
centered = correctness - expect(log_y, correctness).detach()


def pulled(loss_fn):
    """Minus the gradient of a loss, each answer in proportion to its probability."""
    now = ended.token_logprobs(policy)
    batch = batch_of(slice(None), centered * log_y.detach().exp() * len(ended), now.detach())
    return -gradient(loss_fn(now, batch, torch.tensor(len(ended)), tokens.sum())[0], policy)


plain = {"reference_policy_kl_penalty": 0.0}
answer_mean = pulled(ClippedPGLossFn(ClippedPGLossConfig(token_level_loss=False, **plain)))
constant = pulled(DrGRPOLossFn(ClippedPGLossConfig(max_response_length=3, **plain)))
per_token = gradient(expect(log_y, centered / tokens), policy)
constant_error = (constant - gradient(expect(log_y, correctness), policy) / 3).abs().max().item()
answer_error = (answer_mean - per_token).abs().max().item()
assert constant_error < 1e-8 and answer_error < 1e-7
angle = math.degrees(math.acos(cosine(answer_mean, constant)))
assert angle > 1

# %% [markdown]
# ## Sums that micro-batches share

# %%
#| label: thm-micro-batches
#| num: micro-error = {share_error:.0e}
#| num: share-splits = {len(splits)}
#| num: share-off = {100 * relative:.0f}
batch_rows = torch.tensor([0, 2, 5, 9, 12, 14])
counts = torch.tensor(6.0), tokens[batch_rows].sum()  # of the global batch


def summed_gradient(split, token_level, by_own_count=False):
    """Gradient of the added losses of micro-batches; or of their mean, each by its own count."""
    loss_fn = ClippedPGLossFn(ClippedPGLossConfig(token_level_loss=token_level, **plain))
    total = 0.0
    for rows in batch_rows.split(split):
        own = torch.tensor(float(len(rows))), tokens[rows].sum()
        batch = batch_of(rows, centered, ended.token_logprobs(policy).detach())
        share = loss_fn(
            ended.token_logprobs(policy)[rows], batch, *(own if by_own_count else counts)
        )
        total = total + share[0] / (len(split) if by_own_count else 1)
    return gradient(total, policy)


splits = ([6], [1] * 6, [3, 3], [1, 5], [4, 1, 1], [2, 2, 2])
share_error = max(
    (summed_gradient(split, level) - summed_gradient([6], level)).abs().max().item()
    for split in splits
    for level in (True, False)
)
off = (summed_gradient([1, 5], True, by_own_count=True) - summed_gradient([6], True)).abs().max()
assert share_error < 1e-12 and off > 1e-3
relative = (off / summed_gradient([6], True).abs().max()).item()

# %%
#| label: fig-token-weights
#| alt: Weight of one token against the length of its answer, in a batch of answers of 1 to 16
#|   tokens. The mean over tokens and Dr. GRPO's constant are flat lines. The mean over answers
#|   falls as one over the length: a token of the shortest answer weighs sixteen times one of the
#|   longest.
#| caption: What a token weighs, by the length of its answer, in a batch of sixteen answers of 1 to
#|   16 tokens with advantage 1.
#| num: weight-ratio = {(by_answer[0] / by_answer[-1]).item():.0f}
each_length = torch.arange(1, 17)
ladder_mask = (torch.arange(17) >= 1) & (torch.arange(17) <= each_length[:, None])
ladder = {
    "token_mask": ladder_mask.double(),
    "sample_mask": torch.ones(16, dtype=torch.float64),
    "advantages": torch.ones(16, 17, dtype=torch.float64),
    "prev_logprobs": torch.zeros(16, 17, dtype=torch.float64),
    "generation_logprobs": torch.zeros(16, 17, dtype=torch.float64),
}


def first_token(loss_fn):
    """Weight of the first token of each answer."""
    logprobs = torch.zeros(16, 16, dtype=torch.float64, requires_grad=True)
    loss = loss_fn(logprobs, ladder, torch.tensor(16.0), ladder_mask.sum())[0]
    return -torch.autograd.grad(loss, logprobs)[0][:, 0]


weights = {
    "mean over tokens": first_token(ClippedPGLossFn(ClippedPGLossConfig(**plain))),
    "mean over answers": first_token(
        ClippedPGLossFn(ClippedPGLossConfig(token_level_loss=False, **plain))
    ),
    "constant, 16 tokens": first_token(
        DrGRPOLossFn(ClippedPGLossConfig(max_response_length=16, **plain))
    ),
}
figure, (axis,) = panels(1)
for (name, weight), style in zip(weights.items(), LINES, strict=False):
    axis.plot(each_length, weight, label=name, **style)
axis.set(xlabel="tokens of the answer", ylabel="weight of a token", ylim=(0, None))
axis.legend()
by_answer = weights["mean over answers"]
assert torch.allclose(by_answer * each_length, by_answer[:1])
assert weights["mean over tokens"].unique().numel() == 1

# %% [markdown]
# ## Estimators of the KL divergence: k1, k2, k3

# %%
#| label: thm-kl-values
#| num: kl-exact = {exact:.3f}
#| num: kl-mean-error = {error:.0e}
#| num: kl-k2-mean = {means['k2']:.3f}
import torch

from nemo_rl_ref.algorithms.utils import calculate_kl
from nemo_rl_ref.equations.world import World, ascend, expect, gradient, kl

world = World(vocab=3, horizon=3)
policy, reference, older = (world.policy(seed=seed) for seed in (1, 2, 3))
log_pi, log_ref, log_old = (world.logprob(p).detach() for p in (policy, reference, older))
exact = kl(log_pi, log_ref)


def estimates(kind, log_p=log_pi, weights=None):
    """NeMo RL's estimate for every answer, without clamps."""
    return calculate_kl(log_p, log_ref, kind, None, None, weights)


means = {kind: expect(log_pi, estimates(kind)) for kind in ("k1", "k2", "k3")}
error = max(abs(means[kind] - exact) for kind in ("k1", "k3"))
gap = means["k2"] - exact
assert error < 1e-12 < abs(gap)

# %%
#| label: thm-kl-off-policy
#| num: kl-off-k1 = {off_policy['k1']:+.2f}
#| num: kl-off-k2 = {off_policy['k2']:+.2f}
#| num: kl-off-k3 = {off_policy['k3']:+.2f}
#| num: kl-off-error = {error:.0e}
#| num: kl-weighted-error = {weighted_error:.0e}
off_policy = {kind: expect(log_old, estimates(kind)) - exact for kind in ("k1", "k2", "k3")}
predicted = kl(log_old, log_ref) - kl(log_old, log_pi) - exact
k3_extra = expect(log_old, (log_ref - log_pi).exp()) - 1

weights = (log_pi - log_old).exp()
repaired = [expect(log_old, estimates(kind, weights=weights)) - exact for kind in ("k1", "k3")]

error = max(map(abs, (off_policy["k1"] - predicted, off_policy["k3"] - predicted - k3_extra)))
weighted_error = max(map(abs, repaired))
assert error < 1e-12 and weighted_error < 1e-12
assert all(abs(bias) > 0.1 for bias in off_policy.values())

# %%
#| label: fig-kl-estimators
#| alt: Two panels over the divergence on a logarithmic axis: mean and standard deviation of k1,
#|   k2 and k3, each divided by the divergence. The means of k1 and k3 stay at 1, that of k2
#|   leaves it. The standard deviation of k1 is largest where the divergence is small, that
#|   of k3 where it is large.
#| caption: Mean (above) and standard deviation (below) of one sample's estimate, divided by the
#|   divergence that it estimates, as a policy moves away from the reference. Exact sums over
#|   all answers, drawn from the policy.
from nemo_rl_ref.show.figures import LINES, panels

start, direction = reference.detach(), world.policy(seed=4).detach()
steps = torch.logspace(-1.6, 0.7, 16, dtype=torch.float64)
rows = []
for step in steps:
    log_p = world.logprob(start + step * direction)
    found = [estimates(kind, log_p) for kind in ("k1", "k2", "k3")]
    size = kl(log_p, log_ref)
    spread = [variance(log_p, f).sqrt() / size for f in found]
    rows.append([size, *(expect(log_p, f) / size for f in found), *spread])
table = torch.tensor(rows)

figure, axes = panels(2)
for column, kind in enumerate(("k1", "k2", "k3")):
    for axis, first in zip(axes, (1, 4), strict=True):
        axis.plot(table[:, 0], table[:, first + column], label=kind, **LINES[column])
axes[0].set(xscale="log", ylabel="mean / KL", title="Mean")
axes[1].set(xscale="log", yscale="log", ylabel="std / KL", title="Standard deviation")
axes[1].set_xlabel("KL(policy || reference), nats")
axes[0].legend()

# %%
#| label: kl-variance-numbers
#| num: kl-value-near = {near[0]:.0e}
#| num: kl-near-k1 = {near[4]:.0f}
#| num: kl-near-k3 = {near[6]:.1f}
#| num: kl-value-far = {far[0]:.1f}
#| num: kl-far-k1 = {far[4]:.2f}
#| num: kl-far-k3 = {far[6]:.1f}
near, far = table[0], table[-1]
assert near[6] < near[4] and far[6] > far[4]  # k3's standard deviation against k1's

# %%
#| label: thm-kl-gradients
#| num: kl-gradient-error = {error:.0e}
#| num: kl-k3-cosine = {cosine:.2f}
log_p = world.logprob(policy)  # the same policy, now with a gradient
averages = {kind: expect(log_pi, estimates(kind, log_p)) for kind in ("k1", "k2", "k3")}
slopes = {kind: gradient(average, policy) for kind, average in averages.items()}

wanted = gradient(kl(log_p, log_ref), policy)
other = gradient(kl(log_ref, log_p), policy)
errors = [slopes["k1"], slopes["k2"] - wanted, slopes["k3"] - other]
error = max(e.abs().max() for e in errors)
cosine = torch.cosine_similarity(slopes["k3"].flatten(), wanted.flatten(), dim=0)
assert error < 1e-12 and cosine < 0.99

# %%
#| label: kl-loss-gradient
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig, ClippedPGLossFn

ONE = torch.tensor(1 - 1e-8, dtype=torch.float64)  # NeMo RL's mean adds 1e-8 to a count


def loss_gradient(world, policy, config, **tensors):
    """Gradient of NeMo RL's loss, averaged exactly over all answers that the policy gives."""
    log_p = world.token_logprobs(policy)
    weights = world.mask * log_p.sum(-1, keepdim=True).exp()
    batch = {"token_mask": weights, "prev_logprobs": log_p, "generation_logprobs": log_p, **tensors}
    batch.setdefault("advantages", torch.zeros_like(log_p))
    batch = {k: torch.nn.functional.pad(v.detach(), (1, 0)) for k, v in batch.items()}
    batch |= {"input_ids": batch["token_mask"].long(), "sample_mask": torch.ones(len(world))}
    loss, _ = ClippedPGLossFn(config)(log_p, batch, global_valid_seqs=ONE, global_valid_toks=ONE)
    return gradient(loss, policy)


# %%
#| label: thm-kl-weight
#| num: kl-weight-error = {error:.0e}
tokens = World(vocab=5, horizon=1)  # answers of one token
student, anchor = tokens.policy(seed=1), tokens.policy(seed=2).detach()
anchor_logprobs = tokens.token_logprobs(anchor)
wanted = gradient(kl(tokens.logprob(student), tokens.logprob(anchor)), student)
error = 0.0
for kind in ("k1", "k3"):
    config = ClippedPGLossConfig(reference_policy_kl_penalty=1.0, reference_policy_kl_type=kind)
    found = loss_gradient(tokens, student, config, reference_policy_logprobs=anchor_logprobs)
    error = max(error, (found - wanted).abs().max().item())
assert error < 1e-12

# %%
#| label: thm-kl-later-tokens
#| num: kl-later-error = {error:.0e}
#| num: kl-later-missing = {100 * missing:.0f}
config = ClippedPGLossConfig(reference_policy_kl_penalty=1.0, reference_policy_kl_type="k1")
token_ref = world.token_logprobs(reference).detach()
found = loss_gradient(world, policy, config, reference_policy_logprobs=token_ref)

# Divergence of each token, weighted by how often its prefix is reached; that weight stays fixed.
token_log_ratios = world.token_logprobs(policy) - token_ref
table_pi, table_ref = (torch.log_softmax(p, -1) for p in (policy, reference.detach()))
per_state = (table_pi.exp() * (table_pi - table_ref)).sum(-1)
frozen = expect(log_pi, (per_state[world.prefixes] * world.mask).sum(-1))
# Each token answers for the log-ratios from its own on.
to_go = token_log_ratios.flip(-1).cumsum(-1).flip(-1).detach()
complete = expect(log_pi, (world.token_logprobs(policy) * to_go).sum(-1))

wanted = gradient(kl(world.logprob(policy), log_ref), policy)
error = max(
    (found - gradient(frozen, policy)).abs().max(),
    (gradient(complete, policy) - wanted).abs().max(),
)
missing = (found - wanted).norm() / wanted.norm()
assert error < 1e-12 and missing > 0.01

# %%
#| label: kl-clamps
#| num: kl-clamp-low = {low:.1f}
#| num: kl-clamp-factor = {(-low).exp():.0f}
#| num: kl-clamp-high = {high:.0f}
ratios = torch.linspace(-15, 15, 300_001, dtype=torch.float64).requires_grad_()  # log(pi / ref)
clamped = calculate_kl(ratios, torch.zeros_like(ratios), "k3")
alive = gradient(clamped.sum(), ratios) != 0
low, high = ratios[alive].min(), ratios[alive].max()
assert not alive[ratios < low].any() and not alive[ratios > high].any()

# %% [markdown]
# ## On-policy and multi-teacher distillation

# %%
#| label: distillation-loss
from nemo_rl_ref.algorithms.loss import DistillationLossConfig, DistillationLossFn


def distil(student, teacher, k, **config):
    """NeMo RL's loss at one position, its log-probabilities made as its trainer makes them."""
    fn = DistillationLossFn(DistillationLossConfig(**config))
    student, (kept, places) = torch.log_softmax(student, -1), teacher.topk(k)
    negative_entropy = (student.exp() * student).sum()
    inside = student[places] if fn.zero_outside_topk else torch.log_softmax(student[places], -1)
    data = {
        "input_ids": torch.zeros(1, 2),
        "token_mask": torch.ones(1, 2),
        "sample_mask": torch.ones(1),
    }
    rows = (
        inside[None, None],
        torch.log_softmax(kept, -1)[None, None],
        negative_entropy[None, None],
    )
    return fn(*rows, data, None, ONE)[0]


# %%
#| label: thm-distillation-topk
#| num: kd-blind = {max(map(abs, losses.values())):.0e}
#| num: kd-full = {all_tokens:.2f}
#| num: kd-outside = {outside['reverse']:.0f}
#| num: kd-outside-mixed = {outside['mixed']:.0f}
#| num: kd-outside-forward = {outside['forward']:.2f}
teacher = torch.tensor([0.6, 0.3, 0.06, 0.04], dtype=torch.float64).log()
student = torch.tensor([0.3, 0.15, 0.05, 0.5], dtype=torch.float64).log()  # half elsewhere
kinds = ("forward", "reverse", "mixed")
losses = {kind: distil(student, teacher, 2, kl_type=kind) for kind in kinds}
all_tokens = distil(student, teacher, 4, kl_type="forward")
outside = {
    kind: distil(student, teacher, 2, kl_type=kind, zero_outside_topk=True) for kind in kinds
}
assert max(map(abs, losses.values())) < 1e-12  # blind
assert all(loss > 0.5 for loss in outside.values())  # not one of the three is blind with the key

# %%
#| label: thm-opd
#| num: opd-error = {error:.0e}
from nemo_rl_ref.algorithms.advantage_estimator import OPDAdvantageEstimator

token_teacher = world.token_logprobs(older).detach()
advantages = OPDAdvantageEstimator({}, None).compute_advantage(
    None,
    None,
    world.mask,
    teacher_logprobs=token_teacher,
    prev_logprobs=world.token_logprobs(policy),
)
mean_advantage = expect(log_pi, advantages.sum(-1))
config = ClippedPGLossConfig(disable_ppo_ratio=True, reference_policy_kl_penalty=0.0)
found = loss_gradient(world, policy, config, advantages=advantages)

table_teacher = torch.log_softmax(older.detach(), -1)
table_pi = torch.log_softmax(policy, -1)
per_state = (table_pi.exp() * (table_pi - table_teacher)).sum(-1)
frozen = expect(log_pi, (per_state[world.prefixes] * world.mask).sum(-1))
error = max(
    (found - gradient(frozen, policy)).abs().max(), abs(mean_advantage + kl(log_pi, log_old))
)
assert error < 1e-12

# %%
#| label: thm-teachers
#| num: teachers-error = {error:.0e}
#| num: teachers-apart = {apart:.2f}
tokens = World(vocab=6, horizon=1)
one, two = (tokens.logprob(tokens.policy(1.5, seed=seed).detach()) for seed in (5, 8))
share = 0.5  # weight of each teacher
geometric = torch.log_softmax(share * one + share * two, dim=0)
arithmetic = torch.logaddexp(one, two) + torch.tensor(share).double().log()


def reverse(logits):
    return -sum(share * kl(tokens.logprob(logits), teacher) for teacher in (one, two))


def forward(logits):
    return -sum(share * kl(teacher, tokens.logprob(logits)) for teacher in (one, two))


start = torch.zeros(1, 6, dtype=torch.float64)
best_reverse, best_forward = (tokens.logprob(ascend(f, start)) for f in (reverse, forward))
error = max(
    (best_reverse.exp() - geometric.exp()).abs().max(),
    (best_forward.exp() - arithmetic.exp()).abs().max(),
)
apart = (geometric.exp() - arithmetic.exp()).abs().max()
assert error < 1e-6 < apart

# %%
#| label: fig-teachers
#| alt: Probability of six tokens under two teachers and under their arithmetic and geometric
#|   mean. The arithmetic mean keeps what either teacher prefers; the geometric mean is low
#|   wherever one of the teachers is.
#| caption: Two teachers, and what a student becomes that minimizes the forward KL (arithmetic mean)
#|   or the reverse KL (geometric mean) to both.
figure, axes = panels(1)
places = [p.item() for p in tokens.answers[:, 0]]
curves = {
    "teacher 1": one,
    "teacher 2": two,
    "arithmetic mean": arithmetic,
    "geometric mean": geometric,
}
for style, (name, log_p) in zip(LINES, curves.items(), strict=False):
    axes[0].plot(places, log_p.exp(), label=name, **style)
axes[0].set(xlabel="token", ylabel="probability")
axes[0].legend()

# %% [markdown]
# ## What follows for scale

# %%
#| label: group-estimates
import math

import torch

from nemo_rl_ref.algorithms.advantage_estimator import AdvEstimatorConfig, GRPOAdvantageEstimator
from nemo_rl_ref.algorithms.loss import ClippedPGLossConfig
from nemo_rl_ref.equations.world import World, expect, gradient, groups, kl, variance

few = World(vocab=2, horizon=2)
logits = few.policy(seed=1)
log_p = few.logprob(logits)
reward = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
scores = torch.stack([gradient(lp, logits).flatten() for lp in log_p])
log_p = log_p.detach()
estimator = GRPOAdvantageEstimator(
    AdvEstimatorConfig(normalize_rewards=False), ClippedPGLossConfig()
)


def estimate(size):
    """The gradient estimate of every group, and the log-probability of the group."""
    members, log_group = groups(log_p, size)
    prompts = torch.arange(len(members)).repeat_interleave(size)[:, None]
    A = estimator.compute_advantage(prompts, reward[members].flatten(), torch.ones(len(prompts), 1))
    return (A.reshape(-1, size, 1) * scores[members]).mean(1), log_group


# %%
#| label: thm-group-variance
#| num: group-variance-error = {error:.0e}
#| num: group-variance-ratio = {exact[0] / exact[2]:.2f}
slope = expect(log_p, reward[:, None] * scores)
spread = (variance(log_p, reward) * variance(log_p, scores) + slope**2).sum()
single = variance(log_p, (reward - expect(log_p, reward))[:, None] * scores).sum()
sizes = [2, 3, 4, 5, 6]
exact = [variance(log_group, g).sum().item() for g, log_group in map(estimate, sizes)]
law = [(single / G + spread / (G * (G - 1))).item() for G in sizes]
error = max(abs(a - b) for a, b in zip(exact, law, strict=True))
assert error < 1e-12

# %%
#| label: group-outcomes
from nemo_rl_ref.algorithms.utils import calculate_baseline_and_std_per_prompt


def outcomes(G, p):
    """Every group of G rewards 0 or 1, its log-probability, and NeMo RL's spread of each sample."""
    right, log_group = groups(torch.tensor([1 - p, p], dtype=torch.float64).log(), G)
    prompts = torch.arange(len(right)).repeat_interleave(G)[:, None]
    rewards = right.double().flatten()
    _, std = calculate_baseline_and_std_per_prompt(prompts, rewards, torch.ones_like(rewards))
    return right, log_group, std.reshape(-1, G)


# %%
#| label: thm-no-signal
#| num: silent-group = {G}
#| num: silent-rate = {p:.2f}
#| num: silent-error = {error:.0e}
#| num: silent-percent = {100 * silent:.0f}
#| num: silent-cost = {1 / (1 - silent):.1f}
#| num: alone-percent = {100 * alone:.0f}
G, p = 8, 0.05
right, log_group, std = outcomes(G, p)
silent = expect(log_group, (right.sum(-1) % G == 0).double())
error = abs(silent - (p**G + (1 - p) ** G))
one_right = right.sum(-1) == 1
dropped = std[one_right] == 0  # what a filter on std != 0 takes out
assert error < 1e-12 and (dropped == right[one_right].bool()).all()
alone = expect(log_group, one_right.double()) / (1 - silent)

# %%
#| label: fig-group-size
#| alt: Above: variance of the gradient estimate against group size 2 to 6; the exact points lie
#|   on the law and above the line V/G. Below: probability that a group carries a signal
#|   against the success rate for groups of 4, 8, 16 and 64; larger groups keep a signal
#|   closer to rates of 0 and 1.
#| caption: Above: variance of a group's gradient estimate, over all groups, and what it would be
#|   with the expected reward as baseline. Below: probability that a group of G answers is
#|   not all right and not all wrong.
figure, axes = panels(2)
axes[0].plot(sizes, exact, label="leave-one-out baseline", **LINES[0])
axes[0].plot(sizes, [single / G for G in sizes], label="expected reward as baseline", **LINES[1])
axes[0].set(xlabel="group size G", ylabel="variance", xticks=sizes)
rates = torch.linspace(0, 1, 41)
for style, G in zip(LINES, (4, 8, 16, 64), strict=False):
    axes[1].plot(rates, 1 - rates**G - (1 - rates) ** G, label=f"G = {G}", markevery=5, **style)
axes[1].set(xlabel="success rate p", ylabel="P(signal)")
for axis in axes:
    axis.legend()


# %%
#| label: thm-ess
#| num: ess-error = {error:.0e}
#| num: ess-half-kl = {half:.2f}
def ess_share(log_new, log_sampler):
    """1 / E[ratio^2] under the sampler: the share of the samples that count."""
    return 1 / expect(log_sampler, (2 * (log_new - log_sampler)).exp())


sampler = world.policy(seed=2).detach()
log_sampler = world.logprob(sampler)
drift = [world.logprob(sampler + step * direction) for step in torch.linspace(0, 2, 21).double()]
shares = torch.stack([ess_share(log_new, log_sampler) for log_new in drift])
renyi = torch.stack([torch.logsumexp(2 * log_new - log_sampler, 0) for log_new in drift])
moved = torch.stack([kl(log_new, log_sampler) for log_new in drift])

assert (shares - (-renyi).exp()).abs().max() < 1e-12


def share_of_pairs(log_new, log_sampler):
    """What two weighted samples are worth: signs of variance 1, over all pairs of samples."""
    ratio = (log_new - log_sampler).exp()
    pairs, log_pair = groups(torch.cat([log_sampler, log_sampler]) - math.log(2), 2)
    return 1 / (2 * variance(log_pair, torch.cat([ratio, -ratio])[pairs].mean(-1)))


by_pairs = torch.stack([share_of_pairs(log_new, log_sampler) for log_new in drift])
error = (shares - by_pairs).abs().max()
assert error < 1e-12
assert (shares.diff() < 0).all()  # each step further away costs samples
assert (shares <= (-moved).exp() + 1e-12).all()
half = moved[(shares - 0.5).abs().argmin()]

# %%
#| label: thm-ess-length
#| num: ess-token = {by_length[0]:.3f}
#| num: ess-tokens-to-half = {tokens_to_half:.0f}
one_token = World(vocab=4, horizon=1)
stale = one_token.policy(seed=1).detach()
fresh = stale + 0.2 * one_token.policy(seed=2).detach()  # each token's distribution moves a little
lengths = [1, 2, 3, 4, 5, 6]
by_length = []
for length in lengths:
    longer = World(vocab=4, horizon=length)
    log_new, log_sampler = (longer.logprob(p.expand(longer.states, 4)) for p in (fresh, stale))
    by_length.append(ess_share(log_new, log_sampler))
error = max(abs(share - by_length[0] ** n) for share, n in zip(by_length, lengths, strict=True))
assert error < 1e-12
tokens_to_half = torch.tensor(0.5).double().log() / by_length[0].log()

# %%
#| label: fig-ess
#| alt: Above: share of effective samples against the divergence of the policy from the sampler;
#|   it falls faster than exp(-KL). Below: the share against the answer's length, which falls
#|   geometrically.
#| caption: Share of effective samples as the policy moves away from the sampler (above), with the
#|   bound exp(-KL), and for answers of more tokens, each moved by the same amount (below).
figure, axes = panels(2)
axes[0].plot(moved, shares, label="ESS / N", **LINES[0])
axes[0].plot(moved, (-moved).exp(), label="exp(-KL)", **LINES[1])
axes[0].set(xlabel="KL(policy || sampler), nats", ylabel="ESS / N")
axes[0].legend()
axes[1].plot(lengths, by_length, **LINES[0])
axes[1].set(xlabel="tokens of the answer", ylabel="ESS / N")
