"""Packages that only some parts need."""

from importlib import import_module


def require(extra: str, *packages: str):
    """Raises `ImportError` with what to install where one of the packages of an extra does not import."""
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(f'{error}. This part needs: pip install "uhr-bat[{extra}]"') from error
