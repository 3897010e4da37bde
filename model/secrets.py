"""Secrets stay where they are: what is printed, logged or tracked names no password, and no config that is published holds one.

Passwords reach a run by its environment, by the config files of fsspec and of the cloud's own tools, or (wrongly) inside a URL. Exceptions
of libraries quote URLs, and a traceback quotes whatever it likes; so everything that leaves a process as text goes through `redacted`.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Iterator

SHORTEST = 8
"""A value of fewer characters is no secret worth the name, and replacing it would tear words apart."""
HIDDEN = "***"

_SECRET_NAME = re.compile(
    r"SECRET|PASSW(OR)?D|PASSPHRASE|TOKENS?(_|$)|API_?KEY|ACCESS_?KEY|ACCOUNT_?KEY|PRIVATE_?KEY|CREDENTIAL|CONNECTION_?STRING|_SAS(_|$)|_PWD$",
    re.IGNORECASE,
)
_NAME_OF_A_PLACE = re.compile(r"_(FILE|PATH|DIR|URL|URI)$|^GOOGLE_APPLICATION_CREDENTIALS$", re.IGNORECASE)
"""Where a secret lies is none: the message that it cannot be read there has to say where. (A password inside such a URL is one.)"""

_URL_PASSWORD = re.compile(r"(?<=://)[^\s/?#@:\"'<>]{0,200}:(?P<password>(?!\d+(?:[/?#\s]|$))[^\s@\"'<>]{0,500})@")
"""`user:password@` after a scheme; a password may hold a slash, the port of a host is none. Bounded: a long text takes no time."""
_URL_USER = re.compile(r"(?<=://)[^\s/?#\"'<>]{1,700}@")
"""`token@` after a scheme."""
_USER_IS_PUBLIC = re.compile(r"(abfss?|wasbs?|adl|hdfs|webhdfs|sftp|ssh|smb)://$", re.IGNORECASE)
"""What stands before the @ of these is a container or a login, unless a password follows it."""
_SIGNED = re.compile(
    r"([?&;](?:x-(?:amz|goog)-(?:signature|credential|security-token)|(?:aws)?accesskeyid|sig|signature|[a-z_-]{0,30}token|api[_-]?key|key"
    r"|[a-z_-]{0,30}secret|passw(?:or)?d|pwd|credential)=)[^&;\s\"'<>#]+",
    re.IGNORECASE,
)
_HEADER = re.compile(r"\b((?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{8,}")
_CONNECTION_STRING = re.compile(r"((?:AccountKey|SharedAccessKey|SharedAccessSignature)=)[^;\s\"']+", re.IGNORECASE)


def redacted(text: str) -> str:
    """`text` without what only its owner should know: the values of environment variables with telling names (`HF_TOKEN`, …) and the
    passwords in URLs of any variable, users and passwords in URLs, signatures of presigned URLs, authorization headers.

    What is no secret stays as it is; text without one comes back equal.
    """
    for secret in sorted(_secrets_of_environment(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = _URL_PASSWORD.sub(f"{HIDDEN}@", text)
    text = _URL_USER.sub(lambda match: match[0] if _user_is_public(match) else f"{HIDDEN}@", text)
    for pattern in (_SIGNED, _HEADER, _CONNECTION_STRING):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def refuse_credentials(place: str) -> str:
    """`place` itself: a path or URL that may be published, as everything in `config.yaml` and `params.yaml` is.

    Raises:
        ValueError: it holds a password, a token or a signature; the message does not repeat it.
    """
    shown = place
    for pattern in (_URL_PASSWORD, _SIGNED, _CONNECTION_STRING):
        shown = pattern.sub("", shown)
    if shown != place or not all(map(_user_is_public, _URL_USER.finditer(place))):
        raise ValueError(
            "holds a password, a token or a signature, and what is configured here is versioned, pushed and tracked. Leave it out "
            "of the URL and give it by the environment (AWS_SECRET_ACCESS_KEY, HF_TOKEN, …) or fsspec's own config (~/.config/fsspec)"
        )
    return place


def _user_is_public(match: re.Match[str]) -> bool:
    return _USER_IS_PUBLIC.search(match.string, max(0, match.start() - 20), match.start()) is not None


def _secrets_of_environment() -> Iterator[str]:
    """The secrets in environment variables, each also as a URL would spell it."""
    for name, value in os.environ.items():
        found = {match["password"] for match in _URL_PASSWORD.finditer(value)}
        if _SECRET_NAME.search(name) and not _NAME_OF_A_PLACE.search(name):
            found.add(value.strip())
        for secret in found:
            if len(secret) >= SHORTEST:
                yield from {secret, urllib.parse.quote(secret, safe=""), urllib.parse.unquote(secret)}
