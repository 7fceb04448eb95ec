"""python -m packforcing bench: how long each part of a block takes, what it holds, and how far both are from the floor.

    clock       time on the device's own clock, and memory
    work        what a block takes, by count
    rates       what this machine reaches
    floors      what a block takes at least: that work at those rates
    models      random weights, and what stands in for a VAE
    settings    the options, parsed and checked
    prepare     what is run: models in the form that is fastest here, and their videos
    stages      a long video, stage by stage and block by block
    overlap     the same with each block decoded beside the next
    baselines   the same block over other caches
    measure     all measurements, one after the other
    result      the JSON object
    text        lines for people
    run         the command
    exactness   the command `check`: does a device compute what the CPU does

Nothing here is imported by the rest of the library, the command line aside.
"""
