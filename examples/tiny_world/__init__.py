"""The small world that nextflow-tiny is trained on and judged in: drawn shapes, Fluent emoji and rendered words.

Every picture is 128 x 128 and made from a `numpy.random.Generator`, so a seed is a data set. Start with `dataset.py`.
"""
