"""Compare speed, size and accuracy of a model in every installed runtime.

    backends: the rows        subject: model and images      worker: one backend, in one process
    run: rounds in which the backends take turns             show: table, CSV and picture

Nothing is imported here, because a worker whose runtime does not need torch must not load it.
"""
