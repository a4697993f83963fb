"""What flows: images from storage to the loop, checkpoints and samples back, and the record of it all.

The law of this layer: it knows Ray, storage and MLflow, and binds them to the mathematics of :mod:`models`, which
knows none of them. Only :mod:`pipelines.mlflow_run` and :mod:`pipelines.mlflow_find` import MLflow, and
:mod:`pipelines.fit`, the loop, imports neither MLflow nor Ray.

The one idea that shapes every module: what a run draws is a function of (seed, position), where the position of an
image counts the images since the start of the run.
"""
