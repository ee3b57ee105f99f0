"""`alignment data strength`: preference rows judged by models that have not seen them, and the doubtful ones mended.

Wang et al. 2024 (arXiv:2401.06080), section 2, with linear heads on a frozen trunk for the paper's ten fine-tuned
models, and held-out folds, which the paper does not have. The statistics and treatments are `alignment.data.strength`.
"""

from __future__ import annotations

from pathlib import Path

from alignment.data.strength import Bands, Treated, by_strength
from alignment.errors import UserError
from alignment.files import write_json_lines
from alignment.recipes import Recipe, RewardModelRecipe


def mend(
    recipe: Recipe | RewardModelRecipe,
    out: Path,
    bands: Bands,
    *,
    members: int = 10,
    folds: int = 5,
    seed: int = 0,
    batch_size: int = 8,
) -> Treated:
    """Write the recipe's training rows, treated by band, into a new file; `data.train` of a recipe can be that file.

    Args:
        recipe: names the model whose features are read, and the rows.
        out: a .jsonl file that does not exist.
        bands: what is done to which share of the rows.
        members, folds, seed: of the heads (`by_strength`).
        batch_size: rows per forward pass.

    Raises:
        UserError: `out` is there already, the rows cannot be read, or the model has no linear head.
    """
    if out.exists():
        raise UserError(f"{out}: exists; name a new file")
    if recipe.data.train is None:
        raise UserError(f"{recipe.path}: data.train: is needed; rows that a run samples are in its preferences.jsonl")
    from alignment.data.messages import TextRules
    from alignment.data.pipeline import prepare
    from alignment.data.preferences import ID_COLUMNS
    from alignment.models import load_tokenizer
    from alignment.models.reward_model import load_reward_model, settle_padding, trunk_features

    name, limit = recipe.model.name_or_path, recipe.data.max_length
    tokenizer = load_tokenizer(name, **recipe.model.tokenizing)
    seeds, rules = recipe.training.seed, TextRules.of(recipe.data)
    rows = prepare(recipe.data.train, tokenizer, max_length=limit, role="train", seed=seeds, rules=rules).dataset
    model = load_reward_model(outputs=1, fresh_head=True, **recipe.model.loading)
    if isinstance(recipe, RewardModelRecipe):
        pad = settle_padding(model, tokenizer, recipe.reward_model.pad_token)
    else:  # whose recipe has no key for it
        pad = settle_padding(model, tokenizer, remedy="give a reward-model recipe with reward_model.pad_token")
    chosen, rejected = (
        trunk_features(
            model, [[*row["prompt_ids"], *row[f"{side}_ids"]][:limit] for row in rows], pad, batch_size, f"  {side}"
        ).numpy()
        for side in ("chosen", "rejected")
    )
    given = [{c: v for c, v in row.items() if c not in (*ID_COLUMNS, "calibration_ids")} for row in rows]
    found = by_strength(given, chosen, rejected, bands, members=members, folds=folds, seed=seed)
    write_json_lines(out, found.rows)
    return found
