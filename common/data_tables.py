"""Tables of the `datasets` library."""

from dataclasses import replace


def leave_files_closed(table):
    """The table with all files in it left as they are: nothing is decoded, and no path or address that a column names is
    opened, whatever kind of column its file says it is."""
    for name, kind in table.features.items():
        if (closed := _closed(kind)) != kind:
            table = table.cast_column(name, closed)
    return table


def _closed(kind):
    """A column's kind, lists and parts of it, without what decodes."""
    if isinstance(kind, dict):
        return {name: _closed(part) for name, part in kind.items()}
    if isinstance(kind, list):
        return [_closed(part) for part in kind]
    if getattr(kind, "decode", False) and type(kind).__name__ != "Json":
        return replace(kind, decode=False)
    return replace(kind, feature=_closed(kind.feature)) if hasattr(kind, "feature") else kind
