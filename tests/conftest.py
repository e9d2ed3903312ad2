"""Options and defaults of the whole suite."""


def pytest_addoption(parser):
    parser.addoption("--write-docs", action="store_true", help="write the tables of docs/ from what ran")


def pytest_collection_modifyitems(config, items):
    """Full products run only where the marker expression names them."""
    if "full" not in config.option.markexpr:
        full = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if not item.get_closest_marker("full")]
