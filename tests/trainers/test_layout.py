"""The layouts against unpadded rows: what rounding explains, which rows are compared, which models are refused."""

import pytest
import torch
from datasets import Dataset
from transformers import (
    BartConfig,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)
from transformers.models.bart.modeling_bart import BartForCausalLM
from transformers.models.bert.modeling_bert import BertLMHeadModel

from alignment.errors import UserError
from alignment.models import load_model
from alignment.models.scoring import why_not_shared
from alignment.trainers import layout
from tests.trainers.building import config, preferences, trainer_for
from tests.trainers.building_online import Kindness, online

WINDOW = 16
LONG = [row | {"chosen": row["chosen"] * 3, "rejected": row["rejected"] * 3} for row in preferences()]


def gpt_neo(tokenizer, dtype=torch.bfloat16):
    """Local layers count columns, not positions: wrong in a shared row that is wider than the window."""
    torch.manual_seed(0)
    settings = GPTNeoConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=WINDOW,
        max_position_embeddings=256,
        intermediate_size=128,
        initializer_range=0.06,
    )
    return GPTNeoForCausalLM._from_config(settings, attn_implementation="eager").to(dtype)


def sizes(tokenizer, **more):
    return {"vocab_size": len(tokenizer), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | more


def settled(tiny, folder, model, tokenizer, rows=None, **args):
    """A trainer after its first step."""
    bf16 = next(model.parameters()).dtype == torch.bfloat16
    args = config(folder, **{"max_steps": 1, "bf16": bf16} | args)
    data = Dataset.from_list(LONG if rows is None else rows)
    trainer = trainer_for(tiny, folder, model=model, tokenizer=tokenizer, train_dataset=data, args=args)
    trainer.train()
    return trainer


def test_gpt_neo_is_known_to_take_no_shared_rows(tokenizer):
    assert "window in columns" in (why_not_shared(gpt_neo(tokenizer).config) or "")
    assert why_not_shared(GPTNeoConfig(attention_types=[[["global"], 24]], attn_implementation="eager")) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layout_that_is_wrong_by_two_percent_is_found_in_half_precision_too(
    tiny, tmp_path, tokenizer, monkeypatch, dtype
):
    """As a model of its own code that is on no list; 5 % of a response were allowed in bfloat16."""
    monkeypatch.setattr(layout, "why_not_shared", lambda config: None)
    with pytest.warns(UserWarning, match="shared_prefix gives log-probs that are off by a relative 0.0"):
        trainer = settled(tiny, tmp_path, gpt_neo(tokenizer, dtype), tokenizer)
    assert trainer.collator.layout == "paired" and trainer.tolerance < 1e-2


def test_the_widest_row_is_compared_whatever_the_first_batch_is(tiny, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(layout, "why_not_shared", lambda config: None)
    short = [{"prompt": row["prompt"], "chosen": " a", "rejected": " b"} for row in LONG]
    model = gpt_neo(tokenizer, torch.float32)

    def used(rows, name, **more):
        folder = tmp_path / name
        args = config(folder, max_steps=1)
        trainer = trainer_for(
            tiny,
            folder,
            model=model,
            tokenizer=tokenizer,
            train_dataset=Dataset.from_list(rows),
            group_by_length=False,
            args=args,
            **more,
        )
        first = next(iter(trainer.get_train_dataloader()))
        assert first["row_ids"].size(1) <= WINDOW
        trainer.train()
        return trainer.collator.layout

    assert used(short, "none wide") == "shared_prefix"
    seed = 42  # the wide row is not in the first batch of its order
    place = torch.randperm(32, generator=torch.Generator().manual_seed(seed * 1_000_003)).tolist()[-1]
    widest = max(LONG, key=lambda row: len(row["chosen"] + row["rejected"]))
    mixed = [widest if i == place else row for i, row in enumerate(short)]
    with pytest.warns(UserWarning, match="using paired"):
        assert used(mixed, "one wide") == "paired"
    with pytest.warns(UserWarning, match="using paired"):
        assert used(short, "held out", eval_dataset=Dataset.from_list([widest])) == "paired"


@pytest.mark.parametrize("kind", ["bert", "bart", "xlm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoders_that_read_padding_are_refused_in_one_line(tiny, tmp_path, tokenizer, kind, dtype):
    torch.manual_seed(0)
    if kind == "bert":  # attention to the right as well
        model = BertLMHeadModel(
            BertConfig(
                **sizes(tokenizer, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64),
                initializer_range=0.25,
            )
        )
    elif kind == "xlm":  # attention to the right as well
        model = XLMWithLMHeadModel(
            XLMConfig(
                **sizes(tokenizer, emb_dim=32, n_layers=2, n_heads=4, pad_index=0, bos_index=1, eos_index=2),
                embed_init_std=0.1,
                init_std=0.25,
            )
        )
    else:  # its positions count padding
        model = BartForCausalLM(
            BartConfig(
                **sizes(tokenizer, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64),
                init_std=0.25,
                is_decoder=True,
                is_encoder_decoder=False,
            )
        )
    with pytest.raises(UserError, match=rf"\({kind}\): log-probs of padded rows .*decoder-only") as error:
        settled(tiny, tmp_path, model.to(dtype), tokenizer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "mode"), [("grammar", "autocast"), ("llama", "bfloat16"), ("llama", "autocast"), ("gpt2", "bfloat16")]
)
def test_rounding_is_no_reason_to_leave_the_shared_layout(tiny, tmp_path, tokenizer, kind, mode, recwarn):
    torch.manual_seed(0)
    model = {
        "grammar": lambda: load_model(str(tiny)),
        "llama": lambda: LlamaForCausalLM(
            LlamaConfig(
                **sizes(tokenizer, hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4),
                initializer_range=0.1,
            )
        ),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(**sizes(tokenizer, n_embd=64, n_layer=6, n_head=4), initializer_range=0.1)
        ),
    }[kind]()
    model = model.to(torch.bfloat16) if mode == "bfloat16" else model
    trainer = settled(tiny, tmp_path, model, tokenizer, bf16=True)
    assert trainer.collator.layout == "shared_prefix"
    assert not [w for w in recwarn if "layout" in str(w.message)]


def rope(tokenizer, kind, original):
    parameters = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 8, "long_factor": [8.0] * 8}
        parameters |= {"original_max_position_embeddings": original}
    settings = sizes(tokenizer, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    settings |= {"max_position_embeddings": original if kind == "dynamic" else 256, "initializer_range": 0.2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**settings, rope_parameters=parameters))


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_position_encodings_that_depend_on_the_batch_need_short_rows(tiny, tmp_path, tokenizer, kind):
    model = rope(tokenizer, kind, 10)
    short = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():  # the same tokens, alone and in a long row
        alone = model(short).logits[0]
        beside = model(torch.cat([short, torch.full((1, 20), 9)], 1)).logits[0, :4]
    assert float((alone - beside).abs().max()) > 1e-3
    with pytest.raises(UserError, match=f"data.max_length: .*rope_type {kind}.* within 10"):
        trainer_for(tiny, tmp_path, model=model, train_dataset=Dataset.from_list(LONG))
    with pytest.raises(UserError, match=f"rope_type {kind}"):
        online(tiny, tmp_path / "online", "p3o", model=model, reward=Kindness())
    args = config(tmp_path, max_length=10, max_steps=1)
    model = rope(tokenizer, kind, 10)  # dynamic frequencies remember the longest row
    trainer_for(tiny, tmp_path, model=model, train_dataset=Dataset.from_list(LONG), args=args).train()


def test_on_policy_rows_are_compared_again_where_they_are_wider(tiny, tmp_path, monkeypatch):
    compared = []
    real = layout.LayoutTrainer._compare

    def watched(self, model, groups, config=None):
        real(self, model, groups, config)
        compared.append(self.compared)

    monkeypatch.setattr(layout.LayoutTrainer, "_compare", watched)
    trainer = online(tiny, tmp_path / "run", "p3o", reward=Kindness(), args={"max_steps": 2})
    trainer.train()
    before = len(compared)
    assert 1 <= before <= 2 and compared[-1] == trainer.compared
    record = trainer._records[0]
    trainer._compare_if_wider([record])
    assert len(compared) == before  # not wider: nothing to compare
    record.responses = [[*ids, *ids] for ids in record.responses]
    trainer._compare_if_wider([record])
    prompt = len(trainer.columns["prompt_ids"][record.row])
    lengths = [len(ids) for ids in record.responses]
    wide, long = prompt + sum(lengths), prompt + max(lengths)
    assert len(compared) == before + (wide > compared[before - 1][0] or long > compared[before - 1][1])
    assert trainer.compared[0] >= wide and trainer.compared[1] >= long
