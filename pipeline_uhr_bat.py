"""UHR-BAT pipeline: `pipeline("image-text-to-text")` whose images reach the processor unopened.

The library's own decodes what stands in `images=` with Pillow before the processor sees it: rasters then come out wrong,
and Pillow's limit holds. Chats it hands on as they are.
"""

from transformers import ImageTextToTextPipeline


class UHRBatPipeline(ImageTextToTextPipeline):
    """The library's pipeline, but `images` may be whatever the processor takes (`read_image`), rasters of any size too.

    `pipeline` takes it for a model that is named, with `trust_remote_code=True`; to a model in memory it is given as
    `pipeline_class`.
    """

    def preprocess(self, inputs=None, timeout=None, continue_final_message=None, processor_kwargs=None, **kwargs):
        if not isinstance(inputs, dict):
            if processor_kwargs is not None:
                kwargs["processor_kwargs"] = processor_kwargs
            return super().preprocess(inputs, timeout, continue_final_message, **kwargs)
        images, text = inputs["images"], inputs["text"]
        options = dict(kwargs if processor_kwargs is None else processor_kwargs)
        if isinstance(text, (list, tuple)) and len(text) > 1:
            options.setdefault("padding", True)
        model_inputs = self.processor(images=images, text=text, return_tensors="pt", **options).to(dtype=self.dtype)
        model_inputs["text"] = text
        return model_inputs


__all__ = ["UHRBatPipeline"]
