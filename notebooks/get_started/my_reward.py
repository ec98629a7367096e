def reward(prompt, response, ground_truth):
    """1 for the right sum, and a tenth for each right digit in its place."""
    if response.strip() == ground_truth:
        return 1.0
    right = sum(a == b for a, b in zip(response.strip(), ground_truth, strict=False))
    return 0.1 * right / len(ground_truth)
