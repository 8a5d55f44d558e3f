"""docker-compose.yml is the same topology as ``make up``, and what it names exists."""

from __future__ import annotations

import importlib.util
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from workers import service, stack

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
MONITORING = {"exporter", "prometheus", "grafana"}  # in containers only
BUILT = {name: settings for name, settings in SERVICES.items() if "build" in settings}


def known_environment() -> set[str]:
    """Read the table in workers/app.py without importing it: that would make a second application."""
    namespace: dict[str, Any] = {}
    source = (ROOT / "workers" / "app.py").read_text()
    start = source.index("ENVIRONMENT = {")
    exec(source[start : source.index("}\n", start) + 1], namespace)
    return set(namespace["ENVIRONMENT"])


def test_the_roles_are_those_of_the_stack() -> None:
    assert set(SERVICES) - MONITORING == set(stack.ROLES)


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_has_a_health_check(name: str) -> None:
    check = SERVICES[name]["healthcheck"]
    assert check["test"][0] in {"CMD", "CMD-SHELL"}
    assert check["retries"] > 1


@pytest.mark.parametrize("name", [name for name in BUILT if name not in stack.SERVERS])
def test_who_uses_the_servers_waits_until_they_are_healthy(name: str) -> None:
    conditions = {server: rule["condition"] for server, rule in SERVICES[name]["depends_on"].items()}
    assert conditions == dict.fromkeys(stack.SERVERS, "service_healthy")


@pytest.mark.parametrize("name", BUILT)
def test_commands_name_modules_that_exist(name: str) -> None:
    words = shlex.split(BUILT[name]["command"])
    module = words[words.index("-A" if words[0] == "celery" else "-m") + 1]
    assert importlib.util.find_spec(module) is not None


@pytest.mark.parametrize("name", BUILT)
def test_environment_is_what_the_project_reads(name: str) -> None:
    assert set(BUILT[name]["environment"]) == known_environment()


@pytest.mark.parametrize("name", BUILT)
def test_urls_lead_to_services_and_their_ports(name: str) -> None:
    for variable, url in BUILT[name]["environment"].items():
        host, _, port = url.split("/")[2].partition(":")
        dependency = variable.removesuffix("_URL").lower()
        expected = ("service", service.DEFAULT_PORTS[dependency]) if host == "service" else ("redis", 6379)
        assert (host, int(port)) == expected


@pytest.mark.parametrize("name", stack.WORKERS)
def test_workers_are_the_same_size_as_in_the_stack(name: str) -> None:
    words = shlex.split(SERVICES[name]["command"])
    options = {flag: words[words.index(flag) + 1] for flag in ("-n", "-P", "-c")}
    assert options == {"-n": f"{name}@localhost", "-P": "prefork", "-c": str(stack.CONCURRENCY)}


def test_people_log_in_to_flower_as_in_the_stack() -> None:
    assert SERVICES["flower"]["command"].endswith(f"--basic-auth={stack.LOGIN}")


def test_the_image_copies_what_exists_and_installs_extras_that_exist() -> None:
    dockerfile = BUILT["service"]["build"]["dockerfile_inline"]
    copied = [word for line in dockerfile.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    extras = dockerfile.split('".[')[1].split("]")[0].split(",")
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras)
