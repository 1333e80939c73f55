"""Tables of the `datasets` library."""


def leave_files_closed(table, columns):
    """The table with the files in some columns, one or a list of them a row, left as they are: nothing is decoded."""
    from datasets import Image, List

    for column in set(columns) & set(table.column_names):
        kind = table.features[column]
        if isinstance(kind, Image):
            table = table.cast_column(column, Image(decode=False))
        elif isinstance(kind, List) and isinstance(kind.feature, Image):
            table = table.cast_column(column, List(Image(decode=False)))
    return table
