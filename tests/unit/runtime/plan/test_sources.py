"""Where a component's configuration comes from must name the class of the base model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from quantmatrix.errors import CheckpointError
from quantmatrix.runtime.plan import sources
from quantmatrix.runtime.plan.sources import check_class

BASE: Any = SimpleNamespace(components={"transformer": ("diffusers", "MModel")}, reference="base")


def check(name: str, class_name: str) -> None:
    check_class(name, class_name, "here/config.json", BASE, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["AModel", "ZModel", ""])
def test_another_class_is_another_model(name: str) -> None:
    said = f"here/config.json: this is a {name or 'component without _class_name'}, transformer of base is a MModel"
    with pytest.raises(CheckpointError, match=said):
        check("transformer", name)


def test_its_own_class_and_parts_that_the_base_has_not_are_taken() -> None:
    check("transformer", "MModel")
    check("vae", "AnyVAE")


@pytest.mark.parametrize(
    ("weights", "override", "opened", "config"),
    [
        (None, None, "open_component base transformer", "read_component_config base transformer"),
        (None, "there", "open_component there", "beside the weights"),
        ("w", None, "open_weights w", "read_component_config base transformer"),
        ("w", "there", "open_weights w", "read_component_config there"),
        ("compat:w", None, "open_compat w", "read_component_config base transformer"),
    ],
)
def test_weights_and_configuration_have_one_source_each(
    monkeypatch: pytest.MonkeyPatch,
    weights: str | None,
    override: str | None,
    opened: str,
    config: str,
) -> None:
    own = {"_class_name": "MModel", "n": 1}
    said = SimpleNamespace(config=own, config_file="beside the weights", files=("w.st",))
    calls = []

    def note(name: str, given: Any) -> Any:
        def call(reference: str, hub: object, *folder: str, **_: str) -> Any:
            assert hub == "a hub"
            calls.append(" ".join((name, reference, *folder)))
            return given(calls[-1])

        return call

    for name in ("open_component", "open_weights", "open_compat"):
        monkeypatch.setattr(sources, name, note(name, lambda _: said))
    read = note("read_component_config", lambda text: (own, text))
    monkeypatch.setattr(sources, "read_component_config", read)
    for name in ("check_halves", "check_config", "check_stated_config"):
        monkeypatch.setattr(sources, name, lambda *_: None)
    monkeypatch.setattr(sources.families, "check", lambda _: None)
    paths = {"transformer": override} if override else {}
    request: Any = SimpleNamespace(component_paths=paths, hub="a hub")
    found = sources.find_source("transformer", request, BASE, weights, primary=True)
    assert (calls[0], found.config_from) == (opened, config)
    assert (found.class_name, dict(found.config)) == ("MModel", own)


@pytest.mark.parametrize("gone", ["config", "config_file"])
def test_a_component_without_its_configuration_says_what_to_pass(
    gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = SimpleNamespace(config={}, config_file="config.json", files=("w.st",))
    setattr(said, gone, None)
    monkeypatch.setattr(sources, "open_component", lambda *_, **__: said)
    request: Any = SimpleNamespace(component_paths={"transformer_2": "there"}, hub=None)
    message = "there: no config.json beside w.st; .* use --transformer-2-weights-path"
    with pytest.raises(CheckpointError, match=message):
        sources.find_source("transformer_2", request, BASE, None, primary=True)
