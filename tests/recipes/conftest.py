import pytest


def pytest_collection_modifyitems(config, items):
    """Skip tests marked `recipes_full`, unless the command's `-m` names the marker."""
    if "recipes_full" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("recipes_full"):
                item.add_marker(pytest.mark.skip(reason="slow: run with -m recipes_full"))
