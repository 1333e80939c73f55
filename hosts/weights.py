"""Weights of a folder, of models of both kinds."""


def read_weights(kind, folder, new=(), **options):
    """A model of a folder's weights, by `kind.from_pretrained`. No pickle is opened, no code of the folder runs. Raises
    `ValueError` for weights that lack a part of the model, which the library draws at random, but for those whose names
    begin with one of `new`, and for weights of other shapes."""
    options |= {"use_safetensors": True, "trust_remote_code": False}
    try:
        model, found = kind.from_pretrained(folder, output_loading_info=True, **options)
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        why = "its weights have other shapes than its configuration, with the settings that were given, says"
        raise ValueError(f"{folder}: {why}.") from error
    if missing := sorted(name for name in found["missing_keys"] if not name.startswith(tuple(new))):
        raise ValueError(f"{folder}: its weights lack {len(missing)} tensors of the model, as {missing[0]}.")
    return model
