"""The checkpoint engine: durable, verified, atomic directories of safetensors and JSON.

`manifest`, `store`, `retention` and `cadence` need no torch; `tensors`, `writer`, `reader` and
`rng` do, and are imported by ranks alone.
"""
