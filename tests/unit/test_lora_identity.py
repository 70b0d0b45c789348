"""Which fields of peft's LoraConfig a resume holds to."""

from dataclasses import fields

import pytest
import torch
from peft import LoraConfig

from grpo_lightning.policy.lora import BOOKKEEPING, lora_config, lora_identity

FIELDS = [f.name for f in fields(LoraConfig)]
IDENTITY = [name for name in FIELDS if name not in BOOKKEEPING]


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_counts_unless_it_is_named_as_bookkeeping(name):
    """Whatever peft adds later is in `FIELDS`, and counts."""
    known, other = lora_config({"r": 4}), lora_config({"r": 4})
    setattr(other, name, ["something else"])
    assert (lora_identity(known) != lora_identity(other)) == (name in IDENTITY)


@pytest.mark.parametrize("name", ["target_parameters", "layers_to_transform", "lora_bias", "use_dora", "r"])
def test_what_makes_another_policy_counts(name):
    assert name in IDENTITY


def test_bookkeeping_names_fields_of_peft():
    assert set(FIELDS) >= BOOKKEEPING - {"peft_version"}  # the last is of newer releases


def test_it_holds_plain_types_and_nothing_at_its_default(tmp_path):
    given = {"r": 4, "target_modules": ["v_proj", "q_proj"], "rank_pattern": {"q_proj": 2}, "lora_bias": True}
    found = lora_identity(lora_config(given))
    assert found == {**given, "target_modules": ["q_proj", "v_proj"]}
    torch.save(found, tmp_path / "x.pt")
    assert torch.load(tmp_path / "x.pt", weights_only=True) == found


def test_order_of_names_does_not_count_order_of_layers_does():
    def identity(**options):
        return lora_identity(lora_config({"r": 4, **options}))

    names = {"modules_to_save": ["lm_head", "norm"]}
    assert identity(**names) == identity(modules_to_save=["norm", "lm_head"])
    layers = {"layer_replication": [[0, 2], [1, 2]]}
    assert identity(**layers) != identity(layer_replication=[[1, 2], [0, 2]])
