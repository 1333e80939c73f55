"""Every measure of the benchmark: a function each, from `Sizes` to the rows that came out."""

from . import compression, end_to_end, flops, planning, preprocessing, quantized, training

# In the order of the table that `uhr-bat bench` prints.
MEASURES = {
    function.__name__: function
    for function in (
        flops.flop_counts,
        flops.refined,
        flops.zoomed,
        flops.padding,
        planning.planned_memory,
        planning.walked,
        compression.synchronisations,
        compression.selection,
        compression.kmeans,
        compression.kmeans_memory,
        preprocessing.preprocessing,
        preprocessing.preprocessing_memory,
        preprocessing.gigapixel,
        preprocessing.overviews,
        preprocessing.jpeg,
        preprocessing.strips,
        end_to_end.encoding_memory,
        end_to_end.end_to_end,
        end_to_end.native_levels,
        end_to_end.largest_raster,
        end_to_end.start_up,
        end_to_end.many_questions,
        training.training_throughput,
        training.training_memory,
        quantized.quantized,
    )
}
