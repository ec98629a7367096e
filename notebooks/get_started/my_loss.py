from torch.nn.functional import logsigmoid

from nemo_rl_ref.algorithms.loss import DPOLossFn
from nemo_rl_ref.algorithms.utils import masked_mean


class MyLoss(DPOLossFn):
    """DPO that asks each pair for a margin: -log σ(β (h_w - h_l) - margin)."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.margin = getattr(cfg, "margin", 0.5)  # the key dpo.margin

    def _preference_loss(self, rewards, sample_mask, global_valid_seqs, beta=1.0):
        _, *metrics = super()._preference_loss(rewards, sample_mask, global_valid_seqs, beta)
        chosen, rejected = self.split_output_tensor(rewards)
        losses = -logsigmoid(beta * (chosen - rejected) - self.margin)
        pairs = global_valid_seqs / 2  # of the whole batch, over all GPUs: never losses.mean()
        loss = masked_mean(losses, sample_mask[::2], global_normalization_factor=pairs)
        return loss, *metrics
