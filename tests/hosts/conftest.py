"""Model folders of the families, made once for all tests that read them."""

import pytest
from hosts_tiny import FAMILIES, save_family
from uhr_bat import load_model


@pytest.fixture(scope="session")
def host_folder(tmp_path_factory):
    """name -> folder of a small random model of a family. Tests only read it."""
    made = {}

    def folder(name):
        if name not in made:
            made[name] = save_family(name, tmp_path_factory.mktemp("hosts") / name)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def loaded(host_folder):
    """(family, settings) -> (processor, model), loaded once."""
    made = {}

    def load(name, **settings):
        key = (name, repr(sorted(settings.items())))
        if key not in made:
            made[key] = load_model(host_folder(name), refinement=32, **FAMILIES[name].get("settings", {}), **settings)
        return made[key]

    return load


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param
