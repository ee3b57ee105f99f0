"""Plans against what really happens: autograd's own list, the profiler's allocations, torch's operation counter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
)

from alignment.doctor import Lora, Setting, plan
from alignment.doctor.memory import layer_activations
from alignment.doctor.setting import launch_of
from alignment.doctor.shape import read_shape
from alignment.errors import UserError
from alignment.recipes.launch import Launch
from tests.doctor import small

SHORT = Setting(pairs=2, prompt=40, responses=(24, 20))


def by_hand(hidden: int, inner: int, keys: int, layers: int, vocabulary: int) -> int:
    """Parameters of a Llama with untied head: query and output, key and value, three inner matrices, two norms."""
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner + 2 * hidden
    return layers * layer + 2 * vocabulary * hidden + hidden


def test_the_parameters_of_a_seven_billion_model_without_its_weights():
    """Mistral-7B: 4096 wide, inner 14336, 8 of 32 key heads of 128, 32 layers, 32000 tokens. 7,241,732,096."""
    shape = read_shape(MistralConfig())
    assert shape.parameters == by_hand(4096, 14336, 1024, 32, 32000) == 7_241_732_096
    assert shape.linear == shape.active == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)


def test_an_adapter_is_counted_matrix_by_matrix():
    """r (in + out) for each of q, k, v, o, gate, up, down."""
    shape = read_shape(small.config(layers=3), Lora(r=4))
    pairs = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 176), (64, 176), (176, 64)]
    assert shape.adapter == 3 * 4 * sum(a + b for a, b in pairs)
    only_two = read_shape(small.config(layers=3), Lora(r=4, target_modules=["q_proj", "v_proj"]))
    assert only_two.adapter == 3 * 4 * (64 + 64 + 64 + 32)


def test_a_tied_head_counts_once_and_another_architecture_is_read():
    shape = read_shape(GPT2Config(n_embd=48, n_layer=3, n_head=4, vocab_size=100, n_positions=32))
    layer = 48 * 144 + 144 + 48 * 48 + 48 + 48 * 192 + 192 + 192 * 48 + 48 + 4 * 48
    assert shape.parameters == 3 * layer + 100 * 48 + 32 * 48 + 2 * 48
    assert (shape.gated, shape.mlp, shape.rms, shape.layer_norm) == (False, 192, 0, 96)


def test_experts_work_two_of_eight():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=64, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    shape = read_shape(config)
    attention, expert = 4 * 32 * 32, 3 * 32 * 48
    assert shape.linear >= 2 * (attention + 8 * expert)
    assert abs(shape.active - 2 * (attention + 2 * expert)) <= 2 * 8 * 32  # the router, or not
    assert shape.mlp == 2 * 48 and shape.gated


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"layout": "paired"},
        {"attention": "eager"},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "attention": "eager"},
        {"dtype": "bfloat16", "mixed_precision": "bf16"},
        {"lora": Lora(4)},
        {"lora": Lora(4), "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_layer_keeps_what_autograd_says_it_keeps(kind):
    """Byte for byte: three layers keep one layer more than two."""
    attention = kind.pop("attention", "sdpa") if "attention" in kind else "sdpa"
    setting = replace(SHORT, **kind)
    two, three = (small.kept_for_backward(small.config(n, attention), setting) for n in (2, 3))
    shape = read_shape(small.config(3, attention), setting.lora)
    assert layer_activations(shape, setting) == three - two


@pytest.mark.parametrize("lora", [None, Lora(4)], ids=["full", "lora"])
def test_autocast_keeps_sixteen_bit_copies_of_the_weights(lora):
    setting = replace(SHORT, mixed_precision="bf16", lora=lora)
    two, three = (small.kept_for_backward(small.config(n), setting) for n in (2, 3))
    shape = read_shape(small.config(3), lora)
    copies = 2 * (shape.linear + shape.adapter) / 3
    assert layer_activations(shape, setting) + copies == three - two


def test_weights_gradients_and_optimizer_are_exact():
    for lora in (None, Lora(4)):
        setting = replace(SHORT, lora=lora, reference="none")
        model = small.build(small.config(), setting)
        small.step(model, None, setting, small.rows_of(setting)).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, fused=True)
        optimizer.step()
        found = plan(small.config(), setting).memory
        assert found.weights == sum(p.nbytes for p in model.parameters())
        assert found.gradients == sum(p.grad.nbytes for p in trained)
        states = [v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step"]
        assert found.optimizer == sum(states)


LONGER = {"pairs": 2, "prompt": 160, "responses": (96, 96)}


@pytest.mark.parametrize(
    "kind",
    [
        {"reference": "copy"},
        {"reference": "none"},
        {"reference": "copy", "layout": "paired"},
        {"reference": "copy", "gradient_checkpointing": True},
        {"reference": "copy", "dtype": "bfloat16"},
        {"reference": "copy", "mixed_precision": "bf16"},
        {"reference": "none", "lora": Lora(4)},
        {"reference": "copy", "copied": (0, 1), "degrees": 3},
        {"reference": "copy", "copied": (0, 1), "degrees": 3, "layout": "paired"},
    ],
    ids=str,
)
def test_the_peak_is_within_a_quarter_of_what_the_profiler_sees(kind):
    setting = Setting(**LONGER, **kind)
    config = small.config(layers=4)
    measured, planned = small.peak_bytes(config, setting), plan(config, setting).memory.peak
    assert planned == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("layout", ["shared_prefix", "paired"])
@pytest.mark.parametrize("lora", [None, Lora(4)], ids=["full", "lora"])
def test_operations_are_those_that_torch_counts(layout, lora):
    """Eager attention, which the counter sees whole. Under an adapter nothing before the first layer is trained, so
    its three input projections, 64 to 64, 32 and 32, and their adapters pass no gradient on; the formula leaves this
    out (a layer's share of a large model's is small)."""
    setting = replace(SHORT, layout=layout, lora=lora, reference="none")
    config = small.config(layers=6, attention="eager")
    model, rows = small.build(config, setting), small.rows_of(setting)
    with FlopCounterMode(display=False) as forward:
        loss = small.step(model, None, setting, rows)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    found = plan(config, setting).flops
    assert forward.get_total_flops() == pytest.approx(found.policy_forward, rel=1e-3)
    not_needed = 2 * setting.rows * setting.width * (64 * (64 + 32 + 32) + 3 * 64 * 4) * (lora is not None)
    assert backward.get_total_flops() == pytest.approx(found.policy_backward - not_needed, rel=1e-3)
    assert backward.get_total_flops() == pytest.approx(found.policy_backward, rel=0.03)


@pytest.mark.parametrize("layout", ["shared_prefix", "paired"])
@pytest.mark.parametrize("copied", [(0, 1), (1,)], ids=str)
def test_operations_on_degraded_copies_are_those_that_torch_counts(layout, copied):
    """The trainer's own scoring of spo's rows; the degree head's few products are within the tolerance."""
    setting = replace(SHORT, layout=layout, copied=copied, degrees=3, reference="none")
    config = small.config(layers=6, attention="eager")
    model, rows = small.build(config, setting), small.rows_of(setting)
    with FlopCounterMode(display=False) as forward:
        loss = small.step(model, None, setting, rows)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    found = plan(config, setting).flops
    assert forward.get_total_flops() == pytest.approx(found.policy_forward, rel=1e-3)
    assert backward.get_total_flops() == pytest.approx(found.policy_backward, rel=1e-3)
    plain = plan(config, replace(setting.plain, reference="copy"))
    assert plan(config, replace(setting, reference="copy")).flops.reference == plain.flops.policy_forward


@pytest.mark.parametrize("layout", ["shared_prefix", "paired"])
def test_a_layer_keeps_the_copies_as_well(layout):
    setting = replace(SHORT, layout=layout, copied=(0, 1), degrees=3)
    two, three = (small.kept_for_backward(small.config(n), setting) for n in (2, 3))
    assert layer_activations(read_shape(small.config(3)), setting) == three - two


def test_a_second_frozen_model_costs_as_much_again():
    both = Setting(reference="copy", previous="copy")
    one, two = plan(small.config(), Setting(reference="copy")), plan(small.config(), both)
    assert two.memory.reference == 2 * one.memory.reference > 0
    assert two.flops.reference == 2 * one.flops.reference > 0


def test_checkpointing_computes_the_layers_again_and_not_the_head():
    """torch stops recomputing a layer once it has what backward needs: its last matrix, 176 to 64, is left out."""
    setting = replace(SHORT, gradient_checkpointing=True, reference="none")
    config = small.config(layers=6, attention="eager")
    loss = small.step(model := small.build(config, setting), None, setting, small.rows_of(setting))
    assert model.is_gradient_checkpointing
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    found = plan(config, setting).flops
    stopped = 2 * setting.rows * setting.width * 6 * 176 * 64
    assert backward.get_total_flops() == pytest.approx(found.policy_backward + found.recomputed - stopped, rel=1e-3)


def test_sharing_the_prompt_saves_what_the_bound_says():
    """Without attention and head: 2P + C + R against P + C + R tokens, 4/3 at P = C = R (performance: s(1) = 1.33)."""
    long = Setting(prompt=512, responses=(512, 512))
    config = LlamaConfig(vocab_size=8, hidden_size=4096, num_attention_heads=32, num_hidden_layers=2)
    body = {
        layout: (f := plan(config, replace(long, layout=layout)).flops).policy_forward * (1 - f.attention_share)
        for layout in ("shared_prefix", "paired")
    }
    assert body["paired"] / body["shared_prefix"] == pytest.approx(4 / 3, rel=1e-3)


def test_zero_splits_two_two_and_twelve_bytes():
    """Rajbhandari et al. 2020, section 3.1: 2 bytes of weights, 2 of gradients, 12 of master weights and AdamW."""
    base = Setting(world=8, dtype="bfloat16", mixed_precision="bf16", reference="none")
    n = read_shape(MistralConfig()).parameters
    expected = {"zero1": (2, 2, 12 / 8), "zero2": (2, 2 / 8, 12 / 8), "zero3": (2 / 8, 2 / 8, 12 / 8)}
    for sharding, (weights, gradients, rest) in expected.items():
        found = plan(MistralConfig(), replace(base, sharding=sharding)).memory
        assert (found.weights, found.gradients) == pytest.approx((weights * n, gradients * n))
        assert found.optimizer + found.master == pytest.approx(rest * n)
    offloaded = plan(MistralConfig(), replace(base, sharding="zero3", offload_optimizer=True)).memory
    assert (offloaded.optimizer, offloaded.master) == (0, 0)
    assert offloaded.host == pytest.approx(12 / 8 * n)
    everything = replace(base, sharding="zero3", offload_optimizer=True, offload_parameters=True, reference="copy")
    found = plan(MistralConfig(), everything).memory  # 12, and 2 for the policy's weights, and 2 for the reference's
    assert (found.weights, found.reference) == (0, 0)
    assert found.host == pytest.approx(16 / 8 * n)


def test_data_parallel_keeps_everything_and_buckets_as_large_as_the_gradients():
    found = plan(small.config(), Setting(world=4, sharding="ddp")).memory
    n = read_shape(small.config()).parameters
    assert (found.weights, found.gradients, found.optimizer, found.buffers) == (4 * n, 4 * n, 8 * n, 4 * n)


def test_fsdp_keeps_trained_weights_in_float32_and_splits_them():
    found = plan(MistralConfig(), Setting(world=8, sharding="fsdp", dtype="bfloat16", mixed_precision="bf16")).memory
    n = read_shape(MistralConfig()).parameters
    assert (found.weights, found.gradients, found.optimizer) == pytest.approx((n / 2, n / 2, n))
    assert found.master == 0


def test_a_reference_costs_its_weights_only_where_it_is_a_model():
    base = Setting(dtype="bfloat16")
    n = read_shape(small.config()).parameters
    for reference, expected in (("copy", 2 * n), ("precomputed", 0), ("none", 0)):
        assert plan(small.config(), replace(base, reference=reference)).memory.reference == expected
    off = plan(small.config(), replace(base, lora=Lora(4), reference="adapter_off"))
    assert off.memory.reference == 0 and off.flops.reference > 0
    kept = plan(small.config(), replace(base, lora=Lora(4), reference="adapter_copy"))
    assert kept.memory.reference == 4 * kept.shape.adapter  # PEFT keeps adapters of half-precision models in float32
    cached = plan(small.config(), replace(base, reference="precomputed"))
    assert cached.flops.reference == 0


def test_nf4_takes_half_a_byte_and_its_scales():
    """QLoRA, section 3: 0.127 bits for the scales after double quantisation."""
    setting = Setting(dtype="bfloat16", lora=Lora(16), quantization="nf4", reference="adapter_off")
    found = plan(MistralConfig(), setting)
    shape = found.shape
    rest = 2 * (shape.parameters - shape.linear) + 2 * shape.adapter
    assert (found.memory.weights - rest) * 8 / shape.linear == pytest.approx(4.127, abs=1e-3)


def test_logits_are_three_float32_tensors_over_the_responses_alone():
    setting = replace(SHORT, reference="none")
    assert plan(small.config(), setting).memory.logits == 12 * 2 * (24 + 20) * 512
    paired = replace(setting, layout="paired")
    assert plan(small.config(), paired).memory.logits == 12 * 4 * 24 * 512
    copies = {"copied": (0, 1), "degrees": 3}  # shared: the head skips them; paired: rows of their own, as wide
    assert plan(small.config(), replace(setting, **copies)).memory.logits == 12 * 2 * (24 + 20) * 512
    assert plan(small.config(), replace(paired, **copies)).memory.logits == 3 * 12 * 4 * 24 * 512


def test_launch_files():
    deepspeed = {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "none"}
    found = launched(distributed_type="DEEPSPEED", num_processes=8, deepspeed_config=deepspeed)
    assert (found.world, found.sharding) == (8, "zero3")
    assert (found.offload_optimizer, found.offload_parameters) == (True, False)
    assert launched(distributed_type="DEEPSPEED", num_processes=8, deepspeed_config=None).sharding == "zero2"
    assert launched(distributed_type="MULTI_GPU", num_processes=4).sharding == "ddp"
    assert launched(distributed_type="NO").sharding == "none"
    assert launched(distributed_type="FSDP", num_processes=8, world=16).world == 16
    with pytest.raises(UserError, match="MEGATRON_LM has no plan"):
        launched(distributed_type="MEGATRON_LM", num_processes=8)
    with pytest.raises(UserError, match="zero_stage: 7"):
        launched(distributed_type="DEEPSPEED", num_processes=8, deepspeed_config={"zero_stage": 7})


def launched(world: int | None = None, **keys):
    return launch_of(Launch.model_validate(keys), world)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (BertConfig(), "BertConfig describes an encoder"),
        (MambaConfig(), "MambaConfig has no num_attention_heads"),
        (LlamaConfig(vocab_size=-5), "no causal language model from LlamaConfig"),
    ],
    ids=["bert", "mamba", "negative"],
)
def test_a_model_without_a_plan_is_refused_in_one_line(config, said):
    with pytest.raises(UserError, match=said) as refused:
        plan(config)
    assert "\n" not in str(refused.value)


def test_gpt_neox_has_an_encoders_key_and_is_a_decoder():
    config = GPTNeoXConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    assert plan(config).shape.layers == 2


def test_flash_attention_is_planned_without_its_package_and_takes_paired_rows():
    config = small.config(attention="sdpa")
    config._attn_implementation = "flash_attention_2"
    found = plan(config)
    assert (found.shape.attention, found.setting.layout) == ("flash_attention_2", "paired")


def test_mistakes_in_a_setting_are_one_line():
    with pytest.raises(UserError, match="sharding 'zero4' is unknown; did you mean 'zero"):
        Setting(sharding="zero4")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="quantised weights cannot be trained"):
        Setting(quantization="nf4")
    with pytest.raises(UserError, match="lora: .*no_such_module"):
        plan(small.config(), Setting(lora=Lora(4, ["no_such_module"])))
