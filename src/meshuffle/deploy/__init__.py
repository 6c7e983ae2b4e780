"""From a trained model to a file that other runtimes execute, with proof that nothing changed.

model ──subject: captured once──▶ Format.write ──▶ file ──Format.open──▶ parity ──▶ in place
"""
