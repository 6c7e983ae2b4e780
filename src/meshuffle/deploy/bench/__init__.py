"""The same model in every runtime that is installed: fast, small, and still right?

    backends: what is compared        subject: model and images      worker: one backend, alone
    run: rounds in which they take turns      show: table, CSV and picture

Nothing is imported here: a worker whose runtime needs no torch must not load it.
"""
