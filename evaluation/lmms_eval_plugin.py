"""What lmms-eval finds by the entry point: the name of the model, and where its class is.

The class is imported when it is asked for: lmms-eval reads its entry points before it can be imported itself.
"""


def manifest():
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="uhr_bat", simple_class_path=f"{__package__}.lmms_eval_model.UHRBat")
