"""What frozen models add to a trainer: the reference, and the start of training where that is another model.

They are copied from the policy, loaded, or the policy itself with its adapter switched; they score on the fly, or once
before training (`precompute`) with their numbers kept by `frozen.py`. Not a trainer by itself: `offline.py` is.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.models.utils import disable_gradient_checkpointing, prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import use_adapter

from alignment.errors import UserError
from alignment.models.digest import model_digest
from alignment.objectives.base import Objective
from alignment.trainers.collation import BRANCHES, truncated
from alignment.trainers.degree import detach_head
from alignment.trainers.frozen import frozen_logps, rows_digest
from alignment.trainers.layout import LayoutTrainer


class ReferenceTrainer(LayoutTrainer):
    """Frozen models and their columns; the attributes below are set by `PreferenceTrainer`."""

    objective: Objective
    ref_model: Any
    start_model: Any
    start_is_reference: bool
    frozen_digests: dict[str, str]
    _needs_reference: bool
    _precompute: bool
    _scores_start: bool
    _ref_config: Any
    _layout_settled: bool

    def _settle_layout(self, model: Any, config: Any = None) -> None:
        """Compare the layouts once, before the first row is scored."""
        raise NotImplementedError

    def _plan_frozen(
        self, model: Any, ref_model: Any, start_model: Any, peft_config: Any, data: list[Dataset], tokenizer: Any
    ) -> Any:
        """Before TRL's own set-up: which models are frozen; returns the reference for TRL, or None."""
        # What an earlier trainer has left on the model: its degree head, and the autocast of its precision.
        detach_head(model)
        extract_model_from_parallel(model, keep_fp32_wrapper=False)
        reads_previous = "previous" in self.objective.needs
        given = ["prev_chosen" in rows.column_names for rows in data]
        if reads_previous and self.start_is_reference and given[0]:
            raise UserError(
                "train data: the rows bring prev_chosen, so training starts at the previous iterate, which is not the "
                "reference: name the reference (reference.name_or_path)"
            )
        if reads_previous and given[0] != given[-1]:
            raise UserError("data: prev_chosen is in only one of train and eval; the loss would not be the same")
        # The start beside another reference: what an objective that reads the previous iterate compares with.
        self._scores_start = reads_previous and not self.start_is_reference and not given[0]
        self.frozen_digests, self._ref_config = {}, None
        if not self.start_is_reference and ref_model is not None and self._needs_reference:
            self._ref_config = checked_reference(ref_model, tokenizer)
            self.frozen_digests["reference"] = model_digest(ref_model)
        ref_model, self.start_model = self._frozen_models(model, ref_model, start_model, peft_config)
        return ref_model

    def _frozen_models(self, model: Any, ref_model: Any, start_model: Any, peft_config: Any) -> tuple[Any, Any]:
        """(reference for TRL, start beside another reference); None where the policy itself can score them: with its
        adapter switched, or before the first step."""
        if not self._needs_reference:
            return None, None
        # FSDP splits the policy only when training starts: until then a copy has to be scored with.
        ahead = self._precompute and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true"
        if peft_config is not None or is_peft_model(model):
            if self._scores_start and is_peft_model(model):
                _keep_adapter(model)  # TRL does so only where it is given no reference
            return ref_model, None
        if ref_model is None and not ahead:
            ref_model = _frozen_copy(model)
        if self._scores_start and start_model is None and not ahead:
            start_model = _frozen_copy(model)
        return ref_model, start_model if self._scores_start else None

    def _prepared(self, frozen: Any) -> Any:
        """A frozen model placed and wrapped as TRL does with its reference."""
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(frozen, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(frozen, self.accelerator)
        return self.accelerator.prepare_model(frozen, evaluation_mode=True)

    def _add_frozen_columns(self) -> None:
        """Score both data sets under the frozen models (or load their kept tables), then let the models go."""
        policy = None  # under DeepSpeed the policy can score only inside an engine
        for prefix in ("ref", "prev") if self._scores_start else ("ref",):
            frozen = self.ref_model if prefix == "ref" else self.start_model
            own = prefix == "prev" or self.start_is_reference
            if frozen is None and policy is None:
                policy = prepare_deepspeed(self.model, self.accelerator) if self.is_deepspeed_enabled else self.model
                self.model.eval()
            if own:
                self.frozen_digests["start"] = model_digest(self.model, start=True)
            digest = self.frozen_digests["start" if own else "reference"]
            for role in ("train", "eval"):
                data: Any = self.train_dataset if role == "train" else self.eval_dataset
                if data is None:
                    continue
                table = self._table(prefix, policy if frozen is None else frozen, data, digest)
                names = [f"{prefix}_{b}" for b in BRANCHES[: self._branches if prefix == "ref" else 2]]
                for j, name in enumerate(names):
                    data = data.add_column(name, table[:, j].tolist())
                setattr(self, f"{role}_dataset", data)
        if policy is not None and self.is_deepspeed_enabled:
            policy.destroy()  # its hooks would stay on the modules, and stumble over the training engine's numbering
        self.ref_model = self.start_model = None

    def _table(self, prefix: str, model: Any, data: Dataset, digest: str) -> torch.Tensor:
        """`[n, k]` log-probs of every row of `data` under one frozen model."""
        branches = BRANCHES[: self._branches]
        columns = ["prompt_ids", *(f"{b}_ids" for b in branches)]
        plain = data.select_columns(columns)
        lengths: list[int] = []
        config = self._ref_config if prefix == "ref" else None

        def rows() -> Iterator[list[list[int]]]:  # read twice from the table on disk rather than held in memory
            for row in plain:
                found = [row["prompt_ids"], *(truncated(row, b, self.collator.max_length) for b in branches)]
                lengths.append(sum(map(len, found)))
                yield found

        content = rows_digest(rows())

        def score(numbers: list[int]) -> torch.Tensor:
            inputs = self.collator([plain[i] for i in numbers])
            inputs = {key: value.to(self.accelerator.device) for key, value in inputs.items()}
            nonlocal config
            if config is not None or not self._layout_settled:
                self._settle_layout(model, config)
                config = None
            return self._score_frozen(prefix, model, inputs)

        table, kept = frozen_logps(
            self.accelerator,
            score,
            lengths,
            self.args.per_device_train_batch_size,
            {
                "model": digest,
                "rows": content,
                "dtype": [str(self.model.dtype), str(self._compute_dtype)],
            },
            lambda: self.tolerance,
            {"ref": "reference", "prev": "previous-iterate"}[prefix],
        )
        if self.accelerator.is_main_process:
            print(f"  {'kept' if kept else 'computed'} {len(table)} rows of frozen log-probs ({prefix})", flush=True)
        return table

    def _score_frozen(self, prefix: str, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """`[B, k]` under the reference ("ref") or the start beside it ("prev"): a model of its own, or the policy with
        its adapter off or switched to its frozen copy."""
        frozen = self.ref_model if prefix == "ref" else self.start_model
        adapter: Any = contextlib.nullcontext()
        if frozen is None and is_peft_model(self.model):
            unwrapped = self.accelerator.unwrap_model(self.model)
            adapter = use_adapter(unwrapped, adapter_name="ref" if "ref" in unwrapped.peft_config else None)
        settings: Any = self.args.gradient_checkpointing_kwargs
        checkpointing = disable_gradient_checkpointing(self.model, settings)
        config = self._ref_config if prefix == "ref" else None
        with torch.no_grad(), checkpointing, adapter, self.accelerator.autocast():
            return self._score(model if frozen is None else frozen, inputs, config)

    def frozen_scores(self, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`{"ref": [B, k], "prev": …}` under every frozen model that is at hand; with `precompute` none is."""
        if not self._needs_reference or self._precompute:
            return {}
        prefixes = ("ref", "prev") if self._scores_start else ("ref",)
        return {prefix: self._score_frozen(prefix, model, inputs) for prefix in prefixes}

    def compute_ref_log_probs(self, model, inputs):
        """TRL's public name: `(ref_chosen [B], ref_rejected [B])`."""
        sums = self._score_frozen("ref", model, inputs)
        return sums[:, 0], sums[:, 1]

    def _frozen_columns(self, prefix: str, model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`{prefix}_chosen` …, from the batch where they were given or computed before training."""
        names = [f"{prefix}_{b}" for b in BRANCHES[: self._branches if prefix == "ref" else 2]]
        if names[0] in inputs:
            return {name: inputs[name] for name in names}
        sums = self._score_frozen(prefix, model, inputs)
        return {name: sums[:, j] for j, name in enumerate(names)}


def _frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """The reference: `model` as it is in memory now.

    Raises:
        UserError: a copy would not be one, or would compute with `model`'s weights.
    """
    if any("ds_id" in vars(parameter) for parameter in model.parameters()):
        raise UserError("ZeRO-3 shards the model while it loads: give `ref_model`, loaded from the same weights")
    if any("_hf_hook" in vars(module) for module in model.modules()):
        raise UserError(
            "model: accelerate has spread it over devices (device_map), and its hooks cannot be copied: give "
            "`ref_model`, loaded from the same weights, or load the model without device_map"
        )
    frozen = copy.deepcopy(model)
    originals = {id(part) for module in model.modules() for part in (module, *module.parameters(recurse=False))}
    for name, module in frozen.named_modules():
        for attribute, value in list(vars(module).items()):
            if not callable(value) or isinstance(value, torch.nn.Module):
                continue
            # A method that a trainer has put in the place of the class's own, or kept for accelerate's unwrapping.
            if attribute in dir(type(module)) or attribute == "_original_forward":
                del vars(module)[attribute]
            elif _reaches(value, originals):
                raise UserError(
                    f"model: {name or type(module).__name__}.{attribute} is bound to this model, and a copy of it "
                    "would compute with this model's weights: give `ref_model`, loaded from the same weights"
                )
    return frozen.eval().requires_grad_(False)


def _reaches(function: Any, parts: set[int], depth: int = 4) -> bool:
    """Whether a function holds one of these objects: as its `self`, its arguments, or in its closure."""
    if id(function) in parts:
        return True
    if depth == 0:
        return False
    held = [*inspect.getclosurevars(function).nonlocals.values()] if inspect.isfunction(function) else []
    held += [getattr(function, "__self__", None), getattr(function, "__func__", None)]
    if isinstance(function, functools.partial):
        held += [function.func, *function.args, *function.keywords.values()]
    return any(_reaches(value, parts, depth - 1) for value in held if value is not None)


def _keep_adapter(model: Any) -> None:
    """A frozen copy "ref" of the adapter "default", as TRL makes one."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def checked_reference(ref_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The configuration of an explicit reference; UserError if it cannot know the policy's tokens."""
    embeddings: Any = ref_model.get_input_embeddings()
    vocabulary = embeddings.num_embeddings
    if vocabulary < len(tokenizer):
        raise UserError(
            f"reference.name_or_path: {ref_model.config._name_or_path!r} has {vocabulary} tokens, the policy's "
            f"tokenizer {len(tokenizer)}: it is of another family, and its log-probabilities would be of other text"
        )
    return ref_model.config
