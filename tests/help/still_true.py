# SPDX-License-Identifier: Apache-2.0
"""Changes that leave an equation true, so that no check could notice them.

By label: the reason, and the LaTeX of each changed right-hand side.
"""

STILL_TRUE: dict[str, dict[str, tuple[str, ...]]] = {
    "k3-mean": {
        "the mean of pi_ref / pi - 1 under the policy is zero": (
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ -\log \frac{\pi_{\mathrm{ref}}(y \mid x)}{\pi_\theta(y \mid x)} \right]",
            r"\mathrm{KL}(\, \pi_\theta \,\|\, \pi_{\mathrm{ref}} \,)",
        ),
    },
    "k2-mean": {
        "a variance does not change when a constant is added": (
            r"\frac{1}{2} \mathrm{Var}_{y \sim \pi_\theta}\left[ \log \frac{\frac{3}{2} \pi_\theta(y \mid x)}{\pi_{\mathrm{ref}}(y \mid x)} \right] + \frac{1}{2} \mathrm{KL}(\, \pi_\theta \,\|\, \pi_{\mathrm{ref}} \,)^{2}",
            r"\frac{1}{2} \mathrm{Var}_{y \sim \pi_\theta}\left[ \log \frac{\pi_\theta(y \mid x)}{\frac{3}{2} \pi_{\mathrm{ref}}(y \mid x)} \right] + \frac{1}{2} \mathrm{KL}(\, \pi_\theta \,\|\, \pi_{\mathrm{ref}} \,)^{2}",
        ),
    },
    "kl-gradient": {
        "the mean score is zero, so a constant beside the log-ratio adds nothing": (
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ s(y) \log \frac{\frac{3}{2} \pi_\theta(y \mid x)}{\pi_{\mathrm{ref}}(y \mid x)} \right]",
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ s(y) \log \frac{\pi_\theta(y \mid x)}{\frac{3}{2} \pi_{\mathrm{ref}}(y \mid x)} \right]",
        ),
    },
    "k1-gradient": {
        "a factor of a sum that is zero": (
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ \frac{3}{2} s(y) \right]",
            r"\mathbb{E}_{y \sim \pi_\theta}[s(y)]",
        ),
    },
    "k2-gradient": {
        "the mean score is zero, so a constant beside the log-ratio adds nothing": (
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ s(y) \log \frac{\frac{3}{2} \pi_\theta(y \mid x)}{\pi_{\mathrm{ref}}(y \mid x)} \right]",
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ s(y) \log \frac{\pi_\theta(y \mid x)}{\frac{3}{2} \pi_{\mathrm{ref}}(y \mid x)} \right]",
        ),
    },
    "k3-gradient": {
        "the mean score is zero, so a constant beside the ratio adds nothing": (
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ s(y) \, \left( -\frac{\pi_{\mathrm{ref}}(y \mid x)}{\pi_\theta(y \mid x)} \right) \right]",
        ),
    },
    "kl-weighted-gradient": {
        "the mean score is zero, so a constant beside the log-ratio adds nothing": (
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ s(y) \log \frac{\frac{3}{2} \pi_\theta(y \mid x)}{\pi_{\mathrm{ref}}(y \mid x)} \right]",
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ s(y) \log \frac{\pi_\theta(y \mid x)}{\frac{3}{2} \pi_{\mathrm{ref}}(y \mid x)} \right]",
        ),
    },
    "kl-in-reward": {
        "the mean score is zero, so a constant beside the log-ratio adds nothing": (
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ s(y) \, \left( r(x, y) - \beta \log \frac{\frac{3}{2} \pi_\theta(y \mid x)}{\pi_{\mathrm{ref}}(y \mid x)} \right) \right]",
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ s(y) \, \left( r(x, y) - \beta \log \frac{\pi_\theta(y \mid x)}{\frac{3}{2} \pi_{\mathrm{ref}}(y \mid x)} \right) \right]",
        ),
    },
    "k3-in-reward": {
        "the mean score is zero, so a constant beside the log-ratio adds nothing": (
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ s(y) \log \frac{\frac{3}{2} \pi_\theta(y \mid x)}{\pi_{\mathrm{ref}}(y \mid x)} \right] + \mathbb{E}_{y \sim \pi_{\mathrm{ref}}}[s(y)]",
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ s(y) \log \frac{\pi_\theta(y \mid x)}{\frac{3}{2} \pi_{\mathrm{ref}}(y \mid x)} \right] + \mathbb{E}_{y \sim \pi_{\mathrm{ref}}}[s(y)]",
        ),
    },
    "opd-gradient": {
        "the mean score is zero, so a constant beside the log-ratio adds nothing": (
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ s(y) \log \frac{\frac{3}{2} \pi_\theta(y \mid x)}{\pi_{\mathrm{T}}(y \mid x)} \right]",
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ s(y) \log \frac{\pi_\theta(y \mid x)}{\frac{3}{2} \pi_{\mathrm{T}}(y \mid x)} \right]",
        ),
    },
    "score-mean": {
        "every multiple of zero is zero": (
            r"\sum_{y} \frac{3}{2} \nabla_\theta \pi_\theta(y \mid x)",
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ \frac{3}{2} \nabla_\theta \log \pi_\theta(y \mid x) \right]",
            r"\mathbb{E}_{y \sim \pi_\theta}[\nabla_\theta \log \pi_\theta(y \mid x)]",
        ),
    },
    "baseline-gradient": {
        "any baseline drops out: that is what the equation says": (
            r"\mathbb{E}_{y \sim \pi_\theta}[r(x, y) \nabla_\theta \log \pi_\theta(y \mid x)]",
            r"\mathbb{E}_{y \sim \pi_\theta}[(r(x, y) + b) \nabla_\theta \log \pi_\theta(y \mid x)]",
            r"\mathbb{E}_{y \sim \pi_\theta}\left[ \left( r(x, y) - \frac{3}{2} b \right) \nabla_\theta \log \pi_\theta(y \mid x) \right]",
        ),
    },
}
