"""python -m packforcing bench: how long each part of a block takes, what it holds, and how far both are from the floor.

    clock       time on the device's own clock, and memory
    models      random weights, and what stands in for a VAE
    stages      a long video, stage by stage and block by block
    baselines   the same block over other caches
    floors      what the arithmetic takes at this machine's own rates
    run         the command

Nothing here is imported by the rest of the library.
"""
