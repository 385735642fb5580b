"""One run of a stage: pre-flight, data, loaders, step, handlers, checkpoints, run folder, pictures."""
