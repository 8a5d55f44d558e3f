"""Where the shared store is: what the settings say, or else where Celery has a Redis, and how Celery reaches it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

from resilient_tasks.errors import ConfigurationError
from resilient_tasks.settings import PREFIX, Settings
from resilient_tasks.store.address import SCHEMES, cert_reqs, hide_password, scheme_of

# Celery's and kombu's URLs carry options of their own as well; only these mean the same to a store
_SHARED_OPTIONS = ("db", "virtual_host", "ssl_", "client_name", "protocol", "username", "password")
_SOUGHT_BY = ("master_name", "min_other_sentinels")
_WITH_TLS = {"redis": "rediss", "valkey": "valkeys", "sentinel": "sentinels"}


class StorePlace(NamedTuple):
    """Where the shared store is.

    Attributes:
        url: as in :mod:`resilient_tasks.store.address`.
        options: of its connections, which Celery's settings hold beside the URL.
    """

    url: str
    options: dict[str, Any]


def find_store(settings: Settings, conf: Any = None) -> StorePlace:
    """Return the place of the shared store.

    That is ``store_url`` if set, else the broker if it is a Redis, else the result backend if it is one; either with
    what Celery's own settings say of TLS and of Sentinel. Of several broker URLs the first counts.

    Args:
        settings: the library's settings.
        conf: Celery's settings; None without an app.

    Raises:
        ConfigurationError: none of them is a Redis.
    """
    if settings.store_url:
        return StorePlace(settings.store_url, {})
    broker, backend = _url_in(conf, "broker_url"), _url_in(conf, "result_backend")
    if scheme_of(broker) in SCHEMES:
        return _as_celery_reaches(broker, conf.broker_transport_options, conf.broker_use_ssl)
    if scheme_of(backend) in SCHEMES:
        return _as_celery_reaches(backend, conf.result_backend_transport_options, conf.redis_backend_use_ssl)
    raise ConfigurationError(
        f"neither the broker ({_shown(broker)}) nor the result backend ({_shown(backend)}) is a Redis or Valkey server;"
        f" set {PREFIX}STORE_URL, for example to redis://localhost:6379/0"
    )


def _url_in(conf: Any, setting: str) -> str:
    given = getattr(conf, setting, None) or ""
    url = given if isinstance(given, str) else ";".join(given)
    return f"{url}://" if url in SCHEMES else url  # Celery takes a scheme alone


def _shown(url: str) -> str:
    return repr(hide_password(url) if "://" in url else "***") if url else "not set"


def _as_celery_reaches(url: str, transport_options: Mapping[str, Any] | None, use_ssl: object) -> StorePlace:
    tls = _tls_options(use_ssl)
    hosts = [_shared(host.strip(), tls=bool(tls)) for host in url.split(";")]
    if scheme_of(url) == "sentinel":
        return _as_sentinels_tell(hosts, transport_options or {}, tls)
    if scheme_of(url) == "rediss" and not tls and "ssl_" not in hosts[0]:
        tls = {"ssl_cert_reqs": "none"}  # what kombu makes of it, with a warning
    return StorePlace(hosts[0], tls)


def _as_sentinels_tell(hosts: Sequence[str], transport_options: Mapping[str, Any], tls: dict[str, Any]) -> StorePlace:
    asked_with = {"ssl": False, **(transport_options.get("sentinel_kwargs") or {})}
    sought = {name: transport_options[name] for name in _SOUGHT_BY if name in transport_options}
    first, *others = hosts
    url = ";".join([f"{first}{'&' if '?' in first else '?'}{urlencode(sought)}", *others])
    return StorePlace(url, {**tls, "sentinel_kwargs": asked_with})


def _tls_options(tls: object) -> dict[str, Any]:
    if not isinstance(tls, Mapping):
        return {}
    options = {name: value for name, value in tls.items() if name.startswith("ssl_")}
    required = options.get("ssl_cert_reqs")
    return {**options, "ssl_cert_reqs": cert_reqs(required)} if isinstance(required, str) else options


def _shared(url: str, *, tls: bool) -> str:
    """Return a URL without the options that only Celery or kombu understand, with TLS if asked for."""
    scheme, _, rest = url.partition("://")
    place, _, query = rest.partition("?")
    kept = [(name, value) for name, value in parse_qsl(query) if name.startswith(_SHARED_OPTIONS)]
    scheme = _WITH_TLS.get(scheme, scheme) if tls else scheme
    return f"{scheme}://{place}{'?' if kept else ''}{urlencode(kept)}"
