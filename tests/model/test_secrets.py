"""What only its owner should know does not get out, and what is no secret stays readable."""

from __future__ import annotations

import os
import time

import pytest

from model.secrets import redacted, refuse_credentials


@pytest.fixture(autouse=True)
def no_secrets_but_the_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://user:pass@host:1/x", "http://***@host:1/x"),
        ("https://token@host/x", "https://***@host/x"),
        ("https://user:pa/ss@host", "https://***@host"),
        ("http://user:8080@host/x", "http://***@host/x"),
        ("simplecache::https://user:pass@host/x", "simplecache::https://***@host/x"),
        ("from postgresql+psycopg2://u:p@db/m and 's3://k:s@b'", "from postgresql+psycopg2://***@db/m and 's3://***@b'"),
        ("abfs://container:key@account/x", "abfs://***@account/x"),
        ("https://b/x?X-Amz-Signature=ab12&X-Amz-Expires=3", "https://b/x?X-Amz-Signature=***&X-Amz-Expires=3"),
        ("https://b/x?se=1&sig=ab%2b", "https://b/x?se=1&sig=***"),
        ("https://b/x?access_token=ab", "https://b/x?access_token=***"),
        ("{'Authorization': 'Bearer abcdefgh'}", "{'Authorization': 'Bearer ***'}"),
        ("AccountName=me;AccountKey=abc==;End", "AccountName=me;AccountKey=***;End"),
    ],
)
def test_credentials_in_urls_and_headers_are_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/api/users/@me",
        "abfs://container@account.dfs.core.windows.net/x",
        "sftp://me@host/x",
        "s3://bucket/key=1/x",
        "models:/quickstart@champion",
        "me@mail.org wrote: see http://host:80",
        "E:\\GPT_SANDBOX_STORAGE",
        "checkpoint.checkpoint_to_resume: step_00000010",
        "",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text
    assert refuse_credentials(text) == text


@pytest.mark.parametrize(
    "name",
    ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "OPENAI_API_KEY", "AZURE_STORAGE_CONNECTION_STRING", "db_passwd"],
)
def test_secrets_of_the_environment_are_hidden_wherever_they_occur(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "pl4nted/secret+")
    assert redacted("no pl4nted/secret+: pl4nted%2Fsecret%2B") == "no ***: ***"


def test_a_password_in_a_url_of_the_environment_is_hidden_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:pl4nted%2Fpw@127.0.0.1:5000")
    assert redacted("login failed for user with pl4nted/pw") == "login failed for user with ***"


def test_names_and_places_and_short_values_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "training")
    monkeypatch.setenv("MY_TOKEN", "step")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/home/me/credentials")
    monkeypatch.setenv("HOME", "/home/me")
    text = "training of step 3: /home/me/credentials is not readable"
    assert redacted(text) == text


@pytest.mark.parametrize(
    "place",
    [
        "https://user:pl4nted@host/data",
        "https://pl4nted@host/data",
        "s3://key:pl4nted@bucket/x",
        "simplecache::https://user:pl4nted@host/x",
        "https://host/x.parquet?X-Amz-Signature=pl4nted",
        "https://host/x.parquet?sig=pl4nted",
        "abfs://container:pl4nted@account/x",
    ],
)
def test_a_place_with_a_credential_is_refused_without_repeating_it(place: str) -> None:
    with pytest.raises(ValueError, match="environment") as refused:
        refuse_credentials(place)
    assert "pl4nted" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["://" * 50_000, "a://" + "b" * 200_000, "http://a:b" * 20_000, "a" * 300_000, "?" * 100_000, "?token" * 50_000]
)
def test_a_long_text_takes_no_time(text: str) -> None:
    began = time.process_time()
    redacted(text)
    assert time.process_time() - began < 2
