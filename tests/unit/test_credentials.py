"""Tokens, keys and passwords among the options are refused by name or by value; healthy options are not."""

import pytest

from grpo_lightning.errors import ConfigError
from grpo_lightning.utils.credentials import check_credentials
from grpo_lightning.utils.untrusted import check_arguments

WORD = "0a1B2c3D4e5F6g7H8i9J"
# Built here so that no scanner of secrets takes them for real ones.
SECRETS = {
    "hf": "hf_" + WORD * 2,
    "openai": "sk-" + WORD * 2,
    "anthropic": "sk-ant-" + "api03-" + WORD,
    "github": "ghp_" + WORD * 2,
    "github_pat": "github" + "_pat_" + WORD * 2,
    "aws": "AKIA" + "0123456789ABCDEF",
    "google": "AIza" + (WORD * 2)[:35],
    "slack": "xoxb-" + "123456-" + WORD,
    "jwt": "eyJ" + WORD + ".eyJ" + WORD + "." + WORD,
    "gitlab": "glpat-" + WORD,
    "private key": "-----BEGIN RSA PRIVATE KEY-----\nMII",
    "url": "https://me:" + WORD + "@host/x",
    "within": "--token=hf_" + WORD * 2 + " --x",
}
NAMES = """
token hf_token HF_TOKEN hub_token auth_token use_auth_token access_token api_token session_token apiKey
api_key API_KEY apikey x-api-key wandb_api_key WANDB_API_KEY openai_api_key access_key access_key_id
secret_access_key aws_secret_access_key aws_session_token secret client_secret secret_key private_key
ssh_key password db_password passwd passphrase credentials authorization Authorization connection_string
account_key sas_token secrets
"""
HEALTHY = """
max_tokens max_completion_tokens tokens tokenizer tokenizer_mode num_tokens min_new_tokens token_type
eos_token pad_token bos_token unk_token image_token think_token stop_token_ids eos_token_id
skip_special_tokens key keys key_cache sort_key group_key num_key_value_heads key_padding prompt_column
secretary passage password_length monitor max_prompt_tokens special_tokens token_level author authority
bearing storage access api secret_santa_rows
"""
VALUES = """
Qwen/Qwen2.5-0.5B-Instruct 0123456789abcdef0123456789abcdef01234567 token sequence torch.optim.AdamW
sk-learn runs/sk-experiment-with-a-long-name-of-2026 hf_hub hf://datasets/a/b https://huggingface.co/a/b
s3://bucket/key localhost:8080 http://localhost:8080/x ghp AKIA {question} Answer: data/akia.jsonl
reasoning_gym:letter_counting 2026-11-21T20:00:00 eyJ -----BEGIN file:///a@b a:b@c key=value
"""


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("where", ["value", "list", "nested"])
def test_values_that_look_like_credentials_are_refused_under_any_key(name, where):
    value = SECRETS[name]
    config = {"value": {"a": value}, "list": {"a": [1, value]}, "nested": {"a": [{"b": {"c": value}}]}}[where]
    with pytest.raises(ConfigError, match=r"^a.* looks like a credential.*HF_TOKEN") as caught:
        check_credentials({"x": 1, **config})
    assert WORD not in str(caught.value)


@pytest.mark.parametrize("name", NAMES.split())
def test_names_of_credentials_are_refused(name):
    for value in ("swordfish-7", ["swordfish-7"]):
        with pytest.raises(ConfigError, match="is named like a credential") as caught:
            check_credentials({"model": {"model_kwargs": {name: value}}})
        assert f"model.model_kwargs.{name}" in str(caught.value)
        assert "swordfish" not in str(caught.value)
    with pytest.raises(ConfigError, match="is named like a credential"):
        check_arguments(["fit", f"--data.dataset_kwargs.{name}=swordfish-7"])
    with pytest.raises(ConfigError, match="is named like a credential"):
        check_arguments(["fit", f"--data.dataset_kwargs.{name}", "swordfish-7"])


@pytest.mark.parametrize("name", HEALTHY.split())
def test_healthy_names_are_left_alone(name):
    check_credentials({"a": {name: "swordfish-7", "b": [{name: "swordfish-7"}]}})
    check_arguments(["fit", f"--a.{name}", "swordfish-7"])


@pytest.mark.parametrize("value", VALUES.split())
def test_healthy_values_are_left_alone(value):
    check_credentials({"a": value, "b": [value]})


@pytest.mark.parametrize("value", [None, True, False, 3, "", "####", "</answer>", "two words"])
def test_a_flag_or_a_marker_is_no_secret(value):
    """`token: true` takes the stored one, and a reward may look for a token in an answer."""
    check_credentials({"token": value})
