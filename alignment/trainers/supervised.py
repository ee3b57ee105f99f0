"""`SupervisedTrainer`: TRL's SFTTrainer on rows that are tokens already. Which tokens: `alignment.data.supervised`."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTTrainer

from alignment.models.ends import settle_ends
from alignment.trainers.card import CardTrainer
from alignment.trainers.collation import LengthGroupedSampler, train_sampler
from alignment.trainers.finite import FiniteTrainer
from alignment.trainers.metrics import EpochOrder


class SupervisedTrainer(FiniteTrainer, CardTrainer, SFTTrainer):
    """TRL's SFTTrainer on rows that are tokens already, in the batches of preference training.

    Args:
        train_dataset, eval_dataset: columns `input_ids` and `labels` (-100: not learned), cut to length.
        group_by_length: global batches of like length (`LengthGroupedSampler`).
        more: as in TRL; `on_nan` of `FiniteTrainer`.
    """

    trains = "sft"
    _tag_names = ["alignment", "trl", "sft"]
    _name = "alignment"

    def __init__(self, *, group_by_length: bool = True, **more: Any):
        self.group_by_length = group_by_length
        self._judged: list[torch.Tensor] = []
        settle_ends(more["model"], more["processing_class"])
        super().__init__(**more)
        self.add_callback(EpochOrder(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        self.sampler = train_sampler(self.args, [len(ids) for ids in rows["input_ids"]], self.group_by_length)
        return self.sampler

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As TRL's; a loss that is not finite is noticed."""
        rows = dict(inputs)  # TRL adds to them
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self.model.training or return_outputs:
            return found
        return self.watch(found, [found.detach().expand(len(rows["labels"]))], rows)

    def _good_rows(self, good, inputs):
        """Rows whose log-likelihood is finite: TRL's loss is one number."""
        found = self._token_logps(self.model_wrapped, inputs)
        return found.log_probs.isfinite().all(1)

    def _says_pushes(self) -> bool:
        return False

    def _token_logps(self, model: Any, inputs: dict[str, Any]) -> Any:
        with torch.no_grad(), self.compute_loss_context_manager():
            return model(**inputs, use_cache=False, fused_lm_head=True)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Sums of every row of every process: TRL's eval_loss is a mean of means, which depends on the batch size."""
        inputs = self._prepare_inputs(inputs)
        found = self._token_logps(model, inputs)
        tokens = (inputs["labels"][:, 1:] != -100).sum(1)
        rows = torch.stack([-found.log_probs.sum(1), tokens, found.is_top1.sum(1)], dim=1).float()
        self.watch_held_out([found.log_probs])
        self._judged.append(self.accelerator.gather_for_metrics(rows))
        return rows[:, 0].sum() / tokens.sum(), None, None

    def evaluation_loop(self, *args, metric_key_prefix="eval", **kwargs):
        """As transformers', with the loss and accuracy of a mean over tokens."""
        self._judged = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nll, tokens, right = torch.cat(self._judged).double().sum(0).tolist()
        means = {"loss": nll / tokens, "mean_token_accuracy": right / tokens}
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output
